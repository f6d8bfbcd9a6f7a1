"""Missing modalities on real scans at 2 mm: MASM and the U-Net, trained with and without losses.

    python -m masm_jax.prepare --input=BRATS --output=records/brats2mm --spacing=2
    python -m masm_jax.sweep --config=configs/sweeps/missing_brats.py --workdir=runs/missing_brats

The rows of missing.py with configs/masm_laptop.py, ten minutes a run of MASM on a core. Two cases
are scored (``--set data.split=...`` names others): for a sense of direction.
"""

from configs.sweeps import missing


def get_sweep():
    """MASM trained for it first."""
    return missing.get_sweep() | {
        "config": "configs/masm_laptop.py",
        "common": {
            "data.split": "holdout:BraTS2021_01482,BraTS-GLI-00000-000",
            "log.volume_every": 0,  # whole cases are scored at the end
        },
    }
