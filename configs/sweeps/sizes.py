"""The sizes of MASM at an equal number of steps: what base gives up against full, and tiny.

    make sweep-records
    python -m masm_jax.sweep --config=configs/sweeps/sizes.py --workdir=runs/sizes

Coarse phantoms and 300 steps: for a sense of direction, not for BraTS.
"""

from configs import sweeps


def get_sweep():
    """Full, the literal reading, first; "-detail": the scans once more before the first head."""
    rows = {size: {"model.size": size} for size in ("full", "base", "tiny")}
    for size in ("base", "tiny"):
        rows[f"{size}-detail"] = {"model.size": size, "model.detail": 32}
    rows["unet-tiny-detail"] = {"model.mixers": (), "model.detail": 32}
    return sweeps.on_phantoms(rows)
