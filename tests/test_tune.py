"""Choosing how probabilities become labels."""

import numpy as np
import pytest

from masm_jax import tune
from masm_jax.data.conventions import REGIONS

START = {
    "threshold": [0.5],
    "minimum_ml": 0.0,
    "largest_component": False,
    "fill_holes": False,
}


def case(name, *, level=1.0, false_ml=0.0, far=False, enhancing=True):
    """A cube of 8 ml with a core; probabilities of ``level`` inside and 0 outside.

    ``false_ml``: enhancing tumour that is not there; ``far``: a false lesion elsewhere.
    """
    label = np.zeros((40, 40, 40), np.uint8)
    label[10:30, 10:30, 10:30] = 2
    label[12:24, 12:24, 12:24] = 1
    if enhancing:
        label[12:20, 12:20, 12:20] = 3
    probabilities = np.stack([np.isin(label, v) for v in REGIONS.values()]).astype(np.float32)
    probabilities *= level
    count = round(1000 * false_ml)
    spots = np.argwhere(label == 1)[:count]
    probabilities[(2, *spots.T)] = 0.9
    if far:
        probabilities[0, 33:39, 33:39, 33:39] = 0.9
    return tune.Case(name, probabilities, label, (1.0, 1.0, 1.0), REGIONS)


def test_perfect_probabilities_are_left_alone():
    cases = [case("a"), case("b", enhancing=False)]
    assert tune.mean_dice(cases, START).tolist() == [1, 1, 1]
    assert tune.choose(cases, START, 3) == START


def test_a_timid_network_gets_a_lower_threshold():
    cases = [case("a", level=0.45), case("b", level=0.45)]
    assert tune.mean_dice(cases, START).tolist() == [0, 0, 0]
    chosen = tune.choose(cases, START, 3)
    assert tune.mean_dice(cases, chosen).tolist() == [1, 1, 1]
    assert all(threshold < 0.45 for threshold in chosen["threshold"])
    assert chosen | {"threshold": [0.5]} == START


def test_false_alarms_of_enhancing_tumour_set_the_least_volume():
    """0.512 ml are real in the one, 0.3 ml false in the other: only 0.5 parts them."""
    cases = [case("a"), case("b", enhancing=False, false_ml=0.3)]
    assert tune.mean_dice(cases, START)[2] == 0.5
    chosen = tune.choose(cases, START, 3)
    assert chosen["minimum_ml"] == 0.5
    assert tune.mean_dice(cases, chosen).tolist() == [1, 1, 1]


def test_a_false_lesion_elsewhere_turns_on_the_largest():
    cases = [case("a", far=True)]
    assert tune.choose(cases, START, 3) == START | {"largest_component": True}


def test_cross_fitting_scores_a_case_by_the_rules_of_the_others():
    """One odd case of three: chosen on the other two, the rules fail on it."""
    cases = [case("a"), case("b"), case("odd", level=0.45)]
    chosen = tune.choose(cases, START, 3)
    assert tune.mean_dice(cases, chosen).tolist() == [1, 1, 1]
    assert tune.cross_fitted(cases, START, 3).tolist() == pytest.approx([2 / 3] * 3)


def test_the_cut_changes_nothing():
    """Dice of the whole arrays is that of the box, holes at its edge included."""
    from masm_jax.evaluation.metrics import dice
    from masm_jax.inference.postprocess import decode

    random = np.random.default_rng(0)
    probabilities = np.zeros((3, 20, 20, 20), np.float32)
    probabilities[:, 4:12, 6:15, 3:9] = random.random((3, 8, 9, 6))
    label = np.zeros((20, 20, 20), np.uint8)
    label[8:13, 6:10, 3:9] = random.integers(0, 4, (5, 4, 6))
    rules = START | {"largest_component": True, "fill_holes": True, "minimum_ml": 0.1}
    found = tune.Case("a", probabilities, label, (2.0, 2.0, 2.0), REGIONS).dice(rules)
    whole = decode(
        probabilities.astype(np.float16), largest=True, fill=True, minimum=13, threshold=0.5
    )
    expected = [dice(np.isin(whole, v), np.isin(label, v)) for v in REGIONS.values()]
    assert found == expected
