"""One case: checks, crop to the brain, z-score inside it, resampling, and the way back.

Resampling is separable and covers the same physical extent, corner to corner. Shrinking averages
the old voxels that a new one covers, each by the share covered: no aliasing, no overshoot, no blur
to tune, and for the indicator of a region the share of the new voxel that lies inside it. Enlarging
is linear between voxel centres.
"""

import dataclasses
import hashlib
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import scipy

from masm_jax.data import conventions, nifti
from masm_jax.data.cases import Case, Problem
from masm_jax.data.integrity import CaseError, by, check_content, read_images, read_segmentation

VERSION = 1  # raised when records of an older version must be made again
_FLOAT16_MAX = 65504.0


@dataclasses.dataclass
class Record:
    """A prepared case.

    Attributes:
        image: (M, d, h, w) float16, z-scored inside the brain, exactly 0 outside, RAS+.
        label: (d, h, w) uint8 internal labels, None without segmentation.
        meta: What is needed to undo the preparation, as written to meta.json.
    """

    image: np.ndarray
    label: np.ndarray | None
    meta: dict[str, Any]


def preprocess(case: Case, *, spacing: float | None = None) -> Record:
    """Checks, crops, normalises and optionally resamples one case.

    Args:
        case: The files.
        spacing: Voxel size in mm to resample to, equal on all axes; None keeps the file's.

    Returns:
        The record.

    Raises:
        CaseError: An integrity check fails; all that fail are listed.
    """
    images, affine = read_images(case)
    shape = images[0].shape
    segmentation = read_segmentation(case, shape, affine)
    for index, name in enumerate(case.convention.modalities):
        if name in case.convention.window:  # 0 is outside then, as in skull-stripped scans
            low, high = case.convention.window[name]
            images[index] = np.clip(images[index].astype(np.float32), low, high) - low
    brain = np.logical_or.reduce([image != 0 for image in images])
    problems = check_content(case, images, brain, segmentation)
    if problems:
        raise CaseError(problems)
    brain = nifti.to_canonical(brain, affine)
    crop = _bounding_box(brain)
    box = tuple(slice(start, stop) for start, stop in crop)
    brain = brain[box]
    voxels = [
        np.ascontiguousarray(nifti.to_canonical(image, affine)[box], np.float32) for image in images
    ]
    shown = (float((v != 0).sum() / brain.sum()) for v in voxels)
    covered = dict(zip(case.convention.modalities, shown))
    hashes = {m: _digest(v) for m, v in zip(case.convention.modalities, voxels)}
    image, intensity = _normalise(case, voxels, brain)
    input_spacing = nifti.canonical_spacing(affine)
    new_shape = _resampled_shape(brain.shape, input_spacing, spacing)
    _check_resampled(case, new_shape, spacing)
    label, volumes = None, None
    regions = case.convention.regions
    if segmentation is not None:
        label = nifti.to_canonical(segmentation, affine)[box]
        label = np.ascontiguousarray(conventions.to_internal(label, case.convention.labels))
        millilitres = float(np.prod(input_spacing)) / 1000
        volumes = {
            name: float(mask.sum()) * millilitres
            for name, mask in zip(regions, conventions.region_masks(label, regions))
        }
        label = resample_labels(label, new_shape, regions)
    if new_shape != brain.shape:
        inside = resample(brain.astype(np.float32), new_shape)
        # Divided by the share of brain in a voxel, so that the rim is not dimmed towards 0.
        image = resample(image, new_shape) / np.maximum(inside, 1e-6)
        image *= inside >= 0.5
    meta = {
        "version": VERSION,
        "case": case.id,
        "convention": case.convention.name,
        "modalities": list(case.convention.modalities),
        "files": {m: str(p) for m, p in zip(case.convention.modalities, case.images)},
        "segmentation": None if case.segmentation is None else str(case.segmentation),
        "shape": list(shape),
        "affine": affine.tolist(),
        "orientation": nifti.orientation(affine),
        "crop": crop,
        "spacing": list(input_spacing),
        "crop_shape": list(brain.shape),
        "record_spacing": [s * n / m for s, n, m in zip(input_spacing, brain.shape, new_shape)],
        "record_shape": list(new_shape),
        "regions": {name: list(inside) for name, inside in regions.items()},
        "labels": {str(v): i for v, i in case.convention.labels.items()},
        "paint": dict(case.convention.paint),
        "intensity": intensity,
        "window": {name: list(ends) for name, ends in case.convention.window.items()},
        "volumes_ml": volumes,
        "hashes": hashes,
        "covered": covered,
    }
    return Record(np.clip(image, -_FLOAT16_MAX, _FLOAT16_MAX).astype(np.float16), label, meta)


