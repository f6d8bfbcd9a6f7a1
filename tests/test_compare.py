"""Paired comparison of two evaluations: numbers by hand, the command, its errors."""

import csv
import json

import numpy as np
import pytest

from masm_jax import compare


def evaluation(folder, dice, hd95=None):
    """metrics.csv with one region; the cases are c0, c1, ..."""
    folder.mkdir(parents=True)
    with open(folder / "metrics.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["case", "region", "dice", "hd95", "empty"])
        for index, value in enumerate(dice):
            writer.writerow([f"c{index}", "WT", value, "" if hd95 is None else hd95[index], "no"])
    return folder


def test_differences_by_hand(tmp_path):
    a = compare.read(evaluation(tmp_path / "a", [0.5, 0.6, 0.7], [9, 8, 7]))
    b = compare.read(evaluation(tmp_path / "run" / "eval", [0.6, 0.6, 0.9], [5, 9, 7]).parent)
    dice, hd95 = compare.compare(a, b, ["dice", "hd95"])
    assert (dice["n"], dice["better"], dice["worse"]) == (3, 2, 0)
    assert (dice["mean_a"], dice["mean_b"]) == pytest.approx((0.6, 0.7))
    assert dice["difference"] == pytest.approx(0.1)
    # 27 resamples of (0.1, 0, 0.2) are equally likely: 1/27 have mean 0, as many 0.2.
    assert dice["low"] == pytest.approx(0.0, abs=1e-9)
    assert dice["high"] == pytest.approx(0.2)
    assert hd95["difference"] == pytest.approx(-1.0)
    assert (hd95["better"], hd95["worse"]) == (1, 1)  # lower is better


def test_interval_covers_the_mean_of_many_cases_and_narrows(tmp_path):
    rng = np.random.default_rng(0)
    base = rng.uniform(0.5, 0.9, 400)
    gain = rng.normal(0.02, 0.05, 400)
    a = compare.read(evaluation(tmp_path / "a", base))
    b = compare.read(evaluation(tmp_path / "b", base + gain))
    (row,) = compare.compare(a, b, ["dice"])
    half = 1.96 * gain.std(ddof=1) / 20  # the normal approximation
    assert row["low"] == pytest.approx(gain.mean() - half, abs=half / 4)
    assert row["high"] == pytest.approx(gain.mean() + half, abs=half / 4)
    assert row["p"] < 1e-6


def test_the_sign_test_of_ranks_is_exact_for_six_equal_signs(tmp_path):
    """All 2^6 signs of six ranks are equally likely: two of them are as extreme."""
    a = compare.read(evaluation(tmp_path / "a", [0.1, 0.2, 0.3, 0.4, 0.5, 0.6]))
    b = compare.read(evaluation(tmp_path / "b", [0.11, 0.22, 0.33, 0.44, 0.55, 0.66]))
    (row,) = compare.compare(a, b, ["dice"])
    assert row["p"] == pytest.approx(2 / 64)


def test_equal_evaluations_have_no_p(tmp_path):
    a = compare.read(evaluation(tmp_path / "a", [0.5, 0.6]))
    (row,) = compare.compare(a, a, ["dice"])
    assert row["p"] is None and row["difference"] == 0 and (row["low"], row["high"]) == (0, 0)


def test_the_command(tmp_path, capsys):
    a = evaluation(tmp_path / "a", [0.5, 0.6, 0.7], [9, 8, 7])
    b = evaluation(tmp_path / "b", [0.6, 0.6], [5, 9])
    output = tmp_path / "out"
    assert compare.main([str(a), str(b), f"--output={output}", "--metrics=dice,hd95"]) == 0
    text = capsys.readouterr().out
    assert "WT      dice        2 " in text
    assert "1 cases are in one of the two alone" in text and "fewer than 6 cases" in text
    assert (output / "compare.png").read_bytes().startswith(b"\x89PNG")
    rows = json.loads((output / "compare.json").read_text())["rows"]
    assert [row["metric"] for row in rows] == ["dice", "hd95"] and rows[0]["n"] == 2
    with open(output / "compare.csv") as file:
        assert [row["metric"] for row in csv.DictReader(file)] == ["dice", "hd95"]


def test_cases_without_a_region_are_told_apart(tmp_path, capsys):
    """Two cases of three have ET: what the third is worth is said, and what the others have."""
    for name, dice in (("a", (0.8, 0.6, 0.0)), ("b", (0.7, 0.6, 1.0))):
        (tmp_path / name).mkdir()
        rows = [f"c{i},ET,{value},{(5, 9, 0)[i]}" for i, value in enumerate(dice)]
        rows += [f"c{i},WT,0.9,30" for i in range(3)]
        lines = "\n".join(["case,region,dice,reference_ml", *rows])
        (tmp_path / name / "metrics.csv").write_text(lines + "\n")
    a, b = (compare.read(tmp_path / name) for name in "ab")
    assert compare.absent([a]) == {"ET": {"scored": 1, "left_empty": 0, "dice": 0.7}}
    assert compare.absent([a, b])["ET"] == {
        "scored": 2, "left_empty": 1, "dice": pytest.approx(0.675)
    }  # fmt: skip
    assert compare.absent([{("x", "ET"): {"dice": 1.0, "reference_ml": 0.0}}])["ET"]["dice"] is None
    words = [str(tmp_path / "a"), str(tmp_path / "b"), f"--output={tmp_path / 'out'}"]
    assert compare.main([*words, "--metrics=dice"]) == 0
    said = "Cases without ET count 1 or 0; left empty: A 0 of 1, B 1 of 1. Dice of those with it: "
    assert f"\n{said}A 0.700, B 0.650.\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("first", "metrics", "words"),
    [
        ("absent", "dice", "no metrics.csv"),
        ("a", "dise", "no case has dise in both; the first has dice, the second dice"),
        ("a", "", "--metrics=: expected columns"),
    ],
)
def test_errors_are_one_line(tmp_path, capsys, first, metrics, words):
    evaluation(tmp_path / "a", [0.5])
    arguments = [str(tmp_path / first), str(tmp_path / "a"), f"--output={tmp_path / 'out'}"]
    assert compare.main([*arguments, f"--metrics={metrics}"]) == 1
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_table_that_is_cut_short_is_one_line(tmp_path, capsys):
    evaluation(tmp_path / "a", [0.5, 0.6])
    evaluation(tmp_path / "b", [0.5, 0.6])
    with open(tmp_path / "b" / "metrics.csv", "a") as file:
        file.write("c2")
    words = [str(tmp_path / "a"), str(tmp_path / "b"), f"--output={tmp_path / 'out'}"]
    assert compare.main(words) == 1
    error = capsys.readouterr().err
    assert f"{tmp_path / 'b' / 'metrics.csv'}: row 3 has no case or no region" in error
    assert error.count("\n") == 1


