"""Failure signatures: distances by SciPy and by hand, words by made numbers, the page escaped."""

import math

import numpy as np
import pytest
from scipy import ndimage

from masm_jax.evaluation import diagnosis_page, findings
from masm_jax.evaluation.findings import FINE, LOOK, WRONG


def ball(radius, size=25):
    grid = np.indices((size,) * 3) - size // 2
    return (grid**2).sum(0) <= radius**2


def test_an_eroded_ball_misses_its_first_shell_alone():
    reference = ball(9)
    prediction = ndimage.binary_erosion(reference)
    table = findings.shells(prediction, reference, (1.0, 1.0, 1.0))
    rim = (reference & ~prediction).sum()
    assert table["up to 1"]["missed"] == table["up to 1"]["inside"] == rim
    assert all(row["missed"] == 0 for name, row in table.items() if name != "up to 1")
    assert all(row["false"] == 0 for row in table.values())
    assert sum(row["inside"] + row["outside"] for row in table.values()) == reference.size


def test_shells_are_in_voxels_of_the_finest_edge():
    """Slabs: along an axis of 2 mm voxels the second layer is 4 mm = 4 fine voxels away."""
    reference = np.zeros((10, 6, 6), bool)
    reference[:5] = True
    table = findings.shells(np.zeros_like(reference), reference, (2.0, 1.0, 1.0))
    assert [row["inside"] for row in table.values()] == [0, 36, 36, 72, 36]  # 2, 4, 6 and 8, 10 mm
    assert findings.added([table, table])["up to 2"] == {
        "missed": 72, "inside": 72, "false": 0, "outside": 72,
    }  # fmt: skip


def test_parts_of_the_reference_by_volume():
    reference = np.zeros((10, 10, 10), bool)
    reference[1:4, 1:4, 1:4] = True  # 27 voxels
    reference[7, 7, 7] = reference[8, 8, 8] = True  # touch by a corner: one part
    prediction = np.zeros_like(reference)
    prediction[2, 2, 2] = True
    assert findings.parts(prediction, reference, 0.1) == [
        (pytest.approx(2.7), True), (pytest.approx(0.2), False),
    ]  # fmt: skip


def test_masks_that_prune_the_tumour_are_called_too_aggressive():
    kept = {
        "level1/t1": {"all": 0.3, "brain": 0.2, "tumour": 0.1},
        "level1/t2": {"all": 0.9, "brain": 0.9, "tumour": 0.9},
        "level2/t1": {"all": 1.0, "brain": 1.0, "tumour": 1.0},
        "level3/t1": {"all": 0.9, "brain": 0.9, "tumour": 0.4},
    }
    found = findings.masks(kept, {"level1": 0.55, "level2": 0.5, "level3": 0.5}, 0.5, 0.7)
    assert [finding.level for finding in found] == [WRONG, FINE, LOOK]
    seen = "least of the tumour in t1: 10%; with all of it kept the mean Dice changes by +0.050"
    assert seen in found[0].seen
    assert "loss.keep_target" in found[0].advice and not found[1].advice
    assert "nothing is pruned here" in found[1].seen


def test_a_lost_rim_is_not_lost_parts():
    row = {"missed": 0, "inside": 100, "false": 0, "outside": 100}
    rim = {"up to 1": row | {"missed": 60}, "up to 2": row, "up to 4": row, "beyond 4": row}
    whole = {"up to 1": row, "up to 2": row, "up to 4": row | {"missed": 60}, "beyond 4": row}
    small = [(0.2, False), (0.5, False), (5.0, True)]
    found = findings.detail({"WT": rim, "TC": whole, "ET": dict.fromkeys(rim, row)}, {"WT": small})
    assert [finding.level for finding in found] == [LOOK, LOOK, LOOK, FINE]
    assert found[0].seen.endswith("the rim is lost")
    assert "of 2 parts below 1 ml 0 are touched, of 1 larger ones 1" in found[1].seen
    assert "100% of what is missed lies deeper" in found[2].seen
    (none,) = findings.detail({"ET": dict.fromkeys(rim, row | {"missed": 100})}, {})
    assert none.level == LOOK and none.seen.endswith("next to nothing of it is found")
    assert "model.detail" not in none.advice


def test_skips_that_harm_help_or_do_nothing():
    found = findings.skips({"level1": 0.4, "level2": 0.7, "level3": 0.601}, 0.6)
    assert [finding.level for finding in found] == [FINE, WRONG, LOOK]


def line(step, loss, **more):
    return {"step": step, "train/loss": loss} | more


@pytest.mark.parametrize(
    ("log", "levels"),
    [
        ([line(i, 1 / i) for i in range(1, 11)], [FINE]),
        ([line(i, 1.0) for i in range(1, 11)], [WRONG]),
        ([line(1, 1.0), line(2, math.nan)], [WRONG]),
        ([line(i, 1 / i, **{"train/grad_norm": 13.0}) for i in range(1, 11)], [FINE, LOOK]),
        ([line(i, 1 / i, **{"val/dice": d}) for i, d in enumerate((0.2, 0.8, 0.6, 0.6, 0.6), 1)],
         [FINE, LOOK]),
        ([line(1, 1.0)], [LOOK]),
        ([], [LOOK]),
    ],
)  # fmt: skip
def test_signs_in_the_log(log, levels):
    assert [finding.level for finding in findings.training(log, clip=12.0)] == levels


def test_what_was_left_empty_is_counted():
    (one,) = findings.empties({"WT": 0, "ET": 2}, {"WT": 4, "ET": 3})
    assert one.level == LOOK and one.seen == "ET: nothing found in 2 of 3 cases that have it"
    assert findings.empties({"WT": 0}, {"WT": 4})[0].level == FINE


def test_the_page_is_whole_and_escapes_names(tmp_path):
    table = findings.shells(ball(5), ball(6), (1, 1, 1))
    found = {
        "run": "<script>alert(1)</script>", "step": 3, "cases": ["a&b"], "dice": {"WT": 0.5},
        "mean": 0.5, "kept": {"level1/t1": {"all": 1.0, "brain": 0.5, "tumour": 0.25}},
        "masks_off": {"level1": 0.6}, "skips_off": {"level2": 0.25}, "shells": {"WT": table},
        "findings": [{"signature": "x", "level": WRONG, "seen": "<b>", "advice": ""}],
    }  # fmt: skip
    log = [line(1, 1.0, **{"train/keep/level1": 0.9}), line(2, 0.5, **{"train/keep/level1": 0.8})]
    diagnosis_page.write(tmp_path / "page.html", found, log)
    page = (tmp_path / "page.html").read_text()
    assert "<script" not in page and "&lt;script&gt;" in page and "&lt;b&gt;" in page
    assert "a&amp;b" in page and "<td>25.0%</td>" in page and "<td>-0.250</td>" in page
    assert page.count("data:image/png;base64,") == 2 and page.rstrip().endswith("</html>")
