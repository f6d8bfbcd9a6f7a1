"""The mosaic of the Modality-Shift mixer: named patterns, random ones, and those that are learnt.

    make sweep-records
    python -m masm_jax.sweep --config=configs/sweeps/mosaics.py --workdir=runs/mosaics

The number behind a name is the edge of the cell that is repeated. Levels 3 to 6 shift here: level 3
has a grid of 4x4x4 tokens, on which cells of 1 to 4 differ; level 6 alone has 2x2x2, and adds
little in so few steps (docs/sweeps.md). Coarse phantoms and 300 steps: for a sense of direction,
not for BraTS.
"""

from configs import sweeps


def get_sweep():
    """The pattern of the config first; what was learnt is drawn in each evaluation."""
    named = ("bayer3d", "none", "bayer", "tps", "diagonal")
    random = ("random:0", "random:1", "random:0:4")
    learnt = ("learnt:1", "learnt:2", "learnt:4")
    rows = {
        mosaic.replace(":", "-"): {"model.mosaic": mosaic} for mosaic in named + random + learnt
    }
    return sweeps.on_phantoms(rows, **{"model.mixers": ("aware",) * 2 + ("shift",) * 4})
