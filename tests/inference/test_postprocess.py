"""Decoding region probabilities into labels."""

import itertools

import numpy as np
import pytest

from masm_jax.inference.postprocess import decode

# (WT, TC, ET) above the threshold -> label; BraTS 2021 labels, where enhancing tumour is 4.
TRUTH = {
    (0, 0, 0): 0,
    (1, 0, 0): 2,
    (1, 1, 0): 1,
    (1, 1, 1): 4,
    (0, 1, 0): 0,  # a core without a tumour around it is none
    (0, 0, 1): 0,
    (0, 1, 1): 0,
    (1, 0, 1): 2,  # enhancing outside the core is painted as what surrounds it
}
PAINT = {"WT": 2, "TC": 1, "ET": 4}


@pytest.mark.parametrize("paint", [PAINT, [2, 1, 4], dict(reversed(PAINT.items()))])
def test_truth_table(paint):
    cases = list(itertools.product((0, 1), repeat=3))
    probabilities = np.where(np.array(cases, np.float32).T > 0, 0.51, 0.49)
    labels = decode(probabilities, paint)
    assert labels.dtype == np.uint8
    assert dict(zip(cases, labels.tolist())) == TRUTH


def test_internal_labels_by_default():
    probabilities = np.array([[0.9] * 3, [0.1, 0.9, 0.9], [0.1, 0.1, 0.9]], np.float32)
    assert decode(probabilities).tolist() == [2, 1, 3]


def test_decoding_the_regions_of_labels_gives_the_labels():
    labels = np.random.default_rng(0).integers(0, 4, (5, 6, 7)).astype(np.uint8)
    regions = [np.isin(labels, v) for v in ((1, 2, 3), (1, 3), (3,))]
    assert np.array_equal(decode(np.stack(regions).astype(np.float32)), labels)


def test_threshold_is_exclusive_and_can_be_moved():
    probabilities = np.array([[0.5, 0.6]])
    regions = {"lesion": (1,)}
    assert decode(probabilities, regions=regions).tolist() == [0, 1]
    assert decode(probabilities, regions=regions, threshold=0.4).tolist() == [1, 1]


def test_a_threshold_for_each_region():
    probabilities = np.array([[0.6, 0.6], [0.35, 0.2], [0.7, 0.9]])
    assert decode(probabilities, threshold=(0.5, 0.3, 0.8)).tolist() == [1, 2]
    with pytest.raises(ValueError, match="threshold .* for 2 regions.*WT, TC, ET"):
        decode(probabilities, threshold=(0.5, 0.3))


def test_holes_are_filled_but_the_necrosis_stays():
    """Along a line through three nested hollow balls: what each encloses on all sides."""
    centre = np.linalg.norm(np.indices((21, 21, 21)) - 10, axis=0)
    probabilities = np.stack(
        [(centre > 8.2) & (centre < 9.5) | (centre < 2), centre < 5, (centre > 3) & (centre < 5)]
    ).astype(np.float32)
    probabilities[1, 10, 10, 10] = 0  # a hole of one voxel in the core
    assert set(decode(probabilities)[10, 10, 10:]) == {2, 1, 0}
    line = decode(probabilities, fill=True)[10, 10, 10:].tolist()
    assert line == [1, 1, 1, 1, 3, 2, 2, 2, 2, 2, 0]
    probabilities[0, 10, 10, 15:] = 0  # the outer ball is open now: no hole any more
    assert decode(probabilities, fill=True)[10, 10, 17] == 0


def test_regions_that_are_not_nested_are_painted_in_order():
    regions = {"oedema": (2,), "core": (1,)}
    probabilities = np.array([[1, 1, 0, 0], [0, 1, 1, 0]], np.float32)
    assert decode(probabilities, regions=regions).tolist() == [2, 1, 1, 0]
    assert decode(probabilities, [7, 9], regions=regions).tolist() == [7, 9, 9, 0]


def test_a_region_beside_a_nested_pair_is_independent_of_it():
    regions = {"WT": (1, 2, 3), "TC": (1, 3), "RC": (4,)}
    paint = {"WT": 2, "TC": 1, "RC": 4}
    # columns: RC alone, TC without WT, RC over WT and TC
    probabilities = np.array([[0, 0, 1], [0, 1, 1], [1, 0, 1]], np.float32)
    assert decode(probabilities, paint, regions=regions).tolist() == [4, 0, 4]


def test_what_does_not_fit_is_refused():
    three = np.zeros((3, 2), np.float32)
    with pytest.raises(ValueError, match="2 regions, expected 3"):
        decode(three[:2])
    with pytest.raises(ValueError, match="name one for each"):
        decode(three, {"WT": 2})
    with pytest.raises(ValueError, match="one label of 0 to 255"):
        decode(three, [2, 1])
    with pytest.raises(ValueError, match="one label of 0 to 255"):
        decode(three, [2, 1, 300])
    with pytest.raises(ValueError, match="no label of its own"):
        decode(three[:2], regions={"a": (1,), "b": (1,)})
    three[1, 0] = np.nan
    with pytest.raises(ValueError, match="TC hold NaN"):
        decode(three)


def test_largest_keeps_one_lesion_and_what_is_inside_it():
    """A diagonal chain is one component of 26 neighbours; the smaller lesion goes, core and all."""
    probabilities = np.zeros((3, 12, 12, 12), np.float32)
    probabilities[0, range(8), range(8), range(8)] = 1
    probabilities[:, 10:12, 10:12, 0] = 1  # four voxels, all enhancing
    probabilities[1, 3, 3, 3] = 1
    labels = decode(probabilities, largest=True)
    assert labels[10:, 10:].sum() == 0
    assert labels[3, 3, 3] == 1 and (labels > 0).sum() == 8
    assert (decode(probabilities) > 0).sum() == 12
    np.testing.assert_array_equal(decode(np.zeros((3, 4, 4, 4)), largest=True), 0)


def test_a_last_region_below_the_minimum_becomes_what_surrounds_it():
    probabilities = np.zeros((3, 6, 6, 6), np.float32)
    probabilities[:2, :3] = 1
    probabilities[2, 0, 0, :5] = 1
    assert (decode(probabilities, minimum=5) == 3).sum() == 5
    labels = decode(probabilities, minimum=6)
    assert (labels == 3).sum() == 0 and (labels == 1).sum() == 3 * 36
