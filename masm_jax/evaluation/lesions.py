"""Lesion-wise metrics of one region, in the two styles of the BraTS challenges.

Whole-case Dice hardly notices a small lesion that was missed or invented; these count each lesion
once. The two styles are not comparable with each other:

``brats2023``  (2023 and 2024; github.com/rachitsaluja/BraTS-2023-Metrics) Reference lesions closer
    than twice ``dilation_voxels`` count as one. All predicted components that touch a reference
    lesion, dilated, are compared with it together. Missed lesions and false components score Dice 0
    and 374 mm and enter the mean; reference lesions up to ``volume_mm3`` are left out. HD95 and NSD
    weigh surface elements by area (package surface-distance).
``brats2025``  (2025 on; package brats_evaluation 0.0.10, which rests on panoptica) Components are
    matched one to one so that the sum of their Dice is largest. The mean runs over matched pairs
    alone; what was missed or invented shows in F1. HD95 and NSD count surface voxels, as
    ``metrics.hd95`` does.

Written from the published descriptions and checked against numbers made with the official packages
(tests/evaluation/golden_lesions.json); neither is imported here.
"""

from collections.abc import Sequence
from typing import Any, Final, NamedTuple

import cc3d
import numpy as np
import scipy  # its parts are loaded where they are used: not in the start of a training

from masm_jax.evaluation.surfaces import hd95, joint_box, nsd, surface_distances

CONNECTIVITY: Final = 26  # of lesions: faces, edges and corners


class EmptyRule(NamedTuple):
    """Lesion-wise means of a region where there is nothing to average."""

    dice: float
    hd95: float
    nsd: float


class Style(NamedTuple):
    """What a challenge does with lesions; None in ``both_empty``: the case leaves the mean."""

    worst_hd95: float
    both_empty: EmptyRule | None
    words: str


STYLES = {
    "brats2023": Style(
        374.0,
        EmptyRule(1.0, 0.0, 1.0),
        "reference lesions joined by dilation, those up to 50 mm3 left out; missed and false "
        "lesions: Dice 0, NSD 0, HD95 374 mm, in the mean; no lesion at all: Dice 1, NSD 1, HD95 0",
    ),
    "brats2025": Style(
        373.0,
        None,
        "one-to-one matching of components, largest sum of Dice; mean over matched pairs; no pair: "
        "Dice 0, NSD 0, HD95 373 mm; no lesion at all: no value, not in the mean",
    ),
}


def lesion_wise(
    prediction: np.ndarray,
    reference: np.ndarray,
    spacing: Sequence[float],
    *,
    style: str,
    tolerance: float = 1.0,
    dilation_voxels: int = 3,
    volume_mm3: float = 50.0,
) -> dict[str, Any]:
    """Scores of the lesions of one region.

    Args:
        prediction: (I, J, K) bool.
        reference: (I, J, K) bool, the same grid.
        spacing: voxel edge lengths in mm.
        style: a key of ``STYLES``.
        tolerance: of the NSD, mm.
        dilation_voxels: of ``brats2023``; 3 for gliomas, 1 for metastases and meningiomas.
        volume_mm3: of ``brats2023``; 50 for gliomas, 2 for metastases.

    Returns:
        "dice", "hd95" (mm), "nsd": means over lesions, None where the style gives no value;
        "tp", "fp", "fn": numbers of lesions; "f1", "precision", "recall"; "lesions": one dict per
        reference lesion with "volume_ml", "dice", "hd95", "nsd" and "found" (bool).

    Raises:
        ValueError: no such style.
    """
    if style not in STYLES:
        raise ValueError(f"lesion style {style!r} is unknown; choose one of: {', '.join(STYLES)}")
    box = joint_box(prediction, reference, margin=dilation_voxels if style == "brats2023" else 0)
    prediction, reference = np.asarray(prediction[box], bool), np.asarray(reference[box], bool)
    if style == "brats2023":
        return _brats2023(prediction, reference, spacing, tolerance, dilation_voxels, volume_mm3)
    return _brats2025(prediction, reference, spacing, tolerance)


def components(mask: np.ndarray) -> tuple[np.ndarray, int]:
    """Connected components (faces, edges, corners) of a 3-D mask: labels from 1, their number."""
    if not mask.size:
        return np.zeros(mask.shape, np.uint16), 0
    return cc3d.connected_components(mask, connectivity=CONNECTIVITY, return_N=True)


