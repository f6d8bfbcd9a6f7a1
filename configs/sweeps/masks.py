"""The masks of the Modality-Aware mixers: temperature, noise, keep target, and what they do.

    make sweep-records
    python -m masm_jax.sweep --config=configs/sweeps/masks.py --workdir=runs/masks

Coarse phantoms and 300 steps: for a sense of direction, not for BraTS.
"""

from configs import sweeps


def get_sweep():
    """masm_demo.py first: temperature from 1 to 0.3, noise to the end, target 0.9, weight 0.1."""
    return sweeps.on_phantoms({
        "as-configured": {},
        "temperature-1": {"gumbel.start": 1.0, "gumbel.end": 1.0},
        "temperature-0.3": {"gumbel.start": 0.3, "gumbel.end": 0.3},
        "temperature-5-to-0.1": {"gumbel.start": 5.0, "gumbel.end": 0.1},
        "quiet-0.75": {"gumbel.quiet": 0.75},
        "quiet-0.25": {"gumbel.quiet": 0.25},
        "target-0.7": {"loss.keep_target": 0.7},
        "target-0.5": {"loss.keep_target": 0.5},
        "target-0.7-quiet-0.75": {"loss.keep_target": 0.7, "gumbel.quiet": 0.75},
        "weight-0": {"loss.ratio_weight": 0.0},
        "weight-1": {"loss.ratio_weight": 1.0},
        "pruning-mask": {"model.pruning": "mask"},
        "pruning-none": {"model.pruning": "none"},
    })  # fmt: skip
