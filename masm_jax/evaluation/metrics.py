"""Region metrics of one case as the BraTS challenge counts them, with the empty-region rules named.

What to do with a region that the prediction, the reference or both leave empty decides the mean
score of a data set more than most networks do, and libraries differ: MONAI returns NaN and drops
the case from the mean, nnU-Net skips the Dice of cases without the structure. Here ``EMPTY_RULES``
is the one place that decides, every result says under ``"empty"`` which rule it came under, and no
metric is ever NaN, so that no case can silently leave a mean.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from scipy import ndimage

from masm_jax.data.conventions import REGIONS

# The worst distance: the diagonal of the BraTS grid, 240 x 240 x 155 voxels of 1 mm.
WORST_HD95_MM = 373.13


class EmptyRule(NamedTuple):
    """What a case scores when a region is empty; None: the score is computed from the masks."""

    dice: float | None
    hd95: float | None
    words: str


# Keyed by which side is empty: the value of "empty" in every result. The policy is that of the
# BraTS challenges (Bakas et al. 2018, arXiv:1811.02629, and the organisers' evaluation code).
EMPTY_POLICY = "brats"
EMPTY_RULES = {
    "neither": EmptyRule(None, None, "both hold the region: computed from the masks"),
    "both": EmptyRule(1.0, 0.0, "rightly found empty: Dice 1, HD95 0 mm"),
    "prediction": EmptyRule(0.0, WORST_HD95_MM, f"missed: Dice 0, HD95 {WORST_HD95_MM} mm"),
    "reference": EmptyRule(0.0, WORST_HD95_MM, f"false alarm: Dice 0, HD95 {WORST_HD95_MM} mm"),
}

CONVENTIONS = {
    "dice": "2 TP / (2 TP + FP + FN) over the voxels of the whole case, not per lesion",
    "hd95": (
        "95th percentile, linearly interpolated, of the surface distances of both directions "
        "pooled, in mm (as medpy; MONAI takes the larger of the two directed percentiles)"
    ),
    "sensitivity": "TP / (TP + FN); where that is 0/0 it follows the Dice rule",
    "specificity": "TN / (TN + FP) over the whole grid, air included: always close to 1",
    "precision": "TP / (TP + FP); where that is 0/0 it follows the Dice rule",
    "volume_ml": "volume of the prediction in millilitres; reference_ml: of the reference",
    "empty_policy": EMPTY_POLICY,
    "empty_rules": {side: rule.words for side, rule in EMPTY_RULES.items()},
}

Region = dict[str, float | str]
Box = tuple[slice, ...]


def evaluate(
    prediction: np.ndarray | Mapping[str, np.ndarray],
    reference: np.ndarray | Mapping[str, np.ndarray],
    spacing: Sequence[float],
    *,
    regions: Mapping[str, Sequence[int]] | None = None,
) -> dict[str, Region]:
    """Compare a segmentation with its reference, region by region.

    Args:
        prediction: (I, J, K) integer internal labels, or a dict region -> (I, J, K) mask, bool or
            integer.
        reference: the same kind and grid.
        spacing: voxel edge lengths along I, J, K in mm.
        regions: region -> internal label values; default WT, TC, ET. With dicts of masks only its
            names are used (default: the dict's own).

    Returns:
        region -> {"dice", "hd95" (mm), "sensitivity", "specificity", "precision", "volume_ml",
        "reference_ml", "empty"}; all finite floats but "empty", a key of ``EMPTY_RULES``.

    Raises:
        ValueError: grids, regions, dtypes or the spacing do not fit.
    """
    spacing = _checked_spacing(spacing)
    if isinstance(prediction, Mapping) != isinstance(reference, Mapping):
        raise ValueError(
            "prediction and reference must be of one kind: two label arrays or two dicts of masks"
        )
    if isinstance(prediction, Mapping):
        masks = _masks_of_dicts(prediction, reference, regions)
    else:
        masks = _masks_of_labels(prediction, reference, REGIONS if regions is None else regions)
    return {name: _scores(p, r, voxels, spacing) for name, (p, r, voxels) in masks.items()}


def hd95(prediction: np.ndarray, reference: np.ndarray, spacing: Sequence[float]) -> float:
    """95th percentile Hausdorff distance of two masks of which neither is empty.

    A surface is a mask without its erosion by the six face neighbours; beyond the grid is
    background, so tumour cut by the border has a surface there. As medpy's ``hd95``
    (loli/medpy, metric/binary.py) after Huttenlocher et al. 1993, doi 10.1109/34.232073.

    Args:
        prediction: (I, J, K) bool.
        reference: (I, J, K) bool.
        spacing: voxel edge lengths in mm.

    Returns:
        The distance in mm.
    """
    # The nearest surface voxel of either mask is inside their joint box, and outside it both are
    # background just as beyond the grid: cropping is exact, and 5-50 times faster.
    box = joint_box(prediction, reference)
    p, r = _surface(prediction[box]), _surface(reference[box])
    to_reference = ndimage.distance_transform_edt(~r, sampling=spacing)[p]
    to_prediction = ndimage.distance_transform_edt(~p, sampling=spacing)[r]
    return float(np.percentile(np.concatenate([to_reference, to_prediction]), 95))


def joint_box(a: np.ndarray, b: np.ndarray) -> Box:
    """Smallest box (one slice per axis) that holds every non-zero voxel of two arrays of one grid.

    Args:
        a: (I, J, K), any dtype.
        b: (I, J, K).

    Returns:
        Three slices; all empty when both arrays are.
    """
    first = np.asarray(a, bool) | np.asarray(b, bool)
    box = []
    for axis in range(first.ndim):
        others = tuple(i for i in range(first.ndim) if i != axis)
        used = np.flatnonzero(first.any(axis=others))
        box.append(slice(int(used[0]), int(used[-1]) + 1) if used.size else slice(0, 0))
    return tuple(box)


def _surface(mask: np.ndarray) -> np.ndarray:
    return mask & ~ndimage.binary_erosion(mask)  # default structure: six face neighbours


def _scores(
    prediction: np.ndarray, reference: np.ndarray, voxels: int, spacing: tuple[float, ...]
) -> Region:
    """Scores of one region: two bool masks cut from a grid of `voxels` voxels, the rest empty."""
    predicted = int(np.count_nonzero(prediction))
    actual = int(np.count_nonzero(reference))
    hit = int(np.count_nonzero(prediction & reference))
    side = {
        (True, True): "neither",
        (False, False): "both",
        (False, True): "prediction",
        (True, False): "reference",
    }[predicted > 0, actual > 0]
    rule = EMPTY_RULES[side]
    dice = 2 * hit / (predicted + actual) if rule.dice is None else rule.dice
    distance = hd95(prediction, reference, spacing) if rule.hd95 is None else rule.hd95
    millilitres = float(np.prod(spacing)) / 1000
    outside = voxels - actual
    return {
        "dice": dice,
        "hd95": distance,
        "sensitivity": hit / actual if actual else dice,
        "specificity": (outside - (predicted - hit)) / outside if outside else 1.0,
        "precision": hit / predicted if predicted else dice,
        "volume_ml": predicted * millilitres,
        "reference_ml": actual * millilitres,
        "empty": side,
    }


def _masks_of_labels(
    prediction: np.ndarray, reference: np.ndarray, regions: Mapping[str, Sequence[int]]
) -> dict[str, tuple[np.ndarray, np.ndarray, int]]:
    """region -> (prediction, reference, voxels of the grid), cut to what is not background."""
    prediction = _checked_array(prediction, "prediction")
    reference = _checked_array(reference, "reference")
    _check_grids(prediction, reference, "labels")
    for name, values in regions.items():
        if 0 in values:
            raise ValueError(
                f"region {name} has values {tuple(values)}: 0 is background and in no region"
            )
    box = joint_box(prediction, reference)
    p, r = prediction[box], reference[box]
    return {
        name: (np.isin(p, values), np.isin(r, values), prediction.size)
        for name, values in ((name, list(values)) for name, values in regions.items())
    }


def _masks_of_dicts(
    prediction: Mapping[str, np.ndarray],
    reference: Mapping[str, np.ndarray],
    regions: Mapping[str, Sequence[int]] | None,
) -> dict[str, tuple[np.ndarray, np.ndarray, int]]:
    names = list(prediction if regions is None else regions)
    if set(names) - set(prediction) or set(names) - set(reference):
        raise ValueError(
            f"regions {names} are asked for, the prediction has {sorted(prediction)}, the "
            f"reference has {sorted(reference)}; both must hold a mask for each"
        )
    masks = {}
    for name in names:
        p = _checked_array(prediction[name], f"prediction {name}")
        r = _checked_array(reference[name], f"reference {name}")
        _check_grids(p, r, name)
        box = joint_box(p, r)
        masks[name] = (p[box].astype(bool), r[box].astype(bool), p.size)
    return masks


def _checked_array(array: np.ndarray, name: str) -> np.ndarray:
    array = np.asarray(array)
    if array.dtype.kind not in "bui":
        raise ValueError(
            f"{name} has dtype {array.dtype}; expected integer labels or a bool mask: threshold "
            "probabilities and round label files first"
        )
    return array


def _check_grids(prediction: np.ndarray, reference: np.ndarray, name: str) -> None:
    if prediction.ndim != 3 or prediction.shape != reference.shape:
        raise ValueError(
            f"{name}: the prediction is {prediction.shape}, the reference {reference.shape}; both "
            "must be on one 3-D grid: resample the prediction to the reference"
        )


def _checked_spacing(spacing: Sequence[float]) -> tuple[float, ...]:
    values = tuple(float(s) for s in spacing)
    if len(values) != 3 or not all(np.isfinite(s) and s > 0 for s in values):
        raise ValueError(f"spacing is {values}; expected three positive edge lengths in mm")
    return values
