"""Tables and summaries of an evaluation."""

import csv
import json
import math

import numpy as np
import pytest

from masm_jax.evaluation import tables
from masm_jax.evaluation.metrics import evaluate
from masm_jax.files import replacing

ROWS = [
    {"case": "a", "region": "WT", "dice": 0.5, "hd95": 4.0, "precision": 1.0, "empty": "neither"},
    {"case": "a", "region": "ET", "dice": 1.0, "hd95": 0.0, "precision": 1.0, "empty": "both"},
    {"case": "b", "region": "WT", "dice": 0.8, "hd95": 2.0, "precision": 0.4, "empty": "neither"},
    {"case": "b", "region": "ET", "dice": 0.0, "hd95": 373.13, "precision": 0.0,
     "empty": "reference"},
    {"case": "c", "region": "WT", "dice": 0.9, "hd95": 1.0, "precision": 0.4, "empty": "neither"},
    {"case": "c", "region": "ET", "dice": 0.2, "hd95": 9.0, "precision": 0.2, "empty": "neither"},
]  # fmt: skip


def _strict(text):
    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    return json.loads(text, parse_constant=refuse)


@pytest.mark.parametrize("case", ["=1+1", "+a", "-a", "@a", "a=1", "'a"])
def test_no_cell_is_a_formula(tmp_path, case):
    tables.write_metrics_csv(tmp_path / "m.csv", [{"case": case, "region": "WT", "dice": -0.5}])
    with open(tmp_path / "m.csv", newline="") as file:
        _, (name, _, dice) = csv.reader(file)
    assert name[0] not in "=+-@" and name.lstrip("'") == case.lstrip("'")
    assert dice == "-0.5"  # a number stays one
    assert tables.read_csv(tmp_path / "m.csv") == [{"case": case, "region": "WT", "dice": -0.5}]


def test_metrics_csv_round_trip(tmp_path):
    labels = np.random.default_rng(1).integers(0, 4, (2, 6, 6, 6))
    rows = [
        {"case": "x", "region": region, **scores}
        for region, scores in evaluate(*labels, (1.0, 1.0, 1.0)).items()
    ]
    rows[1]["lesions"] = 2
    rows[2]["dice"] = math.nan
    tables.write_metrics_csv(tmp_path / "out" / "metrics.csv", rows)
    with open(tmp_path / "out" / "metrics.csv", newline="") as file:
        read = list(csv.DictReader(file))
    assert list(read[0])[:4] == ["case", "region", "dice", "hd95"]
    for row, line in zip(rows, read, strict=True):
        for key in set(line) - {"case", "region", "empty"}:
            if math.isfinite(row.get(key, math.nan)):
                assert float(line[key]) == row[key]
            else:
                assert line[key] == ""
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["metrics.csv"]


def test_summary_by_hand():
    summary = tables.summarise(ROWS)
    assert summary["cases"] == 3
    assert list(summary["regions"]) == ["WT", "ET"]
    whole, enhancing = summary["regions"].values()
    assert whole["n"] == 3
    assert whole["dice"] == pytest.approx(
        {"mean": 2.2 / 3, "sd": np.std([0.5, 0.8, 0.9], ddof=1), "median": 0.8, "n": 3}
    )
    assert enhancing["empty"] == {"neither": 1, "both": 1, "prediction": 0, "reference": 1}
    assert enhancing["hd95"]["mean"] == pytest.approx(382.13 / 3)
    assert summary["average"]["dice"] == pytest.approx((2.2 / 3 + 0.4) / 2)
    words = summary["conventions"]
    assert "373.13" in words["empty_rules"]["prediction"] and words["empty_policy"] == "brats"


def test_summary_says_how_many_values_a_mean_is_of():
    rows = [
        {"case": "a", "region": "WT", "dice": math.nan},
        {"case": "b", "region": "WT", "dice": 0.5},
        {"case": "c", "region": "WT", "volume_ml": 3.0},
    ]
    region = tables.summarise(rows)["regions"]["WT"]
    assert region["n"] == 3
    assert region["dice"] == {"mean": 0.5, "sd": None, "median": 0.5, "n": 1}


def test_summary_json_is_strict(tmp_path):
    summary = tables.summarise(ROWS) | {
        "extra": [np.float32(0.5), np.float64("nan"), math.inf, np.int64(3), np.arange(2), (1,)]
    }
    tables.write_summary_json(tmp_path / "summary.json", summary)
    read = _strict((tmp_path / "summary.json").read_text())
    assert read["extra"] == [0.5, None, None, 3, [0, 1], [1]]
    assert read["regions"] == tables.summarise(ROWS)["regions"]


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "summary.json"
    tables.write_summary_json(path, {"a": 1})
    with pytest.raises(TypeError):
        tables.write_summary_json(path, {"a": object()})
    with pytest.raises(RuntimeError), replacing(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert _strict(path.read_text()) == {"a": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_table_for_the_terminal():
    text = tables.format_table(tables.summarise(ROWS))
    lines = text.splitlines()
    headings = "region cases Dice HD95 mm NSD sensitivity precision"
    assert lines[0].split() == headings.split()
    assert lines[2].startswith("WT") and "0.733 +- 0.208 (0.800)" in lines[2]
    assert lines[4].startswith("average") and "0.567" in lines[4]
    assert "empty in both - rightly found empty: Dice 1, HD95 0 mm, NSD 1; cases: ET 1" in lines
    assert any("missed" in line and line.endswith("cases: none") for line in lines)
    assert any("false alarm" in line and line.endswith("cases: ET 1") for line in lines)
    assert max(map(len, lines)) <= 100


def test_lesions_are_summed_and_their_means_taken_over_the_cases_that_have_a_value():
    empty = dict.fromkeys(("dice", "hd95", "nsd", "f1")) | {"tp": 0, "fp": 0, "fn": 0}
    one = {"dice": 0.5, "hd95": 4.0, "nsd": 0.25, "f1": 0.4, "tp": 1, "fp": 2, "fn": 1}
    rows = [
        {"case": case, "region": "ET", **{f"brats2025_{k}": v for k, v in values.items()}}
        for case, values in (("a", one), ("b", one | {"dice": 0.7, "fn": 3}), ("c", empty))
    ]
    lines = tables.format_table(tables.summarise(rows)).splitlines()
    place = lines.index("lesion-wise, brats2025:")
    assert lines[place + 1] == (
        "  ET  Dice 0.600  HD95 4.0 mm  NSD 0.250  F1 0.400  found 2, missed 4, false 4"
    )
    assert "lesion-wise, brats2023:" not in lines
    lines = tables.format_table(tables.summarise(rows[2:])).splitlines()  # nothing drawn or real
    assert lines[place + 1] == "  ET  Dice -  HD95 - mm  NSD -  F1 -  found 0, missed 0, false 0"


def test_table_of_no_rows_and_of_volumes_only():
    assert "region" in tables.format_table(tables.summarise([]))
    rows = [{"case": "a", "region": "WT", "volume_ml": 3.0}]
    assert tables.format_table(tables.summarise(rows)).splitlines()[2].split()[:3] == [
        "WT", "1", "-"]  # fmt: skip
