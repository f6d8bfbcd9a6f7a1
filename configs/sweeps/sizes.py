"""The sizes of MASM at an equal number of steps: what base gives up against full, and tiny.

    make sweep-records
    python -m masm_jax.sweep --config=configs/sweeps/sizes.py --workdir=runs/sizes

Coarse phantoms and 300 steps: for a sense of direction, not for BraTS.
"""

from configs import sweeps


def get_sweep():
    """Full, the literal reading, first; "-detail": a last level at the resolution of the scans."""
    rows = {size: {"model.size": size} for size in ("full", "base", "tiny")}
    for size, channels in (("base", 12), ("tiny", 16)):
        rows[f"{size}-detail"] = {"model.size": size, "model.detail": channels}
    rows["unet-tiny-detail"] = {"model.mixers": (), "model.detail": 16}
    return sweeps.on_phantoms(rows)