def _brats2023(prediction, reference, spacing, tolerance, dilation_voxels, volume_mm3):
    rule = STYLES["brats2023"]
    voxel_mm3 = float(np.prod(spacing))
    predicted, number = components(prediction)
    joined, count = components(_dilated(reference, dilation_voxels))
    lesions, used = [], set()
    boxes = scipy.ndimage.find_objects(joined, count) if count else []
    for lesion, box in enumerate(boxes, 1):
        # The box of the joined component holds the lesion as dilated by itself.
        own = reference[box] & (joined[box] == lesion)
        near = _dilated(own, dilation_voxels)
        touching = np.setdiff1d(np.unique(predicted[box][near]), [0])
        used.update(touching.tolist())
        volume = np.count_nonzero(own) * voxel_mm3
        if volume <= volume_mm3:
            lesions.append({"volume_ml": volume / 1000, "found": touching.size > 0, "small": True})
            continue
        scores = {"dice": 0.0, "hd95": rule.worst_hd95, "nsd": 0.0}
        if touching.size:
            whole = np.zeros_like(reference)
            whole[box] = own
            scores = _area_weighted(np.isin(predicted, touching), whole, spacing, tolerance)
        lesions.append({"volume_ml": volume / 1000, "found": touching.size > 0, **scores})
    counted = [lesion for lesion in lesions if not lesion.pop("small", False)]
    false = number - len(used)
    wrong = {"dice": 0.0, "hd95": rule.worst_hd95, "nsd": 0.0}
    listed = counted + [wrong] * false
    means = {
        key: float(np.mean([x[key] for x in listed])) if listed else getattr(rule.both_empty, key)
        for key in wrong
    }
    found = sum(lesion["found"] for lesion in counted)
    return _result(means, found, false, len(counted) - found, counted)


def _brats2025(prediction, reference, spacing, tolerance):
    rule = STYLES["brats2025"]
    predicted, number = components(prediction)
    actual, count = components(reference)
    sizes_p = np.bincount(predicted.ravel(), minlength=number + 1)
    sizes_r = np.bincount(actual.ravel(), minlength=count + 1)
    both = prediction & reference
    pairs = actual[both].astype(np.int64) * (number + 1) + predicted[both]
    hits = np.bincount(pairs, minlength=(count + 1) * (number + 1)).reshape(count + 1, number + 1)
    dice = 2 * hits / np.maximum(sizes_r[:, None] + sizes_p, 1)
    # Several matchings can have the same sum: costs of panoptica's form, so that ties fall alike.
    cost = np.where(dice > 1e-6, 1 - dice, 1 + 1e-6)
    matched = {}
    for r, p in zip(*scipy.optimize.linear_sum_assignment(cost[1:, 1:])):
        if dice[r + 1, p + 1] > 1e-6:
            matched[r + 1] = p + 1
    lesions = []
    for r in range(1, count + 1):
        lesion = {"volume_ml": sizes_r[r] * float(np.prod(spacing)) / 1000, "found": r in matched}
        if r in matched:
            distances = surface_distances(predicted == matched[r], actual == r, spacing)
            lesion |= {
                "dice": float(dice[r, matched[r]]),
                "hd95": hd95(distances),
                "nsd": nsd(distances, tolerance),
            }
        else:
            lesion |= {"dice": 0.0, "hd95": rule.worst_hd95, "nsd": 0.0}
        lesions.append(lesion)
    found = [lesion for lesion in lesions if lesion["found"]]
    means = {"dice": None, "hd95": None, "nsd": None}
    if found:
        means = {key: float(np.mean([lesion[key] for lesion in found])) for key in means}
    elif number or count:
        means = {"dice": 0.0, "hd95": rule.worst_hd95, "nsd": 0.0}
    return _result(means, len(found), number - len(found), count - len(found), lesions)


def _result(means, tp, fp, fn, lesions):
    def share(numerator, denominator):
        return numerator / denominator if denominator else None

    return {
        **means,
        "tp": tp,
        "fp": fp,
        "fn": fn,
        "f1": share(2 * tp, 2 * tp + fp + fn),
        "precision": share(tp, tp + fp),
        "recall": share(tp, tp + fn),
        "lesions": lesions,
    }


def _dilated(mask, voxels):
    """Grown by so many voxels over faces and edges."""
    if not mask.any():
        return mask
    neighbours = scipy.ndimage.generate_binary_structure(3, 2)
    return scipy.ndimage.binary_dilation(mask, neighbours, voxels)


def _area_weighted(prediction, reference, spacing, tolerance):
    """Dice, and HD95 and NSD by area of surface elements, of two masks of which neither is empty.

    This HD95 is the larger of the two directed percentiles.
    """
    import surface_distance  # brings SciPy's parts along

    distances = surface_distance.compute_surface_distances(reference, prediction, spacing)
    overlap = np.count_nonzero(prediction & reference)
    return {
        "dice": 2 * overlap / (np.count_nonzero(prediction) + np.count_nonzero(reference)),
        "hd95": float(surface_distance.compute_robust_hausdorff(distances, 95)),
        "nsd": float(surface_distance.compute_surface_dice_at_tolerance(distances, tolerance)),
    }