def test_an_output_that_cannot_be_written_is_one_line(tmp_path, capsys):
    for name in ("a", "b"):
        evaluation(tmp_path / name, [0.5, 0.6])
    (tmp_path / "file").touch()
    words = [str(tmp_path / "a"), str(tmp_path / "b"), f"--output={tmp_path / 'file'}"]
    assert compare.main(words) == 1
    assert capsys.readouterr().err.endswith("file is a file; name a folder\n")


def test_regions_of_one_alone_are_named(tmp_path, capsys):
    for name, regions in (("a", ("WT", "ET")), ("b", ("WT", "TC"))):
        (tmp_path / name).mkdir()
        rows = [f"{case},{region},0.{case}" for case in (5, 6) for region in regions]
        lines = "\n".join(["case,region,dice", *rows])
        (tmp_path / name / "metrics.csv").write_text(lines + "\n")
    words = [str(tmp_path / "a"), str(tmp_path / "b"), f"--output={tmp_path / 'out'}"]
    assert compare.main([*words, "--metrics=dice"]) == 0
    assert "in one of the two alone, left out: ET, TC" in capsys.readouterr().out


def test_no_case_in_common(tmp_path):
    a = compare.read(evaluation(tmp_path / "a", [0.5]))
    with pytest.raises(ValueError, match="share no case: the first has c0, the second x"):
        compare.compare(a, {("x", "WT"): {"dice": 1.0}}, ["dice"])
