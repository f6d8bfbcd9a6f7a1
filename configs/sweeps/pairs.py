"""Which modalities the Modality-Aware mixers pair: the clinical pairs, others, all, none.

    make sweep-records
    python -m masm_jax.sweep --config=configs/sweeps/pairs.py --workdir=runs/pairs

Coarse phantoms and 300 steps: for a sense of direction, not for BraTS.
"""

import itertools

from configs import sweeps

MODALITIES = ("t1", "t1ce", "t2", "flair")


def get_sweep():
    """T1 with T1ce, T2 with FLAIR first; "no-pairs" keeps the Modality-Shift mixer of level 6."""
    return sweeps.on_phantoms({
        "clinical": {"model.pairs": (("t1", "t1ce"), ("t2", "flair"))},
        "t1-t2": {"model.pairs": (("t1", "t2"), ("t1ce", "flair"))},
        "t1-flair": {"model.pairs": (("t1", "flair"), ("t1ce", "t2"))},
        "all-six": {"model.pairs": tuple(itertools.combinations(MODALITIES, 2))},
        "no-pairs": {"model.mixers": ("concat",) * 5 + ("shift",)},
        "no-mixers": {"model.mixers": ("concat",) * 6},
    })  # fmt: skip