def restore(probabilities: np.ndarray, meta: Mapping[str, Any]) -> np.ndarray:
    """Brings maps of a record back to the grid of the input file.

    Args:
        probabilities: (R, d, h, w) float, in the grid of the record.
        meta: The record's meta.

    Returns:
        (R, I, J, K) float32; 0 outside the crop.
    """
    _check_grid(probabilities.shape[1:], meta)
    inside = resample(np.asarray(probabilities, np.float32), tuple(meta["crop_shape"]))
    return _uncrop(inside, meta)


def restore_labels(label: np.ndarray, meta: Mapping[str, Any]) -> np.ndarray:
    """Brings internal labels of a record back to the grid of the input file.

    Args:
        label: (d, h, w) uint8 internal labels.
        meta: The record's meta.

    Returns:
        (I, J, K) uint8 internal labels: exact where the record was not resampled, else region by
        region.
    """
    _check_grid(label.shape, meta)
    regions = {name: tuple(values) for name, values in meta["regions"].items()}
    return _uncrop(resample_labels(label, tuple(meta["crop_shape"]), regions), meta)


def resample(array: np.ndarray, shape: tuple[int, int, int]) -> np.ndarray:
    """Resamples the last three axes to a shape over the same physical extent.

    Args:
        array: (..., D, H, W) float32.
        shape: The new D, H, W.

    Returns:
        (..., *shape) float32, within the range of the input.
    """
    array = np.asarray(array, np.float32)
    for axis, size in zip((-3, -2, -1), shape):
        if array.shape[axis] != size:
            first = np.moveaxis(array, axis, 0)
            new = _weights(len(first), size) @ first.reshape(len(first), -1)
            array = np.moveaxis(new.reshape(size, *first.shape[1:]), 0, axis)
    return np.ascontiguousarray(array)


def resample_labels(
    label: np.ndarray, shape: tuple[int, int, int], regions: Mapping[str, tuple[int, ...]]
) -> np.ndarray:
    """Resamples labels region by region: indicators are resampled, cut at 0.5 and painted nested.

    Args:
        label: (D, H, W) uint8 internal labels.
        shape: The new D, H, W.
        regions: Region -> internal values, outer to inner.

    Returns:
        ``shape`` uint8 internal labels.
    """
    if tuple(label.shape) == tuple(shape):
        return label
    present = {int(v) for v in np.unique(label)} - {0}
    covered = set().union(*regions.values())
    # Values in no region (the resection cavity) first, each for itself; then the regions.
    layers = [(v,) for v in sorted(present - covered)] + list(regions.values())
    result = np.zeros(shape, np.uint8)
    for index, values in enumerate(layers):
        if not present & set(values):
            continue
        mask = resample(np.isin(label, np.asarray(values)).astype(np.float32), shape) >= 0.5
        inner = set().union(*layers[index + 1 :]) & set(values)
        own = sorted(set(values) - inner) or sorted(values)
        # A region with several values of its own: the one with most of each voxel.
        shares = [resample((label == v).astype(np.float32), shape) for v in own if len(own) > 1]
        fill = np.asarray(own, np.uint8)[np.argmax(shares, 0)] if shares else np.uint8(own[0])
        result = np.where(mask, fill, result)
    return result


