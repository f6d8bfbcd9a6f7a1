"""The table over all subsets of the modalities: numbers by hand."""

import json
import shutil
import types

import numpy as np
import pytest

from configs import masm_demo
from masm_jax import run_config, subsets
from masm_jax.data import records as records_lib
from tests.faults import runs as fault_runs


def of(*scores):
    """A run's entry: one training each with these Dice of two cases, one region, two subsets."""
    workdirs = [f"/sweep/row/seed-{number}" for number in range(len(scores))]
    dice = {"t1+t2": [[[a], [b]] for a, b in scores], "t1": [[[a / 2], [b / 2]] for a, b in scores]}
    return {"workdirs": workdirs, "trained_for_it": True, "trained_on": [], "dice": dice}


def test_every_subset_once_the_whole_first():
    assert subsets.subsets("ab") == [("a", "b"), ("a",), ("b",)]
    assert len(subsets.subsets(("t1", "t1ce", "t2", "flair"))) == 15


def test_seeds_are_averaged_and_paired():
    runs = {"out/a": of((0.8, 0.6), (0.6, 0.4)), "out/b": of((0.4, 0.2), (0.4, 0.2))}
    runs["out/b"]["trained_for_it"] = False
    found = {"cases": ["x", "y"], "modalities": ["t1", "t2"], "regions": ["WT"], "runs": runs}
    found["differences"], found["without"] = subsets.differences(runs), {"WT": ["y"]}
    row = found["differences"]["out/b"]
    # Means over the two subsets are 3/4 of the Dice: 0.4 and 0.2 apart in the two seeds.
    assert row["difference"] == pytest.approx(0.75 * 0.3)
    assert (row["seeds"], row["cases"]) == (2, 2)
    np.testing.assert_allclose((row["low"], row["high"]), (0.75 * 0.2, 0.75 * 0.4))
    lines = subsets.table(found)
    assert lines[2] == "| t1 | t2 | a WT | a mean | b WT | b mean |"
    assert lines[4] == "| ● | ● | 0.600 | 0.600 | 0.300 | 0.300 |"
    assert lines[6] == "| mean |  | 0.450 | 0.450 | 0.225 | 0.225 |"
    said = "a minus b, over all subsets: +0.225 [+0.150, +0.300], 95 % over cases and 2 seeds."
    empty = "Cases without WT count 1 or 0; left empty: a 0 of 4, b 0 of 4."
    empty += " Dice of those with it: a 0.525, b 0.300."  # x alone, subsets and seeds
    assert lines[7:] == ["", said, empty, "Never lost a modality in training: b."]


def test_which_cases_lack_a_region():
    labels = {"x": np.array([0, 2]), "y": np.array([0, 1, 3])}
    records = types.SimpleNamespace(label=labels.get, regions={"WT": (1, 2, 3), "ET": (3,)})
    assert subsets._without(records, ["x", "y"]) == {"WT": [], "ET": ["x"]}


def test_one_training_each_is_paired_whatever_it_is_called():
    one, other = of((0.8, 0.6)), of((0.4, 0.2))
    other["workdirs"] = ["/somewhere/unet"]
    row = subsets.differences({"a": one, "b": other})["b"]
    assert row["difference"] == pytest.approx(0.3) and row["seeds"] == 1


def test_other_seeds_are_not_paired():
    one, other = of((0.8, 0.6), (0.8, 0.6)), of((0.4, 0.2), (0.4, 0.2))
    other["workdirs"] = ["/sweep/row/seed-7", "/sweep/row/seed-8"]
    assert not subsets.differences({"a": one, "b": other})


def test_a_row_of_a_sweep_is_its_seeds(tmp_path):
    for number in (0, 2, 10):
        (tmp_path / f"seed-{number}").mkdir()
        (tmp_path / f"seed-{number}" / "config.json").touch()
    (tmp_path / "seed-3").mkdir()  # not begun
    found = [path.name for path in subsets.runs(tmp_path)]
    assert found == ["seed-0", "seed-2", "seed-10"]
    assert subsets.runs(tmp_path / "seed-2") == [tmp_path / "seed-2"]
    assert subsets.runs(tmp_path / "absent") == [tmp_path / "absent"]


