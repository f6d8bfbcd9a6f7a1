"""Reads the files of a case and checks that they belong together and hold what they should."""

import math
from pathlib import Path

import numpy as np

from masm_jax.data import nifti
from masm_jax.data.cases import Case, Problem

# Share of the tumour voxels that may lie where every modality is 0. The ten BraTS cases used for
# development have none, one hand-drawn lesion mask 3 of 49,769; a shifted or foreign one has many.
OUTSIDE_TOLERANCE = 0.01
# Two affines agree where no corner of the grid moves by more than this share of a voxel: rounding
# of quaternions near a half turn alone moves a corner by several hundredths.
AFFINE_TOLERANCE = 0.1
# Of a field of view: a whole body has half a cubic metre. What is resampled has no more voxels.
EXTENT_MM, EXTENT_LITRES = 3000.0, 1000.0
FAR_MM = 1e5  # of the first voxel from the scanner's centre


class CaseError(ValueError):
    """A case fails the integrity checks; ``problems`` lists why."""

    def __init__(self, problems: list[Problem]) -> None:
        super().__init__(problems)
        self.problems = problems

    def __str__(self) -> str:
        return "\n".join(str(problem) for problem in self.problems)


def read_images(case: Case) -> tuple[list[np.ndarray], np.ndarray]:
    """Reads the images of a case.

    Args:
        case: The files.

    Returns:
        M arrays (I, J, K) of any number type, and the 4x4 affine of the first.

    Raises:
        CaseError: A file cannot be read, or shapes or affines disagree.
    """
    problems: list[Problem] = []
    read: dict[Path, tuple[np.ndarray, np.ndarray] | None] = {}
    images, affines = [], []
    for modality, path, channel in zip(case.convention.modalities, case.images, case.channels):
        if path not in read:  # the modalities of a 4-D file share one
            read[path] = _read(case, path, problems)
        if (content := read[path]) is None:
            continue
        array, affine = content
        if array.ndim != (3 if channel is None else 4) or (channel or 0) >= (*array.shape, 1)[3]:
            value = f"shape {by(array.shape)} for {modality}"
            wanted = "3 axes" if channel is None else f"4 axes, channel {channel} on the last"
            fix = "export one volume per modality, or describe the channels of a 4-D file"
            problems.append(Problem(case.id, str(path), value, wanted, fix))
            continue
        images.append(array if channel is None else array[..., channel])
        affines.append(affine)
        problems += grid_problems(
            case, path, modality, (images[-1].shape, affine), (images[0].shape, affines[0])
        )
    if problems:
        raise CaseError(problems)
    return images, affines[0]


def read_segmentation(
    case: Case, shape: tuple, affine: np.ndarray, *, flag: str = "--labels"
) -> np.ndarray | None:
    """Reads the label file of a case.

    Args:
        case: The files.
        shape: (I, J, K) of the images.
        affine: (4, 4) of the images.
        flag: that says what the values mean, for the message.

    Returns:
        (I, J, K) label values of the file, integers in any number type; None without a file.

    Raises:
        CaseError: It cannot be read, lies on another grid, or holds unknown values.
    """
    if case.segmentation is None:
        return None
    path = case.segmentation
    problems: list[Problem] = []
    read = _read(case, path, problems, voxels=math.prod(shape))
    if read is None:
        raise CaseError(problems)
    array, own_affine = read
    problems += grid_problems(
        case, path, "the segmentation", (array.shape, own_affine), (shape, affine)
    )
    values, counts = np.unique(array[array != 0], return_counts=True)
    known = set(case.convention.labels)
    unknown = [(v, c) for v, c in zip(values.tolist(), counts.tolist()) if v not in known]
    if unknown:
        value = "label value " + ", ".join(f"{v:g} ({c} voxels)" for v, c in unknown[:5])
        value += f" and {len(unknown) - 5} more values" if len(unknown) > 5 else ""
        wanted = f"0, {', '.join(map(str, sorted(known)))} (labels of {case.convention.name})"
        fix = f"choose the labels with {flag}, or correct the file"
        if not all(float(v).is_integer() for v, _ in unknown):
            fix = "write whole numbers; probabilities and linear resampling give others"
        problems.append(Problem(case.id, str(path), value, wanted, fix))
    if problems:
        raise CaseError(problems)
    return array


