"""Dice at equal budget: budgets and tables by hand, the command on phantoms."""

import argparse
import csv
import json
import math
import os
import signal
import subprocess
import time
import types

import numpy as np
import pytest

from masm_jax import locks, runtime, subsets
from masm_jax.benchmark import __main__ as benchmark
from masm_jax.benchmark import accuracy, accuracy_report, study
from masm_jax.benchmark.study import Budget, Fold, Run
from tests.conftest import CASES

TINY, BROKEN = "tests.benchmark.tiny_torch:build", "tests.benchmark.tiny_torch:broken"
SMALL = (
    "--config=configs/masm_demo.py", "--set=patch=16", "--set=optim.warmup_steps=1",
    "--set=log.every=1", "--set=batch_size=2", "--calibration_steps=6",
)  # fmt: skip

# ---------------------------------------------------------------- by hand


def test_budgets():
    assert Budget.parse("minutes:2.5").steps(0.1) == 15  # 150 s
    assert Budget.parse("minutes:0.001").steps(0.1) == 1
    assert Budget.parse("steps:400").steps(None) == 400
    assert str(Budget.parse("minutes:10")) == "minutes-10"
    assert Budget.parse("steps:1234567").words() == "1234567 steps"
    for wrong in ("10", "hours:1", "steps:0", "steps:1.5", "minutes:-1", "minutes:nan", "steps:"):
        with pytest.raises(ValueError, match=f"--budget={wrong}: expected such as"):
            Budget.parse(wrong)


def test_the_rate_is_of_the_intervals_after_the_second(tmp_path):
    lines = [{"step": i, "time/steps_per_s": rate} for i, rate in enumerate((0.1, 1, 9, 2, 3), 1)]
    lines.insert(2, {"step": 2, "val/dice": 0.5})
    for some, rate in ((lines, 3), (lines[:2], 1), (lines[:1], math.nan)):
        (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, some)))
        assert study.training_rate(tmp_path) == pytest.approx(rate, rel=0, nan_ok=True)


