"""The shared encoder: the U-Net's, UNETR's, Swin UNETR's; with MASM's mixers, and as published.

    make sweep-records
    python -m masm_jax.sweep --config=configs/sweeps/backbones.py --workdir=runs/backbones

All of size tiny, which is not the published one. UNETR and Swin UNETR end at the resolution of the
scans; our U-Net ends at half of it, and with "-detail" at all of it too. Coarse phantoms and 300
steps: for a sense of direction, not for BraTS.
"""

from configs import sweeps


def get_sweep():
    """MASM with its U-Net first; "-plain" has no mixers and the modalities as channels."""
    rows = {}
    for backbone in ("unet", "unetr", "swin_unetr"):
        rows[f"masm-{backbone}"] = {"model.backbone": backbone}
        rows[f"{backbone}-plain"] = {"model.backbone": backbone, "model.mixers": ()}
    rows["masm-unet-detail"] = rows["masm-unet"] | {"model.detail": 8}
    rows["unet-plain-detail"] = rows["unet-plain"] | {"model.detail": 8}
    return sweeps.on_phantoms(rows)
