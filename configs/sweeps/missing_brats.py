"""Missing modalities on real scans at 2 mm: MASM and the U-Net, trained with and without losses.

    python -m masm_jax.prepare --input=BRATS --output=records/brats2mm --spacing=2
    python -m masm_jax.sweep --config=configs/sweeps/missing_brats.py --workdir=runs/missing_brats

The rows of missing.py with configs/masm_laptop.py, ten minutes a run of MASM on a core. Two cases
are scored (``--set data.split=...`` names others): for a sense of direction.
"""

from configs import sweeps
from configs.sweeps import missing


def get_sweep():
    """The rows of missing.py: MASM trained for it first."""
    return sweeps.on_scans(missing.get_sweep()["rows"])
