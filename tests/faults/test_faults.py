"""A sample of the bad inputs; ``python -m tests.faults.run`` makes as many as one likes."""

import json
import shutil

import jax
import pytest

from masm_jax import predict
from masm_jax.evaluation import gallery
from tests.faults import judge, kills, run, runs
from tests.faults.kinds import KINDS
from tests.faults.runs import SPOILT


@pytest.fixture(scope="module")
def worker(tmp_path_factory):
    """The watched process that judges inputs: a hang ends it, and not the tests."""
    with run.Watched(tmp_path_factory.mktemp("faults")) as watched:
        yield watched


@pytest.mark.parametrize("kind", [*KINDS, *SPOILT])
def test_one_input_of_every_kind(worker, kind):
    outcome, said = worker.judge(kind, 11)
    assert outcome in (judge.HANDLED, judge.CLEAR), f"{outcome}: {said}"


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (MemoryError("Unable to allocate 3 GiB"), "out of memory (Unable to allocate 3 GiB); free"),
        (jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: 9 GiB\nmore"), "9 GiB; a smaller infer."),
    ],
)
def test_a_case_that_finds_no_room_does_not_stop_the_others(
    error, words, tmp_path, monkeypatch, capsys
):
    segment, first = runs.Network.probabilities, []

    def probabilities(*given):
        if not first:
            first.append(True)
            raise error
        return segment(*given)

    runs.make(tmp_path)
    monkeypatch.setattr(runs.Network, "probabilities", probabilities)
    assert runs.evaluate(tmp_path, tmp_path / "eval", ["--split=all"]) == 3
    summary = json.loads((tmp_path / "eval" / "summary.json").read_text())
    assert summary["cases"] == 1 and words in summary["failed"]["First"]
    first.clear()
    capsys.readouterr()
    monkeypatch.setattr(predict, "load_run", runs.load_run)
    places = [f"--workdir={tmp_path / 'run'}", f"--input={tmp_path / 'raw'}"]
    assert predict.main([*places, f"--output={tmp_path / 'out'}"]) == 3
    said = capsys.readouterr()
    assert "1 cases in" in said.out and words in said.err.splitlines()[-1]
    assert (tmp_path / "out" / "Second.nii.gz").is_file()


def test_where_no_case_can_be_segmented_the_earlier_evaluation_stands(
    tmp_path, monkeypatch, capsys
):
    def no_room(*_):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: 9 GiB")

    runs.make(tmp_path)
    assert runs.evaluate(tmp_path, tmp_path / "eval", ["--split=all"]) == 0
    before = {path: path.read_bytes() for path in (tmp_path / "eval").rglob("*") if path.is_file()}
    assert tmp_path / "eval" / "report.html" in before
    monkeypatch.setattr(runs.Network, "probabilities", no_room)
    assert runs.evaluate(tmp_path, tmp_path / "eval", ["--split=all"]) == 3
    assert "9 GiB" in capsys.readouterr().err
    assert before == {p: p.read_bytes() for p in (tmp_path / "eval").rglob("*") if p.is_file()}


def test_a_report_that_cannot_be_drawn_does_not_hide_the_scores(tmp_path, monkeypatch, capsys):
    def no_room(*_, **__):
        raise MemoryError("Unable to allocate 3.1 GiB")

    runs.make(tmp_path)
    monkeypatch.setattr(gallery, "write", no_room)
    assert runs.evaluate(tmp_path, tmp_path / "eval") == 3
    said = capsys.readouterr()
    assert "Dice" in said.out and "report.html" not in said.out
    assert "failed: report.html: out of memory (Unable to allocate 3.1 GiB)" in said.err
    assert (tmp_path / "eval" / "metrics.csv").is_file()
    assert not json.loads((tmp_path / "eval" / "summary.json").read_text())["failed"]  # no case
    assert not (tmp_path / "eval" / "report.html").exists()


def test_of_two_cases_of_one_name_the_first_is_segmented_and_counted(tmp_path, monkeypatch, capsys):
    runs.make(tmp_path)
    shutil.copytree(tmp_path / "raw" / "First", tmp_path / "raw" / "more" / "First")
    monkeypatch.setattr(predict, "load_run", runs.load_run)
    places = [f"--workdir={tmp_path / 'run'}", f"--input={tmp_path / 'raw'}"]
    assert predict.main([*places, f"--output={tmp_path / 'out'}"]) == 3
    said = capsys.readouterr()
    assert len(list((tmp_path / "out").glob("*.nii.gz"))) == 2 and "2 cases in" in said.out
    assert "a second case of this name" in said.err.splitlines()[-1]


def test_the_judge_sees_what_is_wrong(tmp_path):
    """Outcomes that no input has any more must still be found."""

    def raises(*_):
        raise KeyError("x")

    def says(code, text):
        def command(*_):
            print(text)
            return code

        return command

    def outcome(command, expected):
        place = str(tmp_path)
        return judge._ran(command, tmp_path, tmp_path, [], None, expected, place)[0]

    named = f"{tmp_path}: bad; mend it"
    assert outcome(raises, "either") == "TRACEBACK"
    assert outcome(says(3, f"{named}\nTraceback (most recent call last)"), "fails") == "TRACEBACK"
    assert outcome(says(0, ""), "fails") == "WRONGLY TAKEN"
    assert outcome(says(3, named), "works") == "WRONGLY REFUSED"
    assert outcome(says(1, "bad; mend it"), "fails") == "UNCLEAR"
    assert outcome(says(1, named + "\x1b[31m"), "fails") == "UNCLEAR"
    assert outcome(says(1, named), "fails") == judge.CLEAR
    (tmp_path / "records" / "A").mkdir(parents=True)
    (tmp_path / "records" / "A" / "image.npy").write_bytes(b"")
    assert judge._left(tmp_path, judge.CLEAR) == "HALF-WRITTEN"


def test_an_input_is_made_from_its_seed_alone():
    for kind in ("header: random bytes", "stream: cut off", "labels: none"):
        (one, _), (two, _), (other, _) = (judge.made_input(kind, seed) for seed in (3, 3, 4))
        assert one.files == two.files and one.files != other.files


def test_records_of_a_killed_prepare_are_whole_or_absent(phantoms, tmp_path, capsys):
    (tmp_path / "raw").symlink_to(phantoms)
    kills.kill_often(kills.Prepare(tmp_path), tmp_path / "prepare", kills=2, seed=0)
    assert "| prepare | 2 |" in capsys.readouterr().out


def test_a_difference_after_a_kill_is_seen(tmp_path):
    for name in ("straight", "killed"):
        (tmp_path / name / "A").mkdir(parents=True)
        (tmp_path / name / "A" / "meta.json").write_text(name[:1] * 8)
    target = kills.Prepare(tmp_path)
    with pytest.raises(kills.Wrong, match="meta.json differs"):
        target.check_whole(tmp_path / "straight", tmp_path / "killed")
    (tmp_path / "killed" / "A" / "meta.json").unlink()
    with pytest.raises(kills.Wrong, match="has the name of a record and is none"):
        target.check_partial(tmp_path / "killed")
    with pytest.raises(kills.Wrong, match="differ in"):
        target.check_whole(tmp_path / "straight", tmp_path / "killed")
