"""The table over all subsets of the modalities: numbers by hand."""

import numpy as np
import pytest

from masm_jax import subsets


def of(*scores):
    """A run's entry: one training each with these Dice of two cases, one region, two subsets."""
    workdirs = [f"/sweep/row/seed-{number}" for number in range(len(scores))]
    dice = {"t1+t2": [[[a], [b]] for a, b in scores], "t1": [[[a / 2], [b / 2]] for a, b in scores]}
    return {"workdirs": workdirs, "trained_for_it": True, "dice": dice}


def test_every_subset_once_the_whole_first():
    assert subsets.subsets("ab") == [("a", "b"), ("a",), ("b",)]
    assert len(subsets.subsets(("t1", "t1ce", "t2", "flair"))) == 15


def test_seeds_are_averaged_and_paired():
    runs = {"out/a": of((0.8, 0.6), (0.6, 0.4)), "out/b": of((0.4, 0.2), (0.4, 0.2))}
    runs["out/b"]["trained_for_it"] = False
    found = {"cases": ["x", "y"], "modalities": ["t1", "t2"], "regions": ["WT"], "runs": runs}
    found["differences"] = subsets.differences(runs)
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
    assert lines[7:] == ["", said, "Never lost a modality in training: b."]


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


def test_names_are_as_short_as_tells_them_apart():
    def name(*runs):
        return list(subsets._names(dict.fromkeys(runs)).values())

    assert name("runs/masm", "runs/unet") == ["masm", "unet"]
    assert name("a/masm/seed-0", "a/unet/seed-0") == ["masm/seed-0", "unet/seed-0"]
    assert name("runs/masm") == ["masm"]
