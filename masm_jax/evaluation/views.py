"""Small copies of a case that a page can carry: one-byte images and labels, as NIfTI in text.

A view shows a case and is never measured on: the metrics come from the full grid.
"""

import base64
import gzip
import math
from collections.abc import Mapping, Sequence
from typing import Any

import nibabel as nib
import numpy as np

from masm_jax.data.preprocess import resample
from masm_jax.evaluation import pictures

STEPS_MM = (1.5, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0)
# An image takes at most this share of its voxels in bytes: a brain fills about half of its box
# (an ellipsoid pi/6), air packs to nothing, and noise of one byte does not pack at all.
PACKED = 0.6
FIXED_BYTES = 1500  # of every image: NIfTI header, names, colours

Regions = Mapping[str, Sequence[int]]
Shape = tuple[int, int, int]


def views_spacing(
    shapes: Sequence[Sequence[int]], spacing: Sequence[float], modalities: int, budget_mb: float
) -> float:
    """The finest spacing at which the views of all cases together fit into the page.

    Args:
        shapes: D, H, W of every case, in the grid of the records.
        spacing: of the records, mm.
        modalities: how many images a case has.
        budget_mb: room for all views as text, in 10^6 bytes.

    Returns:
        mm: the finest edge of the records themselves, or the first of ``STEPS_MM`` that fits. An
        axis that is coarser already stays as it is.

    Raises:
        ValueError: the views do not fit at the coarsest step either.
    """
    own = float(min(spacing))
    needed = math.inf
    for step in (own, *(s for s in STEPS_MM if s > own)):
        needed = sum(_bytes(_shape(shape, spacing, step), modalities) for shape in shapes) / 1e6
        if needed <= budget_mb:
            return step
    raise ValueError(
        f"budget_mb={budget_mb}: the views of {len(shapes)} cases need {needed:.1f} MB even at "
        f"{step:g} mm; allow that much, or put fewer cases into the page"
    )


def view(
    image: np.ndarray,
    prediction: np.ndarray,
    reference: np.ndarray | None,
    *,
    spacing: Sequence[float],
    view_spacing: float,
    modalities: Sequence[str],
    regions: Regions,
) -> dict[str, Any]:
    """What the page needs to show one case in three dimensions.

    Args:
        image: (M, D, H, W) float, RAS+, 0 outside the brain.
        prediction: (D, H, W) uint8 internal labels.
        reference: the same, or None.
        spacing: voxel edges in mm along D, H, W.
        view_spacing: mm, see ``views_spacing``; never finer than the case.
        modalities: the names of the M.
        regions: region -> internal values, outer to inner.

    Returns:
        Plain types, for JSON. "images", "prediction" and "reference" are gzipped NIfTI in base64,
        uint8, in one grid with its affine: the world is in mm along the axes of the case, 0 at the
        centre of its first voxel. "centre" is the middle of the largest lesion in that world.
    """
    image, voxel = np.asarray(image), np.asarray(spacing, float)
    brain = (image != 0).any(axis=0)
    shape = _shape(brain.shape, spacing, view_spacing)
    edges = voxel * brain.shape / shape
    affine = np.diag([*edges, 1.0])
    affine[:3, 3] = (edges - voxel) / 2  # both grids fill the same box
    centre = pictures.centre(prediction, reference, brain, regions)
    return {
        "modalities": list(modalities),
        "images": [_packed(_grey(scan, brain, shape), affine) for scan in image],
        "prediction": _packed(_nearest(prediction, shape), affine),
        "reference": None if reference is None else _packed(_nearest(reference, shape), affine),
        "centre": [round(float(c * s), 3) for c, s in zip(centre, spacing)],
        "spacing": [round(float(edge), 3) for edge in edges],
        "resampled": shape != brain.shape,
        "labels": _labels(prediction, reference, regions),
    }


def _shape(shape: Sequence[int], spacing: Sequence[float], step: float) -> Shape:
    d, h, w = (max(1, round(n * s / max(s, step))) for n, s in zip(shape, spacing))
    return d, h, w


def _bytes(shape: Sequence[int], modalities: int) -> float:
    # Two label volumes in one-byte runs are far below a fifth of an image.
    packed = math.prod(shape) * PACKED * (modalities + 0.2) + FIXED_BYTES * (modalities + 2)
    return packed * 4 / 3  # base64


def _grey(scan: np.ndarray, brain: np.ndarray, shape: Shape) -> np.ndarray:
    """uint8 of the window that the pictures have; 0 is air alone."""
    scan = np.asarray(scan, np.float32)
    low, high = np.percentile(scan[brain], pictures.WINDOW) if brain.any() else (0.0, 1.0)
    level = np.clip((scan - low) / max(high - low, 1e-6), 0, 1) * 254 + 1
    return np.rint(resample(np.where(brain, level, 0), shape)).astype(np.uint8)


def _nearest(labels: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    places = (((np.arange(n) + 0.5) * old / n).astype(int) for old, n in zip(labels.shape, shape))
    return np.asarray(labels, np.uint8)[np.ix_(*places)]


def _packed(values: np.ndarray, affine: np.ndarray) -> str:
    scan = nib.Nifti1Image(values, affine)
    scan.header.set_xyzt_units("mm")
    return base64.b64encode(gzip.compress(scan.to_bytes(), 6, mtime=0)).decode("ascii")


def _labels(
    prediction: np.ndarray, reference: np.ndarray | None, regions: Regions
) -> list[dict[str, Any]]:
    """Name and colours of every label value: that of the innermost region that holds it."""
    names, listed = list(regions), []
    for i, name in enumerate(names):
        inner = set(regions[names[i + 1]]) if i + 1 < len(names) else set()
        words = f"{name} outside {names[i + 1]}" if inner else name
        colours = pictures.COLOURS[i % len(pictures.COLOURS)]
        listed += [
            {"value": int(v), "name": words, "reference": colours[0], "prediction": colours[1]}
            for v in regions[name]
            if v not in inner
        ]
    present = {int(v) for x in (prediction, reference) if x is not None for v in np.unique(x)}
    for value in sorted(present - {0} - {label["value"] for label in listed}):
        grey = {"reference": "#dddddd", "prediction": "#999999"}
        listed.append({"value": value, "name": f"label {value}, in no region", **grey})
    return listed
