"""Lesion-wise metrics against values made with the official packages, and by hand."""

import json
import math
import pathlib

import pytest

from masm_jax.evaluation import surfaces
from masm_jax.evaluation.lesions import STYLES, lesion_wise
from tests.evaluation.golden_lesions import COUNT, mask_pair

GOLDEN = json.loads(pathlib.Path(__file__).with_name("golden_lesions.json").read_text())
UNIT = (1.0, 1.0, 1.0)


def close(ours, official, worst):
    """1e-6, where the packages say infinity for the worst distance and NaN for no value."""
    if official is None or math.isnan(official):
        return ours is None
    if math.isinf(official):
        return ours == worst
    return ours == pytest.approx(official, rel=1e-6, abs=1e-6)


def test_there_are_enough_pairs():
    assert len(GOLDEN) == COUNT >= 40


@pytest.mark.parametrize("index", range(COUNT))
@pytest.mark.parametrize("style", STYLES)
def test_equals_the_official_packages(index, style):
    prediction, reference, spacing = mask_pair(index)
    ours = lesion_wise(prediction, reference, spacing, style=style, tolerance=min(spacing))
    official = GOLDEN[index][style]
    for key in set(official) & set(ours):
        if key == "f1" and ours["tp"] + ours["fp"] + ours["fn"] == 0:
            continue  # panoptica says 0 or NaN where there is nothing
        assert close(ours[key], official[key], STYLES[style].worst_hd95), key


@pytest.mark.parametrize("index", [i for i in range(COUNT) if mask_pair(i)[2] == UNIT])
def test_region_surfaces_equal_the_official_package(index):
    """panoptica takes voxels of 1 mm and a tolerance of 0.5 for whole regions."""
    prediction, reference, spacing = mask_pair(index)
    official = GOLDEN[index]["brats2025"]
    if math.isfinite(official["region_hd95"]):  # infinite also where no lesion was matched
        distances = surfaces.surface_distances(prediction, reference, spacing)
        assert surfaces.hd95(distances) == pytest.approx(official["region_hd95"], rel=1e-6)
        assert surfaces.nsd(distances, 0.5) == pytest.approx(official["region_nsd"], abs=1e-6)
