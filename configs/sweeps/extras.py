"""What may follow the Modality-Shift attention: nothing, gates, windows, and them together.

    make sweep-records
    python -m masm_jax.sweep --config=configs/sweeps/extras.py --workdir=runs/extras

Coarse phantoms and 300 steps: for a sense of direction, not for BraTS.
"""

import itertools

from configs import sweeps

EXTRAS = ("channel", "gate", "window")


def get_sweep():
    """Every subset of the extras, the empty one first."""
    subsets = [s for size in range(4) for s in itertools.combinations(EXTRAS, size)]
    rows = {"-".join(subset) or "none": {"model.shift_extras": subset} for subset in subsets}
    return sweeps.on_phantoms(rows)
