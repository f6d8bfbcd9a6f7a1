r"""Ablation: the modalities concatenated at the input of a plain U-Net, no mixers.

    python train.py --config=configs/unet_brats.py --workdir=runs/unet \
        --config.data.records=records/brats

Everything else as configs/masm_brats.py, batch, patch and schedule included.
"""

from configs import masm_brats


def get_config():
    """masm_brats with other mixers."""
    config = masm_brats.get_config()
    config.model.mixers = ()
    return config