def _weights(size: int, new_size: int) -> "scipy.sparse.csr_array":
    """(new_size, size) float32 weights of one axis, rows summing to 1.

    Sparse, because a threaded matrix product takes twenty times as long on busy cores.
    """
    step = size / new_size
    old, new = np.arange(size), np.arange(new_size)[:, None]
    if step > 1:  # length of the part of each old voxel that the new one covers
        weights = np.minimum((new + 1) * step, old + 1) - np.maximum(new * step, old)
    else:  # distance between the centres; 2 -> 4: -0.25, 0.25, 0.75, 1.25
        weights = 1 - np.abs(old - ((new + 0.5) * step - 0.5))
    weights = np.where(weights > 1e-9, weights, 0)
    weights = weights / weights.sum(1, keepdims=True)
    return scipy.sparse.csr_array(weights.astype(np.float32))


def _normalise(
    case: Case, voxels: list[np.ndarray], brain: np.ndarray
) -> tuple[np.ndarray, dict[str, dict[str, float]]]:
    """z-scores each modality inside the brain, in float32 from float64 sums; 0 outside."""
    image = np.zeros((len(voxels), *brain.shape), np.float32)
    intensity, problems = {}, []
    for index, (name, values) in enumerate(zip(case.convention.modalities, voxels)):
        inside = values[brain]
        mean, std = float(inside.mean(dtype=np.float64)), float(inside.std(dtype=np.float64))
        if not 0 < std < np.inf:
            value = f"{name} is {mean:g} everywhere in the brain"
            file, fix = str(case.images[index]), "export the file again"
            problems.append(Problem(case.id, file, value, "an image with contrast", fix))
            continue
        image[index][brain] = (inside - np.float32(mean)) / np.float32(std)
        intensity[name] = {"mean": mean, "std": std}
    if problems:
        raise CaseError(problems)
    return image, intensity


def _bounding_box(mask: np.ndarray) -> list[list[int]]:
    """[[start, stop] per axis] of the True voxels of a (D, H, W) mask that has some."""
    box = []
    for axis in range(3):
        found = np.flatnonzero(mask.any(axis=tuple(a for a in range(3) if a != axis)))
        box.append([int(found[0]), int(found[-1]) + 1])
    return box


def _resampled_shape(
    shape: tuple, input_spacing: tuple, spacing: float | None
) -> tuple[int, int, int]:
    if spacing is None:
        return tuple(shape)
    return tuple(
        n if abs(s - spacing) < 1e-3 else max(1, round(n * s / spacing))
        for n, s in zip(shape, input_spacing)
    )


def _check_resampled(case: Case, shape: tuple, spacing: float | None) -> None:
    """Refuses to make far more voxels than there are, as of a few voxels of decimetres."""
    files = {path: nifti.room(path) for path in case.images}
    most = max(4 * nifti.SMALL_VOXELS, sum(files.values()))
    voxels = len(case.images) * math.prod(shape)
    if voxels > most:
        value = f"{len(case.images)} x {by(shape)} = {voxels} voxels at --spacing={spacing:g}"
        wanted = f"at most {most} for files of this size"
        fix = "choose a larger --spacing, or correct the affines, which are in mm"
        raise CaseError([Problem(case.id, str(case.images[0]), value, wanted, fix)])


def _check_grid(shape: tuple, meta: Mapping[str, Any]) -> None:
    if tuple(shape) != tuple(meta["record_shape"]):
        raise ValueError(
            f"{meta['case']}: array of {by(shape)} voxels; expected {by(meta['record_shape'])}, "
            "those of the record; give its whole grid"
        )


def _uncrop(inside: np.ndarray, meta: Mapping[str, Any]) -> np.ndarray:
    """(..., crop) RAS+ -> (..., I, J, K) of the file, 0 outside the crop."""
    affine = np.asarray(meta["affine"])
    full = np.zeros((*inside.shape[:-3], *meta["shape"]), inside.dtype)
    box = tuple(slice(start, stop) for start, stop in meta["crop"])
    nifti.to_canonical(full, affine)[nifti.last_axes(box)] = inside  # a view: writes into full
    return full


def _digest(array: np.ndarray) -> str:
    """Content hash of the cropped voxels: the same for another compression, type or orientation."""
    header = str(array.shape).encode()
    return hashlib.blake2b(header + array.tobytes(), digest_size=16).hexdigest()
