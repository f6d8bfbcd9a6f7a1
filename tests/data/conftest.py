"""Small synthetic cases with the names and labels of the real sets."""

import pathlib

import nibabel as nib
import numpy as np
import pytest

SHAPE = (12, 14, 10)
LPS = np.array([[-1.0, 0, 0, 0], [0, -1.0, 0, 239], [0, 0, 1.0, 0], [0, 0, 0, 1]])
UNDERSCORE = ("_t1", "_t1ce", "_t2", "_flair", "_seg")
DASH = ("-t1n", "-t1c", "-t2w", "-t2f", "-seg")


def write(path, array, affine=LPS, dtype=None):
    """Writes a NIfTI file with scanner units and codes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = nib.Nifti1Image(np.asarray(array, dtype), affine)
    image.header.set_xyzt_units("mm", "sec")
    image.set_sform(affine, 1)
    image.set_qform(affine, 2)
    nib.save(image, path)
    return path


def images(seed, shape=SHAPE):
    """Four int16 images with a brain that leaves one voxel of background around, two at the end."""
    rng = np.random.default_rng(seed)
    brain = np.zeros(shape, bool)
    brain[1:-2, 1:-2, 1:-2] = True
    return [np.where(brain, rng.integers(100, 2000, shape), 0).astype(np.int16) for _ in range(4)]


def segmentation(values, shape=SHAPE):
    """Nested boxes: the first value outside, the last inside."""
    label = np.zeros(shape, np.uint8)
    for step, value in enumerate(values):
        label[2 + step : 9 - step, 2 + step : 9 - step, 2 : 8 - step] = value
    return label


@pytest.fixture
def make_case(tmp_path):
    """Writes one case: make_case(id, names, values=(2, 1, 4), seed=0, folder=..., suffix=...)."""

    def make(
        case,
        names=UNDERSCORE,
        values=(2, 1, 4),
        *,
        seed=0,
        folder="raw",
        suffix=".nii.gz",
        affine=LPS,
    ) -> pathlib.Path:
        root = tmp_path / folder / case
        for name, image in zip(names, images(seed)):
            write(root / f"{case}{name}{suffix}", image, affine)
        if values is not None:
            write(root / f"{case}{names[4]}{suffix}", segmentation(values), affine, np.uint8)
        return root

    return make
