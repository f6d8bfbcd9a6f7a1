"""Missing modalities: MASM and the concatenation U-Net, trained with and without losing some.

    make sweep-records
    python -m masm_jax.sweep --config=configs/sweeps/missing.py --workdir=runs/missing
    python -m masm_jax.subsets --workdir=runs/missing/masm-dropout \
        --workdir=runs/missing/unet-dropout --output=runs/subsets

The sweep scores all modalities together; ``masm_jax.subsets`` scores each of the 15 subsets. Where
one is missing, the U-Net is fed zeros. Coarse phantoms and 300 steps: for a sense of direction, not
for BraTS.
"""

from configs import sweeps

DROPOUT = {"data.modality_dropout": 0.5}  # of the crops lose some, at random


def get_sweep():
    """MASM trained for it first."""
    return sweeps.on_phantoms({
        "masm-dropout": DROPOUT,
        "unet-dropout": DROPOUT | {"model.mixers": ()},
        "masm": {},
        "unet": {"model.mixers": ()},
    })  # fmt: skip
