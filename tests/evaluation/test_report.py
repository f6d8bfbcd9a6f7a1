"""Tables, summaries and pictures of an evaluation."""

import csv
import json
import math

import matplotlib.image
import numpy as np
import pytest

from masm_jax.evaluation import report
from masm_jax.evaluation.metrics import evaluate

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


def _tumour(shape=(40, 48, 36), centre=(28, 30, 20)):
    """A brain with a tumour on the patient's right (high i), in front (high j)."""
    grid = np.ogrid[tuple(slice(n) for n in shape)]
    middle = [(n - 1) / 2 for n in shape]
    brain = sum(((g - m) / m) ** 2 for g, m in zip(grid, middle)) < 0.9
    radius = np.sqrt(sum((g - c) ** 2.0 for g, c in zip(grid, centre)))
    labels = np.select([radius < 2, radius < 4, radius < 6], [1, 3, 2], 0).astype(np.uint8)
    image = np.random.default_rng(0).normal(size=(4, *shape)) * 0.2 + labels
    return np.where(brain, image, 0).astype(np.float16), np.where(brain, labels, 0).astype(np.uint8)


def test_metrics_csv_round_trip(tmp_path):
    labels = np.random.default_rng(1).integers(0, 4, (2, 6, 6, 6))
    rows = [
        {"case": "x", "region": region, **scores}
        for region, scores in evaluate(*labels, (1.0, 1.0, 1.0)).items()
    ]
    rows[1]["lesions"] = 2
    rows[2]["dice"] = math.nan
    report.write_metrics_csv(tmp_path / "out" / "metrics.csv", rows)
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
    summary = report.summarise(ROWS)
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
    region = report.summarise(rows)["regions"]["WT"]
    assert region["n"] == 3
    assert region["dice"] == {"mean": 0.5, "sd": None, "median": 0.5, "n": 1}