def evaluated(folder, dice, *, step=4):
    """A run that is done, with Dice of two regions per case."""
    (folder / "eval").mkdir(parents=True)
    (folder / "eval" / "summary.json").write_text(json.dumps({"step": step, "failed": {}}))
    (folder / "network.json").write_text(
        json.dumps({"framework": "PyTorch", "parameters": 2_000_000, "gmac": 1.5})
    )
    line = json.dumps({"step": 1, "time/steps_per_s": 0.5}) + "\n"
    (folder / "metrics.jsonl").write_text(line * 2)
    with open(folder / "eval" / "metrics.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["case", "region", "dice", "reference_ml"])
        for case, (whole, core) in dice.items():
            writer.writerows([[case, "WT", whole, 9], [case, "TC", core, 5 if case == "x" else 0]])


def test_differences_are_paired_by_case_and_seed(tmp_path):
    budget = Budget.parse("steps:4")
    runs = [Run(budget, s, n, Fold(f, "")) for s in (0, 1) for n in "ab" for f in ("k0", "k1")]
    whole = study.Study(
        tmp_path, config="", records="", test_records=None, given=[], calibration_steps=6
    )
    for run in runs:
        gain = {"a": 0.2, "b": 0.1 * run.seed}[run.network]
        case, base = {"k0": ("x", 0.3), "k1": ("y", 0.5)}[run.fold.folder]
        if (run.seed, run.network, run.fold.folder) != (1, "a", "k1"):  # that one is not done
            evaluated(whole.folder(run), {case: (base + gain, base + gain)})
    lines = accuracy_report.write(whole, runs, about={})
    summary = json.loads((tmp_path / "steps-4" / "summary.json").read_text())
    a, b = summary["networks"].values()
    assert list(a["seeds"]) == ["0"] and list(b["seeds"]) == ["0", "1"]
    assert a["dice"] == pytest.approx({"WT": 0.6, "TC": 0.6, "mean": 0.6})
    assert b["dice"]["mean"] == pytest.approx(0.45) and b["cases"] == 2
    assert a["minutes"] == pytest.approx(4 / 0.5 / 60)
    difference = summary["differences"]["b"]
    assert list(difference) == ["WT", "TC", "mean"]
    row = difference["mean"]
    assert (row["seeds"], row["cases"]) == (1, 2)
    assert [row[key] for key in ("difference", "low", "high")] == pytest.approx([0.2] * 3)
    assert "| b | PyTorch | 2.00 | 1.5 | 0.50 | 4 | 0.1 |" in "\n".join(lines)
    assert "+0.200 [+0.200, +0.200]" in (tmp_path / "steps-4" / "table.md").read_text()
    assert (tmp_path / "steps-4" / "dice.svg").is_file()

    # With the missing fold both seeds count: (0.2 + 0.2) / 2 - (0 + 0.1) / 2.
    evaluated(whole.folder(runs[5]), {"y": (0.7, 0.7)})
    accuracy_report.write(whole, runs, about={})
    summary = json.loads((tmp_path / "steps-4" / "summary.json").read_text())
    row = summary["differences"]["b"]["WT"]
    # Seeds differ, cases do not: what other seeds would give is in the interval.
    assert [row[key] for key in ("difference", "low", "high")] == pytest.approx([0.15, 0.1, 0.2])
    # Case y has no TC, and no network leaves it empty: 0.3 + 0.2, and 0.3 + 0 and 0.3 + 0.1.
    assert summary["networks"]["a"]["absent"] == {
        "TC": {"scored": 2, "left_empty": 0, "dice": pytest.approx(0.5)}
    }
    said = "left empty: a 0 of 2, b 0 of 2. Dice of those with it: a 0.500, b 0.350."
    assert said in (tmp_path / "steps-4" / "table.md").read_text()

    table = whole.folder(runs[5]) / "eval" / "metrics.csv"
    table.write_text(table.read_text().replace("y,", "z,"))
    with pytest.raises(ValueError, match="a: its seeds were scored on different cases"):
        accuracy_report.write(whole, runs, about={})


def arguments(records, **changes):
    """Of the command, as far as they say what is trained on what."""
    given = dict(records=records, test_records=None, split=[], set=[], calibration_steps=24)
    return types.SimpleNamespace(**given | {"config": "configs/masm_demo.py"} | changes)


def planned(args, output):
    return accuracy._folds(args, output, accuracy._config(args))


def test_pairs_hold_out_every_case_once(records, tmp_path):
    folds, held = planned(arguments(records, split=["pairs"]), tmp_path)
    assert [(fold.folder, fold.rule) for fold in folds] == [("fold-0", "0/2"), ("fold-1", "1/2")]
    assert sorted(case for own in held for case in own) == CASES
    (fold,), held = planned(arguments(records, test_records=records), tmp_path)
    assert fold.folder == "" and fold.rule == str(tmp_path / "split.json") and held == [CASES]
    with pytest.raises(ValueError, match="--split=0/2 and --split=0/2 both hold out"):
        planned(arguments(records, split=["pairs", "0/2"]), tmp_path)


def test_a_refused_study_leaves_what_the_other_trains_on(records, tmp_path):
    args = arguments(records, test_records=records)
    config, (folds, cases) = accuracy._config(args), planned(args, tmp_path)
    accuracy._study(args, tmp_path, config, folds, cases)
    before = (tmp_path / "split.json").read_text()
    assert json.loads(before)["train"] == CASES
    (tmp_path / "split.json").write_text("{}")
    args.calibration_steps = 30
    with pytest.raises(ValueError, match="another study: calibration_steps: 24 -> 30"):
        accuracy._study(args, tmp_path, config, folds, cases)
    args.calibration_steps = 24
    with pytest.raises(ValueError, match="another study: cases: "):
        accuracy._study(args, tmp_path, config, folds, [CASES[:3]])
    edited = accuracy._config(arguments(records, set=["optim.learning_rate=1e-4"]))
    with pytest.raises(ValueError, match=r"another study: optim.learning_rate: 0\.003 -> 0\.0001"):
        accuracy._study(args, tmp_path, edited, folds, cases)  # the file of the config was
    assert (tmp_path / "split.json").read_text() == "{}"
    (tmp_path / "study.json").write_text("{")
    with pytest.raises(ValueError, match="study.json is damaged .* name another --output"):
        accuracy._study(args, tmp_path, config, folds, cases)


def test_a_network_of_ones_own_is_found_where_the_command_is_started(tmp_path, monkeypatch):
    """By the command at once, and by the processes that train, which start elsewhere."""
    pytest.importorskip("torch", reason="needs torch: requirements-test.txt")
    (tmp_path / "own_network.py").write_text("def build(modalities, regions, patch): ...\n")
    with pytest.raises(ValueError, match="'own_network:build': No module named 'own_network'"):
        accuracy._names("own_network:build")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)  # as python -m does
    assert accuracy._names("masm,own_network:build") == ["masm", "own_network:build"]
    with pytest.raises(ValueError, match="no attribute 'bild'.*with that function"):
        accuracy._names("own_network:bild")
    stop = types.SimpleNamespace(name="")
    study._process(["-c", "import own_network, masm_jax"], tmp_path / "run", stop)


