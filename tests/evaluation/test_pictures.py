"""Pictures of an evaluation and of a training."""

import json
import math

import matplotlib.image
import numpy as np
import pytest

from masm_jax.evaluation import pictures


def _tumour(shape=(40, 48, 36), centre=(28, 30, 20)):
    """A brain with a tumour on the patient's right (high i), in front (high j)."""
    grid = np.ogrid[tuple(slice(n) for n in shape)]
    middle = [(n - 1) / 2 for n in shape]
    brain = sum(((g - m) / m) ** 2 for g, m in zip(grid, middle)) < 0.9
    radius = np.sqrt(sum((g - c) ** 2.0 for g, c in zip(grid, centre)))
    labels = np.select([radius < 2, radius < 4, radius < 6], [1, 3, 2], 0).astype(np.uint8)
    image = np.random.default_rng(0).normal(size=(4, *shape)) * 0.2 + labels
    return np.where(brain, image, 0).astype(np.float16), np.where(brain, labels, 0).astype(np.uint8)


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
    pictures.overlay(
        path, image, prediction, reference,
        title="case", modalities=("t1", "t1ce", "t2", "flair"), spacing=(1.0, 1.0, 2.0),
    )  # fmt: skip
    assert matplotlib.image.imread(path).shape[2] == 4
    assert list(tmp_path.iterdir()) == [path]


def test_overlay_of_other_modalities_and_regions(tmp_path):
    image, labels = _tumour()
    pictures.overlay(
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
    assert pictures.centre(other, labels | other, brain, regions) == (28, 30, 20)
    assert pictures.centre(labels, labels * 0, brain, regions) == (28, 30, 20)
    brain[:] = False
    brain[10:13, 10:13, 5:8] = True
    assert pictures.centre(labels * 0, None, brain, regions) == (11, 11, 6)


def test_planes_are_shown_as_a_radiologist_looks():
    volume = np.zeros((5, 6, 7))
    volume[4, 5, 6] = 1  # the patient's right, front, top
    for name, (normal, _, letters) in pictures.PLANES.items():
        shown = pictures._cut(volume, normal, volume.shape[normal] - 1)
        row, column = np.argwhere(shown)[0]
        # origin="lower": the last row is on top; the letters say what is left and what is on top.
        assert (row, column) == (shown.shape[0] - 1, 0), name
        assert letters[0] == {"axial": "R", "coronal": "R", "sagittal": "A"}[name]
        assert letters[2] == {"axial": "A", "coronal": "S", "sagittal": "S"}[name]


def test_the_picture_shows_the_patients_right_on_the_left(tmp_path):
    image, labels = _tumour()
    path = tmp_path / "case.png"
    pictures.overlay(path, image, labels, None, title="", modalities=("t1ce",))
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
    series = pictures._read_series(log)
    assert series["train/loss"] == {10: 0.9, 20: 0.7}  # a resumed run: the later line counts
    assert "volume/dice/WT" not in series
    pictures.curves(tmp_path / "curves.png", log)
    assert (tmp_path / "curves.png").stat().st_size > 10_000


def test_curves_of_a_run_that_logged_nothing(tmp_path):
    with pytest.raises(ValueError, match="absent"):
        pictures.curves(tmp_path / "curves.png", tmp_path / "metrics.jsonl")
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(ValueError, match="no metrics"):
        pictures.curves(tmp_path / "curves.png", tmp_path / "metrics.jsonl")