def test_folds_are_not_taken_for_seeds(tmp_path):
    (tmp_path / "seed-0" / "fold-1").mkdir(parents=True)
    (tmp_path / "seed-0" / "fold-1" / "config.json").touch()
    with pytest.raises(ValueError, match="runs are of several folds.* such as .*fold-1"):
        subsets.runs(tmp_path)


def test_names_are_as_short_as_tells_them_apart():
    def name(*runs):
        return list(subsets._names(dict.fromkeys(runs)).values())

    assert name("runs/masm", "runs/unet") == ["masm", "unet"]
    assert name("a/masm/seed-0", "a/unet/seed-0") == ["masm/seed-0", "unet/seed-0"]
    assert name("runs/masm") == ["masm"]


# ---------------------------------------------------------------- the command


@pytest.fixture
def measured(tmp_path, monkeypatch):
    """measured(*flags) -> exit code, with two runs on "First", each with its own records."""
    fault_runs.make(tmp_path)
    shutil.copytree(tmp_path / "records", tmp_path / "other_records")
    shutil.copytree(tmp_path / "run", tmp_path / "other")
    for run, records in (("run", "records"), ("other", "other_records")):
        config = masm_demo.get_config()
        config.data.records = str(tmp_path / records)
        run_config.save(config, tmp_path / run)
    monkeypatch.setattr(subsets, "load_run", fault_runs.load_run)

    def run(*flags):
        places = [f"--workdir={tmp_path / 'run'}", f"--output={tmp_path / 'out'}"]
        return subsets.main([*places, *flags])

    return run


def test_cases_that_were_trained_on_are_said(measured, tmp_path, capsys):
    assert measured("--split=all") == 0
    assert f"{tmp_path / 'run'}: 1 of 2 cases were trained on" in capsys.readouterr().err
    found = json.loads((tmp_path / "out" / "subsets.json").read_text())
    assert found["runs"][str(tmp_path / "run")]["trained_on"] == ["First"]
    said = (tmp_path / "out" / "subsets.md").read_text()
    assert said.endswith("Trained on some of these cases, which flatters: run (1).\n")
    assert measured("--split=val") == 0
    assert "trained on" not in capsys.readouterr().err.lower()


def test_a_case_that_fails_is_left_out_and_said(measured, tmp_path, monkeypatch, capsys):
    real = records_lib.Records.image

    def image(self, case):
        if case == "First":
            raise OSError("First: its file is gone")
        return real(self, case)

    monkeypatch.setattr(records_lib.Records, "image", image)
    assert measured("--split=all") == 3
    assert "failed: First: First: its file is gone" in capsys.readouterr().err
    found = json.loads((tmp_path / "out" / "subsets.json").read_text())
    assert found["cases"] == ["Second"]
    dice = found["runs"][str(tmp_path / "run")]["dice"]
    assert {np.shape(scores) for scores in dice.values()} == {(1, 1, len(found["regions"]))}
    assert measured("--split=all", "--cases=1") == 1
    assert "no case could be segmented with every run" in capsys.readouterr().err


def test_a_negative_number_of_cases_is_refused(measured, capsys):
    assert measured("--split=all", "--cases=-1") == 1
    assert "--cases=-1: expected a number of them" in capsys.readouterr().err


def test_runs_on_other_records_need_to_be_told_on_which(measured, tmp_path, capsys):
    other = f"--workdir={tmp_path / 'other'}"
    assert measured(other) == 1
    said = capsys.readouterr().err
    assert f"{tmp_path / 'other'} was trained on the records {tmp_path / 'other_records'}" in said
    assert "name those to compare on by --records" in said
    assert measured(other, f"--records={tmp_path / 'records'}") == 0


def test_an_output_that_is_a_file_is_said_before_anything_is_measured(
    measured, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(subsets, "load_run", lambda workdir: pytest.fail("loaded"))
    (tmp_path / "out").write_text("")
    assert measured() == 1
    assert f"{tmp_path / 'out'} is a file; name a folder" in capsys.readouterr().err
