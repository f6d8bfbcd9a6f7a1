r"""Ablation: shared encoder, skips concatenated without mixers: what the mixers must beat.

    python train.py --config=configs/late_brats.py --workdir=runs/late \
        --config.data.records=records/brats

Everything else as configs/masm_brats.py; only this one isolates what the mixers add.
"""

from configs import masm_brats


def get_config():
    """masm_brats with other mixers."""
    config = masm_brats.get_config()
    config.model.mixers = ("concat",) * 6
    return config