def check_content(
    case: Case, images: list[np.ndarray], brain: np.ndarray, segmentation: np.ndarray | None
) -> list[Problem]:
    """Checks voxel values: finite, not empty, no copies; the tumour inside the brain.

    Args:
        case: The files.
        images: M arrays (I, J, K).
        brain: (I, J, K) bool, True where any modality is not 0.
        segmentation: (I, J, K) label values of the file, or None.

    Returns:
        What is wrong.
    """
    problems = []
    names = case.convention.modalities
    usable: list[int] = []
    for index, (name, path, image) in enumerate(zip(names, case.images, images)):
        bad = int(image.size - np.isfinite(image).sum()) if image.dtype.kind == "f" else 0
        if bad:
            value = f"{bad} voxels of {name} are NaN or infinite"
            fix = "set them to 0 outside the brain, or export the file again"
            problems.append(Problem(case.id, str(path), value, "finite numbers", fix))
        elif not image.any():
            value = f"empty brain: every voxel of {name} is 0"
            fix = "export or skull-strip it again"
            problems.append(Problem(case.id, str(path), value, "a brain on background 0", fix))
        else:
            for other in usable:
                if np.array_equal(image, images[other]):
                    value, fix = f"{name} is a copy of {names[other]}", "get the right file"
                    problems.append(Problem(case.id, str(path), value, "different images", fix))
            usable.append(index)
    if segmentation is not None and not problems:
        tumour = segmentation != 0
        outside, total = int((tumour & ~brain).sum()), int(tumour.sum())
        if outside > OUTSIDE_TOLERANCE * total:
            value = f"{outside} of {total} segmented voxels lie outside the brain (all images 0)"
            wanted = f"at most {OUTSIDE_TOLERANCE:.0%} of them"
            fix = "check that it is the segmentation of this case, not shifted or flipped"
            problems.append(Problem(case.id, str(case.segmentation), value, wanted, fix))
    return problems


def grid_problems(
    case: Case,
    path: Path,
    what: str,
    grid: tuple[tuple, np.ndarray],
    first: tuple[tuple, np.ndarray],
) -> list[Problem]:
    """Compares the shape and the affine of a file with those of the first modality.

    Args:
        case: The files.
        path: The file.
        what: Its name for the message.
        grid: Its (I, J, K) and 4x4 affine.
        first: The same of the first modality.

    Returns:
        What is wrong.
    """
    name = case.convention.modalities[0]
    if grid[0] != first[0]:
        value, wanted = f"shape of {what} is {by(grid[0])}", f"that of {name}, {by(first[0])}"
        fix = "all files of a case must share one grid; export or resample it again"
        return [Problem(case.id, str(path), value, wanted, fix)]
    corners = np.array(np.meshgrid(*[(0, n - 1) for n in grid[0]])).reshape(3, -1)
    difference = grid[1] - first[1]
    moved = np.linalg.norm(difference[:3, :3] @ corners + difference[:3, 3:], axis=0).max()
    allowed = AFFINE_TOLERANCE * min(nifti.canonical_spacing(first[1]))
    if moved <= allowed:
        return []
    value = f"affine of {what} {grid[1][:3].round(3).tolist()} moves a corner by {moved:.3g} mm"
    wanted = f"that of {name}, {first[1][:3].round(3).tolist()}, within {allowed:.2g} mm"
    fix = "register the files to each other, or correct the header"
    return [Problem(case.id, str(path), value, wanted, fix)]


def by(shape: tuple) -> str:
    """Returns a shape as people write it, such as 240x240x155."""
    return "x".join(map(str, shape))


def _read(
    case: Case, path: Path, problems: list[Problem], voxels: int = 0
) -> tuple[np.ndarray, np.ndarray] | None:
    """Array and affine of a file of so many voxels; None and a problem where it cannot be read."""
    try:
        array, affine, _ = nifti.read(path, voxels=voxels)
        nifti.orientation(affine)
        _check_extent(path, array.shape[:3], affine)
        return array, affine
    except ValueError as error:
        text = str(error).removeprefix(f"{path}: ")
        value, _, fix = text.partition("; ")
        wanted = "a whole NIfTI file with a valid affine"
        problems.append(Problem(case.id, str(path), value, wanted, fix or "get the file again"))
        return None


def _check_extent(path: Path, shape: tuple, affine: np.ndarray) -> None:
    """Refuses a volume that no scanner makes, such as one whose affine is in micrometres."""
    edges = [n * s for n, s in zip(shape, np.sqrt((affine[:3, :3] ** 2).sum(0)))]
    if max(edges) > EXTENT_MM or math.prod(edges) > EXTENT_LITRES * 1e6:
        raise ValueError(
            f"{path}: {nifti.by_mm(edges)} mm, expected at most {EXTENT_MM:g} mm along an axis "
            f"and {EXTENT_LITRES:g} litres in all; set an affine in mm"
        )
    if np.abs(affine[:3, 3]).max() > FAR_MM:
        raise ValueError(
            f"{path}: its first voxel is at {affine[:3, 3].tolist()} mm, expected within "
            f"{FAR_MM:g} mm; set a valid affine"
        )