def test_summary_json_is_strict(tmp_path):
    summary = report.summarise(ROWS) | {
        "extra": [np.float32(0.5), np.float64("nan"), math.inf, np.int64(3), np.arange(2), (1,)]
    }
    report.write_summary_json(tmp_path / "summary.json", summary)
    read = _strict((tmp_path / "summary.json").read_text())
    assert read["extra"] == [0.5, None, None, 3, [0, 1], [1]]
    assert read["regions"] == report.summarise(ROWS)["regions"]


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "summary.json"
    report.write_summary_json(path, {"a": 1})
    with pytest.raises(TypeError):
        report.write_summary_json(path, {"a": object()})
    with pytest.raises(RuntimeError), report.replacing(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert _strict(path.read_text()) == {"a": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_table_for_the_terminal():
    text = report.format_table(report.summarise(ROWS))
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
    lines = report.format_table(report.summarise(rows)).splitlines()
    place = lines.index("lesion-wise, brats2025:")
    assert lines[place + 1] == (
        "  ET  Dice 0.600  HD95 4.0 mm  NSD 0.250  F1 0.400  found 2, missed 4, false 4"
    )
    assert "lesion-wise, brats2023:" not in lines


def test_table_of_no_rows_and_of_volumes_only():
    assert "region" in report.format_table(report.summarise([]))
    rows = [{"case": "a", "region": "WT", "volume_ml": 3.0}]
    assert report.format_table(report.summarise(rows)).splitlines()[2].split()[:3] == [
        "WT", "1", "-"]  # fmt: skip


@pytest.mark.parametrize("kind", ["both", "no reference", "no tumour", "nothing", "border"])
def test_overlay_is_a_picture(tmp_path, kind):
    image, labels = _tumour()
    prediction, reference = np.roll(labels, 2, 0), labels
    if kind == "no reference":
        reference = None
    if kind == "no tumour":
        prediction = reference = np.zeros_like(labels)
    if kind == "nothing":
        image, prediction, reference = image * 0, labels * 0, None
    if kind == "border":
        prediction = np.full_like(labels, 3)
    path = tmp_path / "case.png"
    report.overlay(
        path, image, prediction, reference,
        title="case", modalities=("t1", "t1ce", "t2", "flair"), spacing=(1.0, 1.0, 2.0),
    )  # fmt: skip
    assert matplotlib.image.imread(path).shape[2] == 4
    assert list(tmp_path.iterdir()) == [path]


def test_overlay_of_other_modalities_and_regions(tmp_path):
    image, labels = _tumour()
    report.overlay(
        tmp_path / "case.png", image[:1], (labels > 0).astype(np.uint8), None,
        title="lesion", modalities=("dwi",), regions={"lesion": (1,)},
    )  # fmt: skip
    assert (tmp_path / "case.png").stat().st_size > 10_000


def test_slices_go_through_the_largest_lesion_of_the_reference():
    _, labels = _tumour()
    brain = np.ones(labels.shape, bool)
    other = np.zeros_like(labels)
    other[3:5, 3:5, 3:5] = 2
    regions = {"WT": (1, 2, 3)}
    assert report._centre(other, labels | other, brain, regions) == (28, 30, 20)
    assert report._centre(labels, labels * 0, brain, regions) == (28, 30, 20)
    brain[:] = False
    brain[10:13, 10:13, 5:8] = True
    assert report._centre(labels * 0, None, brain, regions) == (11, 11, 6)


def test_planes_are_shown_as_a_radiologist_looks():
    volume = np.zeros((5, 6, 7))
    volume[4, 5, 6] = 1  # the patient's right, front, top
    for name, (normal, _, letters) in report.PLANES.items():
        shown = report._cut(volume, normal, volume.shape[normal] - 1)
        row, column = np.argwhere(shown)[0]
        # origin="lower": the last row is on top; the letters say what is left and what is on top.
        assert (row, column) == (shown.shape[0] - 1, 0), name
        assert letters[0] == {"axial": "R", "coronal": "R", "sagittal": "A"}[name]
        assert letters[2] == {"axial": "A", "coronal": "S", "sagittal": "S"}[name]


def test_the_picture_shows_the_patients_right_on_the_left(tmp_path):
    image, labels = _tumour()
    path = tmp_path / "case.png"
    report.overlay(path, image, labels, None, title="", modalities=("t1ce",))
    pixels = matplotlib.image.imread(path)[..., :3]
    panel = pixels[: int(pixels.shape[0] * 0.8), : pixels.shape[1] // 3]  # axial, no legend
    blue = (np.abs(panel - np.array([0, 0.6, 1])) < 0.2).all(-1)  # WT prediction
    grey = (np.ptp(panel, axis=-1) < 0.02) & (panel.max(-1) > 0.1)
    assert blue.sum() > 20
    (blue_y, blue_x), (grey_y, grey_x) = (np.argwhere(m).mean(0) for m in (blue, grey))
    assert blue_x < grey_x - 10  # right of the patient: left
    assert blue_y < grey_y - 10  # anterior: up


def test_curves(tmp_path):
    lines = [
        {"step": 10, "train/loss": 0.9, "train/keep/level1": 0.8, "train/learning_rate": 1e-3},
        {"step": 20, "train/loss": math.nan, "val/dice/WT": 0.4, "time/steps_per_s": 3.0},
        {"step": 20, "train/loss": 0.7, "volume/dice/WT": None},
    ]
    log = tmp_path / "metrics.jsonl"
    log.write_text("\n".join(json.dumps(line) for line in lines) + '\n{"step": 30, "tr')
    series = report._read_series(log)
    assert series["train/loss"] == {10: 0.9, 20: 0.7}  # a resumed run: the later line counts
    assert "volume/dice/WT" not in series
    report.curves(tmp_path / "curves.png", log)
    assert (tmp_path / "curves.png").stat().st_size > 10_000


def test_curves_of_a_run_that_logged_nothing(tmp_path):
    with pytest.raises(ValueError, match="absent"):
        report.curves(tmp_path / "curves.png", tmp_path / "metrics.jsonl")
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(ValueError, match="no metrics"):
        report.curves(tmp_path / "curves.png", tmp_path / "metrics.jsonl")
