"""What the long runs (soak.py) take for growth."""

import numpy as np
import pytest

from tests.faults import soak

RANDOM = np.random.default_rng(0)
SAWTOOTH = 900 + 300 * RANDOM.random(1000)  # MB, as checkpoints come and go


@pytest.mark.parametrize(
    ("quantity", "values", "grows"),
    [
        ("memory, MB", SAWTOOTH, False),
        ("memory, MB", np.where(np.arange(1000) == 950, 1500, SAWTOOTH), False),  # one peak
        ("memory, MB", SAWTOOTH + np.linspace(0, 150, 1000), True),
        ("memory, MB", SAWTOOTH + np.linspace(150, 0, 1000), False),
        ("threads", np.full(1000, 28), False),
        ("threads", np.where(np.arange(1000) < 700, 28, 29), True),
        ("open files", np.where(np.arange(1000) == 950, 23, 22), True),
    ],
)
def test_growth_is_seen_and_chance_is_not(quantity, values, grows):
    assert soak.ends(quantity, values)[2] == grows
