"""The mosaic of the Modality-Shift mixer: named patterns, random ones, and those that are learnt.

    make demo-records
    python -m masm_jax.sweep --config=configs/sweeps/mosaics.py --workdir=runs/mosaics

The edge is that of the cell which is repeated; the crops of masm_demo.py give level 6 a grid of
3x3x3 tokens. Phantoms and 300 steps: for a sense of direction, not for BraTS.
"""

from configs import sweeps


def get_sweep():
    """The pattern of the config first; what was learnt is drawn in each evaluation."""
    named = ("bayer3d", "none", "bayer", "tps", "diagonal")
    random = ("random:0", "random:1", "random:0:3")
    learnt = ("learnt:1", "learnt:2", "learnt:3")
    rows = {
        mosaic.replace(":", "-"): {"model.mosaic": mosaic} for mosaic in named + random + learnt
    }
    return sweeps.on_phantoms(rows)
