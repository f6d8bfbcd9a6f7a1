"""The sizes of MASM at an equal number of steps: what base gives up against full, and tiny.

    make sweep-records
    python -m masm_jax.sweep --config=configs/sweeps/sizes.py --workdir=runs/sizes

Coarse phantoms and 300 steps: for a sense of direction, not for BraTS.
"""

from configs import sweeps


def get_sweep():
    """Full, the literal reading, first; "-detail": with the corrections of models/detail.py."""
    rows = {size: {"model.size": size} for size in ("full", "base", "tiny")}
    for size in ("base", "tiny"):
        rows[f"{size}-detail"] = {"model.size": size, "model.detail": 8}
    rows["unet-tiny-detail"] = {"model.mixers": (), "model.detail": 8}
    return sweeps.on_phantoms(rows)
