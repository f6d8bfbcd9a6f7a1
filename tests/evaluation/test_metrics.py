"""Region metrics against values worked out by hand, a brute-force distance and the BraTS rules."""

import math

import nibabel
import numpy as np
import pytest
from scipy import ndimage

from masm_jax.evaluation import metrics, surfaces
from masm_jax.evaluation.metrics import EMPTY_RULES, WORST_HD95_MM, evaluate

UNIT = (1.0, 1.0, 1.0)


def hd95(a, b, spacing):
    return surfaces.hd95(surfaces.surface_distances(a, b, spacing))


def _ball(shape, centre, radius, spacing=UNIT):
    axes = np.ogrid[tuple(slice(n) for n in shape)]
    square = sum(((a - c) * s) ** 2 for a, c, s in zip(axes, centre, spacing))
    return square <= radius**2


def _brute_surface(mask):
    """Voxels with a face neighbour outside the mask, by looking at each of the six."""
    padded = np.pad(mask, 1)
    inside = np.ones_like(mask)
    for axis in range(3):
        for step in (-1, 1):
            inside &= np.roll(padded, step, axis)[1:-1, 1:-1, 1:-1]
    return np.argwhere(mask & ~inside)


def _brute_hd95(a, b, spacing):
    p, r = _brute_surface(a) * np.array(spacing), _brute_surface(b) * np.array(spacing)
    distances = np.sqrt(((p[:, None] - r[None]) ** 2).sum(-1))
    return np.percentile(np.concatenate([distances.min(1), distances.min(0)]), 95)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("spacing", [UNIT, (1.0, 0.7, 3.0)])
def test_hd95_equals_all_pairs_of_surface_voxels(seed, spacing):
    rng = np.random.default_rng(seed)
    noise = rng.normal(size=(2, 17, 15, 12))
    a, b = (ndimage.gaussian_filter(n, 1.5) > 0.06 for n in noise)
    assert a.any() and b.any()
    assert hd95(a, b, spacing) == pytest.approx(_brute_hd95(a, b, spacing), rel=1e-12)


def test_hd95_of_concentric_balls_is_the_difference_of_their_radii():
    inner, outer = (_ball((64, 64, 64), (32, 32, 32), radius) for radius in (12, 20))
    assert hd95(inner, outer, UNIT) == pytest.approx(8.0, abs=0.75)  # a voxel's diagonal


def test_hd95_of_balls_on_an_anisotropic_grid_is_in_millimetres():
    spacing = (1.0, 2.0, 0.5)
    shape, centre = (60, 30, 120), (30, 15, 60)
    inner, outer = (_ball(shape, centre, radius, spacing) for radius in (12, 20))
    assert hd95(inner, outer, spacing) == pytest.approx(8.0, abs=1.2)


def test_hd95_of_single_voxels_is_their_distance():
    a, b = np.zeros((2, 9, 9, 9), bool)
    a[1, 2, 3] = b[4, 6, 3] = True
    assert hd95(a, b, UNIT) == 5.0  # 3, 4, 0
    assert hd95(a, b, (2.0, 1.0, 1.0)) == pytest.approx(math.sqrt(36 + 16))


def test_hd95_of_shifted_rods_by_hand():
    # Rods of ten voxels along the first axis, the second moved by 4 along itself: the four voxels
    # that stick out at either end are 1, 2, 3, 4 away, the other six 0. Pooled and sorted:
    # twelve 0, then 1 1 2 2 3 3 4 4; the 95th percentile is at rank 0.95 * 19 = 18.05, so 4.
    a, b = np.zeros((2, 20, 3, 3), bool)
    a[2:12, 1, 1] = b[6:16, 1, 1] = True
    assert hd95(a, b, UNIT) == pytest.approx(4.0)
    # Moved by 1: eighteen 0 and two 1; rank 18.05 is among the ones.
    b[:] = False
    b[3:13, 1, 1] = True
    assert hd95(a, b, UNIT) == pytest.approx(1.0)


def test_hd95_interpolates_and_pools_both_directions():
    # One voxel against itself and a second one 10 away: distances 0 (forth), 0 and 10 (back).
    # Rank 0.95 * 2 = 1.9 of (0, 0, 10): 9. The larger directed percentile would be 9.5.
    a, b = np.zeros((2, 12, 3, 3), bool)
    a[0, 1, 1] = b[0, 1, 1] = b[10, 1, 1] = True
    assert hd95(a, b, UNIT) == pytest.approx(9.0)
    assert hd95(b, a, UNIT) == pytest.approx(9.0)


def test_cube_moved_sideways_by_hand():
    # Cubes of 4^3 voxels, moved by 2: overlap 2 * 4 * 4 of 64.
    labels = np.zeros((2, 12, 12, 12), np.uint8)
    labels[0, 2:6, 4:8, 4:8] = 2
    labels[1, 4:8, 4:8, 4:8] = 2
    result = evaluate(labels[0], labels[1], (1.0, 1.0, 2.0))["WT"]
    assert result["dice"] == pytest.approx(2 * 32 / 128)
    assert result["sensitivity"] == result["precision"] == pytest.approx(32 / 64)
    assert result["specificity"] == pytest.approx((12**3 - 96) / (12**3 - 64))
    assert result["volume_ml"] == result["reference_ml"] == pytest.approx(64 * 2 / 1000)
    assert result["hd95"] == pytest.approx(2.0)
    assert result["empty"] == "neither"


