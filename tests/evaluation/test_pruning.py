"""What the mixers keep, as maps over the scan."""

import csv

import matplotlib.image
import numpy as np

from masm_jax.evaluation import pictures


def test_the_table_and_the_picture_of_what_was_pruned(tmp_path):
    """One level, two modalities: all kept in the one; in the other the lesion pruned by a half."""
    image = np.random.default_rng(0).normal(size=(2, 16, 16, 16)).astype(np.float16)
    image[:, :2] = 0  # outside the brain
    labels = np.zeros((16, 16, 16), np.uint8)
    labels[8:12, 8:12, 8:12] = 3
    flair = np.where(labels > 0, 0.5, 1.0)
    kept = {("level1", "t1"): np.ones(labels.shape), ("level1", "flair"): flair}
    path = tmp_path / "figures" / "pruning.png"
    pictures.pruning(path, image, kept, labels, title="a", modalities=("t1", "flair"))
    with open(path.with_suffix(".csv")) as file:
        rows = {row["modality"]: row for row in csv.DictReader(file)}
    assert float(rows["t1"]["kept_in_brain"]) == float(rows["t1"]["kept_in_tumour"]) == 1
    assert float(rows["flair"]["kept_in_tumour"]) == 0.5
    brain = (image != 0).any(0).sum()
    assert float(rows["flair"]["kept_in_brain"]) == np.round(1 - 0.5 * 64 / brain, 4)
    drawn = matplotlib.image.imread(path)[..., :3]
    coloured = np.ptp(drawn, axis=-1) > 0.2
    left, right = np.array_split(coloured, 2, axis=1)
    assert right.sum() > 2 * left.sum()  # the outlines alone against the shade
