"""From region probabilities to one label map."""

from collections.abc import Mapping, Sequence

import cc3d
import numpy as np
import scipy

from masm_jax.data.conventions import REGIONS


def decode(
    probabilities: np.ndarray,
    paint: Mapping[str, int] | Sequence[int] | None = None,
    *,
    regions: Mapping[str, Sequence[int]] = REGIONS,
    threshold: float | Sequence[float] = 0.5,
    largest: bool = False,
    fill: bool = False,
    minimum: int = 0,
) -> np.ndarray:
    """Threshold each region and paint the regions over each other, outer to inner.

    A region whose values are a part of those of an earlier region lies inside it: it is painted
    only where the outer one is present too. So with WT, TC and ET a voxel is ET only if it is also
    TC and WT. Of regions that are apart, such as two zones of an organ, the likelier one counts,
    the later one where they are equal.

    Args:
        probabilities: (R, ...) float, in the order of `regions`.
        paint: region -> label value, or the R values in order; 0 to 255. Use a convention's
            ``paint`` for a file in its labels. None: internal labels, each region painting the
            first of its values that no later region has (WT 2, TC 1, ET 3).
        regions: region -> internal values, ordered outer to inner.
        threshold: a voxel is in a region where its probability is above it; one for all regions or
            one each.
        largest: of the first region keep the largest connected component alone (26 neighbours, 3-D
            grids), and with it what is nested inside. Right for one lesion, wrong for metastases.
        fill: close the holes of every region but the last, whose hole is the necrosis: voxels that
            the region encloses on all sides (6 neighbours, 3-D grids).
        minimum: voxels; the last region, where smaller, becomes what surrounds it (in BraTS: ET
            becomes core; a false alarm scores 0, a handful of voxels gains nothing).

    Returns:
        (...) uint8 labels, 0 where no region is.

    Raises:
        ValueError: the numbers of regions or thresholds differ, a label is no uint8, or a
            probability is NaN.
    """
    probabilities = np.asarray(probabilities)
    names = list(regions)
    if len(probabilities) != len(names):
        raise ValueError(
            f"probabilities have {len(probabilities)} regions, expected {len(names)} "
            f"({', '.join(names)}): pass the regions that the network was trained on"
        )
    thresholds = np.atleast_1d(threshold).tolist() * (len(names) if np.ndim(threshold) == 0 else 1)
    if len(thresholds) != len(names):
        raise ValueError(
            f"threshold {thresholds} is for {len(thresholds)} regions; expected one number, or one "
            f"for each of {', '.join(names)}"
        )
    values = _paint_values(paint, regions)
    labels = np.zeros(probabilities.shape[1:], np.uint8)
    present: dict[str, np.ndarray] = {}
    for index, name in enumerate(names):
        # A comparison with NaN is False: a broken network would look like a healthy brain.
        if np.isnan(probabilities[index]).any():
            raise ValueError(
                f"the probabilities of {name} hold NaN; expected numbers in 0..1: the weights or "
                "the input image are not finite, use an earlier checkpoint or check the scan"
            )
        mask = probabilities[index] > thresholds[index]
        if largest and index == 0 and mask.any():
            mask = cc3d.largest_k(mask, k=1, connectivity=26) > 0
        if fill and index < len(names) - 1:
            mask = scipy.ndimage.binary_fill_holes(mask)
        for outer in present:
            if set(regions[name]) < set(regions[outer]):
                mask &= present[outer]
            elif not set(regions[name]) & set(regions[outer]):
                likelier = probabilities[index] >= probabilities[names.index(outer)]
                mask &= likelier | ~present[outer]
                present[outer] &= ~mask
        if index == len(names) - 1 and mask.sum() < minimum:
            mask[:] = False
        present[name] = mask
        labels[mask] = values[index]
    return labels


def _paint_values(
    paint: Mapping[str, int] | Sequence[int] | None, regions: Mapping[str, Sequence[int]]
) -> list[int]:
    names = list(regions)
    if paint is None:
        values = []
        for index, name in enumerate(names):
            later = {value for inner in names[index + 1 :] for value in regions[inner]}
            own = [value for value in regions[name] if value not in later]
            if not own:
                raise ValueError(
                    f"region {name} {tuple(regions[name])} has no label of its own beside the "
                    "later regions; pass paint: region -> label value"
                )
            values.append(own[0])
    elif isinstance(paint, Mapping):
        if set(names) - set(paint):
            raise ValueError(
                f"paint has labels for {list(paint)}, the regions are {names}; name one for each"
            )
        values = [paint[name] for name in names]
    else:
        values = list(paint)
    if len(values) != len(names) or not all(0 <= int(v) <= 255 and int(v) == v for v in values):
        raise ValueError(
            f"paint gives {values} for the regions {names}; expected one label of 0 to 255 for each"
        )
    return [int(value) for value in values]