def test_prediction_and_reference_are_not_confused():
    reference = np.zeros((6, 6, 6), np.uint8)
    reference[1:5, 1:5, 1:5] = 1  # 64 voxels
    prediction = np.zeros_like(reference)
    prediction[1:5, 1:5, 1] = 1  # 16, all inside
    result = evaluate(prediction, reference, UNIT)["TC"]
    assert result["sensitivity"] == pytest.approx(0.25)
    assert result["precision"] == 1.0
    assert result["specificity"] == 1.0
    assert (result["volume_ml"], result["reference_ml"]) == pytest.approx((0.016, 0.064))


def test_regions_are_unions_of_labels():
    labels = np.zeros((4, 4, 4), np.uint8)
    labels[0, 0, :4] = (1, 2, 3, 4)  # 4: resection cavity, in no region
    result = evaluate(labels, labels, (10.0, 10.0, 10.0))
    assert list(result) == ["WT", "TC", "ET"]
    volumes = {name: region["volume_ml"] for name, region in result.items()}
    assert volumes == pytest.approx({"WT": 3.0, "TC": 2.0, "ET": 1.0})
    other = evaluate(labels, labels, (10.0, 10.0, 10.0), regions={"RC": (4,)})
    assert other["RC"]["volume_ml"] == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("predicted", "present", "side", "dice", "distance"),
    [
        (False, False, "both", 1.0, 0.0),
        (False, True, "prediction", 0.0, 373.13),
        (True, False, "reference", 0.0, 373.13),
        (True, True, "neither", 1.0, 0.0),
    ],
)
def test_empty_region_rules(predicted, present, side, dice, distance):
    prediction, reference = np.full((2, 5, 5, 5), 2, np.uint8)  # WT everywhere, no ET
    prediction[2, 2, 2] = 3 if predicted else 2
    reference[2, 2, 2] = 3 if present else 2
    result = evaluate(prediction, reference, UNIT)
    region = result["ET"]
    assert (region["empty"], region["dice"], region["hd95"]) == (side, dice, distance)
    assert region["sensitivity"] == region["precision"] == dice
    assert result["WT"]["empty"] == "neither" and result["WT"]["dice"] == 1.0
    assert all(math.isfinite(v) for r in result.values() for v in r.values() if v != r["empty"])


def test_worst_distance_is_the_diagonal_of_the_brats_grid():
    assert WORST_HD95_MM == pytest.approx(math.hypot(240, 240, 155), abs=0.005)
    assert set(EMPTY_RULES) == set(metrics.CONVENTIONS["empty_rules"])


def test_cropping_to_the_joint_box_changes_nothing():
    rng = np.random.default_rng(5)
    for pad in ((0, 0), (3, 7)):
        small = rng.integers(0, 4, (2, 9, 8, 7)).astype(np.uint8)
        # Tumour up to the border of the grid, then the same with air around it.
        near = evaluate(small[0], small[1], (1.0, 2.0, 3.0))
        far = evaluate(*(np.pad(x, pad) for x in small), (1.0, 2.0, 3.0))
        for name in near:
            for key in set(near[name]) - {"specificity"}:  # counts the air
                assert near[name][key] == far[name][key], (name, key)


def test_joint_box_of_nothing_is_empty():
    assert metrics.joint_box(*np.zeros((2, 3, 3, 3), bool)) == (slice(0, 0),) * 3


def test_masks_give_what_labels_give():
    rng = np.random.default_rng(6)
    p, r = rng.integers(0, 4, (2, 8, 8, 8))
    regions = {"WT": (1, 2, 3), "ET": (3,)}
    masks = [{name: np.isin(x, v) for name, v in regions.items()} for x in (p, r)]
    assert evaluate(*masks, UNIT) == evaluate(p, r, UNIT, regions=regions)
    assert list(evaluate(*masks, UNIT, regions=["ET"])) == ["ET"]


def test_what_does_not_fit_is_refused():
    labels = np.zeros((4, 4, 4), np.uint8)
    with pytest.raises(ValueError, match=r"\(4, 4, 3\).*one 3-D grid"):
        evaluate(labels[..., :3], labels, UNIT)
    with pytest.raises(ValueError, match="float32.*threshold"):
        evaluate(labels.astype(np.float32), labels, UNIT)
    with pytest.raises(ValueError, match="spacing"):
        evaluate(labels, labels, (1.0, 0.0, 1.0))
    with pytest.raises(ValueError, match="0 is background"):
        evaluate(labels, labels, UNIT, regions={"all": (0, 1)})
    with pytest.raises(ValueError, match="one kind"):
        evaluate({"WT": labels}, labels, UNIT)
    with pytest.raises(ValueError, match="mask for each"):
        evaluate({"WT": labels}, {"ET": labels}, UNIT)


def test_real_case_against_itself_moved_by_one_voxel(real_data):
    name = "BraTS2021_01476"
    file = nibabel.load(real_data / "brats" / name / f"{name}_seg.nii.gz")
    reference = np.asarray(file.dataobj).astype(np.uint8)
    reference[reference == 4] = 3
    result = evaluate(np.roll(reference, 1, axis=0), reference, UNIT)
    assert result["WT"]["hd95"] == pytest.approx(1.0)
    assert 0.9 < result["WT"]["dice"] < 1
    assert evaluate(reference, reference, UNIT)["ET"]["dice"] == 1.0
