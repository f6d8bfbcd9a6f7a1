r"""Baseline: Swin UNETR as published (Hatamizadeh et al., 2022), in the same training as MASM.

    python train.py --config=configs/swin_unetr_brats.py --workdir=runs/swin_unetr \
        --config.data.records=records/brats

The modalities come together as channels, there are no mixers, and one head. As the encoder that
MASM's modalities share: --config.model.mixers="('aware','aware','aware','aware','aware','shift')".
Weights of MONAI's network: --config.model.start_from=FILE.pt. Everything else as masm_brats.py. Not
trained by us.
"""

from configs import masm_brats


def get_config():
    """masm_brats with another network."""
    config = masm_brats.get_config()
    config.model.backbone = "swin_unetr"
    config.model.mixers = ()
    return config