def test_one_case_cannot_be_held_out_in_pairs(records, tmp_path, monkeypatch):
    monkeypatch.setattr(accuracy.records_lib, "Records", lambda _: types.SimpleNamespace(cases=[1]))
    with pytest.raises(ValueError, match="has 1 cases, expected 4 or more"):
        accuracy._folds(arguments(records, split=["pairs"]), tmp_path, None)


def test_the_time_left_goes_by_what_the_same_network_took():
    budget = Budget.parse("minutes:60")
    runs = [Run(budget, 0, network, Fold("", "")) for network in "abc"]
    assert accuracy._left(runs, {}) == "3:00 h"
    took = {(budget, "a"): [7200], (budget, "b"): [3600]}
    assert accuracy._left(runs, took) == "4:30 h"
    assert accuracy._left([Run(Budget.parse("steps:2"), 0, "a", Fold("", ""))], {}) is None


# ---------------------------------------------------------------- the command


@pytest.fixture(scope="module")
def accuracy_command(command_line):
    """(start, options) of subprocess.run([*start, "--flag=value"], **options); torch not hidden."""
    start, options = command_line
    env = options["env"] | {"PYTHONPATH": "", "OMP_NUM_THREADS": "1"}
    return [*start, "-m", "masm_jax.benchmark", "accuracy"], options | {"env": env, "text": True}


@pytest.fixture(scope="module")
def bench(accuracy_command):
    """Runs the command: bench("--flag=value", code=0) -> result."""
    start, options = accuracy_command

    def run(*words, code=0):
        command = [*start, *map(str, words)]
        result = subprocess.run(command, **options, capture_output=True, timeout=600)
        assert result.returncode == code, f"{result.stdout}\n{result.stderr}"
        return result

    return run


def test_from_records_to_a_table(bench, records, tmp_path):
    """Ours, one in PyTorch and one that fails; then what is done is not done again."""
    output = tmp_path / "study"
    flags = [
        *SMALL, f"--records={records}", f"--split=holdout:{CASES[3]}", f"--output={output}",
        "--seeds=0", "--budget=steps:2",
    ]  # fmt: skip
    said = bench(*flags, f"--networks=unet,{TINY},{BROKEN}", code=runtime.EXIT_SOME_FAILED)
    name = TINY.replace(":", ".")
    assert (
        f"failed: 2 steps, {BROKEN} seed 0: masm_jax.benchmark.torch_train ended with code 1"
        in said.stderr
    )
    assert "broken on purpose" in said.stderr
    summary = json.loads((output / "steps-2" / "summary.json").read_text())
    assert list(summary["networks"]) == ["unet", TINY]
    assert summary["networks"]["unet"]["framework"].startswith("JAX")
    assert summary["networks"][TINY]["parameters"] == 4 * 4 * 27 + 4 + 4 * 3 + 3
    gmac = (4 * 4 * 27 + 4 * 3) * 16**3 / 1e9
    assert summary["networks"][TINY]["gmac"] == pytest.approx(gmac)
    assert "mean" in summary["differences"][TINY]
    evaluations = [output / "steps-2" / one / "seed-0" / "eval" for one in ("unet", name)]
    heads, cases = set(), set()
    for folder in evaluations:
        with open(folder / "metrics.csv", newline="") as file:
            rows = list(csv.DictReader(file))
        heads.add(tuple(rows[0])[:4])
        cases |= {row["case"] for row in rows}
        assert (folder / "predictions" / f"{CASES[3]}.nii.gz").is_file()
        assert (folder / "report.html").is_file()
    assert heads == {("case", "region", "dice", "hd95")} and cases == {CASES[3]}

    runs = [f"--workdir={output / 'steps-2' / one}" for one in ("unet", name)]
    assert subsets.main([*runs, f"--output={tmp_path / 'subsets'}"]) == 0  # both frameworks
    found = json.loads((tmp_path / "subsets" / "subsets.json").read_text())["runs"]
    assert [np.shape(run["dice"]["t1"]) for run in found.values()] == [(1, 1, 3)] * 2

    again = bench(*flags, f"--networks=unet,{TINY}")
    assert again.stdout.count("done before") == 2 and "| unet | JAX" in again.stdout
    other = bench(*flags, f"--networks=unet,{TINY}", "--set=augment=swin", code=1)
    assert "is another study: given" in other.stderr and other.stderr.count("\n") == 1


