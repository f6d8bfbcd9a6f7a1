"""The sizes of MASM on real scans at 2 mm: what half the resolution costs there, and `detail`.

    python -m masm_jax.prepare --input=BRATS --output=records/brats2mm --spacing=2
    python -m masm_jax.sweep --config=configs/sweeps/sizes_brats.py --workdir=runs/sizes_brats

Two cases are scored: for a sense of direction.
"""

from configs import sweeps
from configs.sweeps import sizes


def get_sweep():
    """The rows of sizes.py."""
    return sweeps.on_scans(sizes.get_sweep()["rows"])
