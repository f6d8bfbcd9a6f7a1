r"""Ablation: Modality-Shift mixers at every level, no pair attention, nothing pruned.

    python train.py --config=configs/shift_brats.py --workdir=runs/shift \
        --config.data.records=records/brats

Everything else as configs/masm_brats.py.
"""

from configs import masm_brats


def get_config():
    """masm_brats with other mixers."""
    config = masm_brats.get_config()
    config.model.mixers = ("shift",) * 6
    return config
