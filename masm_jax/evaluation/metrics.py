"""Region metrics of one case as the BraTS challenge counts them, with the empty-region rules named.

What to do with a region that the prediction, the reference or both leave empty decides the mean
score of a data set more than most networks do, and libraries differ: MONAI returns NaN and drops
the case from the mean, nnU-Net skips the Dice of cases without the structure. Here ``EMPTY_RULES``
is the one place that decides, every result says under ``"empty"`` which rule it came under, and no
metric is ever NaN, so that no case can silently leave a mean.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from masm_jax.data.conventions import REGIONS
from masm_jax.evaluation import lesions, surfaces
from masm_jax.evaluation.surfaces import joint_box

# The worst distance: the diagonal of the BraTS grid, 240 x 240 x 155 voxels of 1 mm.
WORST_HD95_MM = 373.13


class EmptyRule(NamedTuple):
    """What a case scores when a region is empty; None: the score is computed from the masks."""

    dice: float | None
    hd95: float | None
    nsd: float | None
    words: str


# Keyed by which side is empty: the value of "empty" in every result. The policy is that of the
# BraTS challenges (Bakas et al. 2018, arXiv:1811.02629, and the organisers' evaluation code).
EMPTY_POLICY = "brats"
EMPTY_RULES = {
    "neither": EmptyRule(None, None, None, "both hold the region: computed from the masks"),
    "both": EmptyRule(1.0, 0.0, 1.0, "rightly found empty: Dice 1, HD95 0 mm, NSD 1"),
    "prediction": EmptyRule(
        0.0, WORST_HD95_MM, 0.0, f"missed: Dice 0, HD95 {WORST_HD95_MM} mm, NSD 0"
    ),
    "reference": EmptyRule(
        0.0, WORST_HD95_MM, 0.0, f"false alarm: Dice 0, HD95 {WORST_HD95_MM} mm, NSD 0"
    ),
}

CONVENTIONS = {
    "dice": "2 TP / (2 TP + FP + FN) over the voxels of the whole case, not per lesion",
    "hd95": (
        "95th percentile, linearly interpolated, of the surface distances of both directions "
        "pooled, in mm (as medpy; MONAI takes the larger of the two directed percentiles)"
    ),
    "nsd": (
        "normalised surface Dice: mean over both surfaces of the share of surface voxels that lie "
        "within the tolerance of the other (as panoptica; Nikolov et al. 2018 weigh by area)"
    ),
    "sensitivity": "TP / (TP + FN); where that is 0/0 it follows the Dice rule",
    "specificity": "TN / (TN + FP) over the whole grid, air included: always close to 1",
    "precision": "TP / (TP + FP); where that is 0/0 it follows the Dice rule",
    "volume_ml": "volume of the prediction in millilitres; reference_ml: of the reference",
    **{f"{name}_*": f"lesion-wise: {style.words}" for name, style in lesions.STYLES.items()},
    "empty_policy": EMPTY_POLICY,
    "empty_rules": {side: rule.words for side, rule in EMPTY_RULES.items()},
}

LESION_COLUMNS = ("dice", "hd95", "nsd", "f1", "tp", "fp", "fn")

Region = dict[str, Any]


def evaluate(
    prediction: np.ndarray | Mapping[str, np.ndarray],
    reference: np.ndarray | Mapping[str, np.ndarray],
    spacing: Sequence[float],
    *,
    regions: Mapping[str, Sequence[int]] | None = None,
    tolerance: float = 1.0,
    styles: Sequence[str] = (),
) -> dict[str, Region]:
    """Compare a segmentation with its reference, region by region.

    Args:
        prediction: (I, J, K) integer internal labels, or a dict region -> (I, J, K) mask, bool or
            integer.
        reference: the same kind and grid.
        spacing: voxel edge lengths along I, J, K in mm.
        regions: region -> internal label values; default WT, TC, ET. With dicts of masks only its
            names are used (default: the dict's own).
        tolerance: of the NSD, mm.
        styles: of the lesion-wise metrics, keys of ``lesions.STYLES``; none by default.

    Returns:
        region -> {"dice", "hd95" (mm), "nsd", "sensitivity", "specificity", "precision",
        "volume_ml", "reference_ml", "empty"}; all finite floats but "empty", a key of
        ``EMPTY_RULES``. Per style S also "S_dice", "S_hd95", "S_nsd", "S_f1" (None where S gives no
        value), "S_tp", "S_fp", "S_fn", and "lesions": a list of dicts with "style" and what
        ``lesions.lesion_wise`` says of each reference lesion.

    Raises:
        ValueError: grids, regions, dtypes or the spacing do not fit.
    """
    spacing = _checked_spacing(spacing)
    if isinstance(prediction, Mapping) and isinstance(reference, Mapping):
        masks = _masks_of_dicts(prediction, reference, regions)
    elif isinstance(prediction, Mapping) or isinstance(reference, Mapping):
        raise ValueError(
            "prediction and reference must be of one kind: two label arrays or two dicts of masks"
        )
    else:
        masks = _masks_of_labels(prediction, reference, REGIONS if regions is None else regions)
    scores = {}
    for name, (p, r, voxels) in masks.items():
        scores[name] = _scores(p, r, voxels, spacing, tolerance)
        listed = []
        for style in styles:
            result = lesions.lesion_wise(p, r, spacing, style=style, tolerance=tolerance)
            scores[name] |= {f"{style}_{key}": result[key] for key in LESION_COLUMNS}
            listed += [{"style": style, **lesion} for lesion in result["lesions"]]
        if styles:
            scores[name]["lesions"] = listed
    return scores


def dice(prediction: np.ndarray, reference: np.ndarray) -> float:
    """Dice of two (I, J, K) bool masks under ``EMPTY_RULES``."""
    sizes = int(np.count_nonzero(prediction)), int(np.count_nonzero(reference))
    rule = EMPTY_RULES[_side(*sizes)]
    if rule.dice is not None:
        return rule.dice
    return 2 * int(np.count_nonzero(prediction & reference)) / sum(sizes)


def _side(predicted: int, actual: int) -> str:
    """Which side is empty: the key of ``EMPTY_RULES``."""
    return {
        (True, True): "neither",
        (False, False): "both",
        (False, True): "prediction",
        (True, False): "reference",
    }[predicted > 0, actual > 0]


def _scores(
    prediction: np.ndarray,
    reference: np.ndarray,
    voxels: int,
    spacing: tuple[float, ...],
    tolerance: float,
) -> Region:
    """Scores of one region: two bool masks cut from a grid of `voxels` voxels, the rest empty."""
    predicted = int(np.count_nonzero(prediction))
    actual = int(np.count_nonzero(reference))
    hit = int(np.count_nonzero(prediction & reference))
    side = _side(predicted, actual)
    rule = EMPTY_RULES[side]
    overlap = dice(prediction, reference)
    distance, near = rule.hd95, rule.nsd
    if side == "neither":
        distances = surfaces.surface_distances(prediction, reference, spacing)
        distance, near = surfaces.hd95(distances), surfaces.nsd(distances, tolerance)
    millilitres = float(np.prod(spacing)) / 1000
    outside = voxels - actual
    return {
        "dice": overlap,
        "hd95": distance,
        "nsd": near,
        "sensitivity": hit / actual if actual else overlap,
        "specificity": (outside - (predicted - hit)) / outside if outside else 1.0,
        "precision": hit / predicted if predicted else overlap,
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