def test_ctrl_c_saves_and_the_same_command_goes_on(accuracy_command, records, tmp_path):
    start, options = accuracy_command
    path = tmp_path / "steps-1000000" / TINY.replace(":", ".") / "seed-0" / "metrics.jsonl"
    words = [
        *SMALL, f"--records={records}", f"--split=holdout:{CASES[3]}", f"--output={tmp_path}",
        "--seeds=0", "--budget=steps:1000000", f"--networks={TINY}",
    ]  # fmt: skip

    def steps():
        lines = path.read_text().split("\n")[:-1] if path.is_file() else []  # whole ones
        return [json.loads(line)["step"] for line in lines]

    last = 0
    for _ in range(2):
        process = subprocess.Popen(
            [*start, *words], **options, stdout=subprocess.PIPE, start_new_session=True,
            # Where the tests run in the background, Ctrl-C is ignored.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )  # fmt: skip
        limit = time.monotonic() + 120
        while max([0, *steps()]) < last + 3:
            assert process.poll() is None and time.monotonic() < limit
            time.sleep(0.1)
        os.killpg(process.pid, signal.SIGINT)  # what a terminal does
        said, _ = process.communicate(timeout=60)
        assert process.returncode == runtime.EXIT_STOPPED, said
        assert "stopped; the same command goes on" in said and "Traceback" not in said
        assert steps() == sorted(set(steps()))  # from where it was, with nothing done again
        last = steps()[-1]
    assert not (path.parent / "eval").exists()


@pytest.mark.slow  # the parts of it are tested alone, and the trainings above
def test_equal_minutes_follow_a_calibration(bench, records, tmp_path):
    flags = [
        *SMALL, f"--records={records}", f"--test_records={records}", "--seeds=1",
        f"--networks={TINY}", f"--output={tmp_path}",
    ]  # fmt: skip
    said = bench(*flags, "--budget=minutes:1", "--dry_run").stdout
    assert f"{TINY}: " in said and "1 minutes, 1 trainings of each network" in said
    assert not (tmp_path / "minutes-1").exists()
    said = bench(*flags, "--budget=minutes:0.001").stdout
    assert "**4 of the cases were trained on.**" in said  # they are the same records here
    rate = study.training_rate(tmp_path / "calibration" / TINY.replace(":", "."))
    steps = max(1, int(0.06 * rate))
    assert f"seed 1: {steps} steps" in said
    (result,) = json.loads((tmp_path / "minutes-0.001" / "summary.json").read_text())[
        "networks"
    ].values()
    assert (result["steps"], result["cases"]) == (steps, 4)


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--networks=masm,other"], "network 'other': expected one of"),
        (["--networks=masm,masm"], "--networks=masm,masm: expected names, each once"),
        (["--seeds=0,x"], "--seeds=0,x: expected whole numbers"),
        (["--budget=hours:1"], "--budget=hours:1"),
        (["--set=seed=3"], "--set seed=3: expected KEY=VALUE, and none of seed"),
        (["--set=stop_at_step=1"], "expected KEY=VALUE, and none of seed"),
        (["--set=optim.learning_rat=1"], "optim.learning_rat"),
        (["--set=patch=20"], "patch"),
        (["--set=data.spacing=9.5"], "data.spacing = 9.5"),
        (["--config=absent.py"], "--config=absent.py: no such file"),
        (["--split=9/9"], "split 9/9"),
        (["--split=0/2", "--test_records=x"], "and not both"),
        (["--test_records=/no/such/records"], "/no/such/records"),
        (["--calibration_steps=2"], "--calibration_steps: expected 6 or more"),
    ],
)
def test_an_error_is_one_line(records, tmp_path, capsys, flags, words):
    given = ["accuracy", f"--records={records}", f"--output={tmp_path}", "--networks=masm"]
    given.append("--config=configs/masm_demo.py")
    if not any(flag.startswith(("--split", "--test_records")) for flag in flags):
        given.append("--split=0/2")
    assert benchmark.main([*given, *flags]) == 1
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1
    assert not list(tmp_path.iterdir())  # another study may begin there


def test_two_do_not_work_in_one_folder(records, tmp_path, capsys):
    """The second one would find folders of runs in use, and count them as failed."""
    given = ["accuracy", f"--records={records}", f"--output={tmp_path}", "--networks=masm"]
    given += ["--config=configs/masm_demo.py", "--split=0/2", "--budget=steps:1"]
    with locks.alone(tmp_path):
        assert benchmark.main(given) == 1
    error = capsys.readouterr().err
    assert f"{tmp_path}: " in error and "wait for it, stop it, or name another folder" in error
    assert error.count("\n") == 1 and not (tmp_path / "steps-1").exists()


def test_help_can_be_formatted():
    parser = argparse.ArgumentParser()
    accuracy.add_arguments(parser)
    assert "--networks" in parser.format_help()
