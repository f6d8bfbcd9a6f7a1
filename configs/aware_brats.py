r"""Ablation: Modality-Aware mixers at every level, no modality shift.

    python train.py --config=configs/aware_brats.py --workdir=runs/aware \
        --config.data.records=records/brats

Everything else as configs/masm_brats.py.
"""

from configs import masm_brats


def get_config():
    """masm_brats with other mixers."""
    config = masm_brats.get_config()
    config.model.mixers = ("aware",) * 6
    return config
