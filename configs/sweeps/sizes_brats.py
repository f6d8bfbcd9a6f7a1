"""The sizes of MASM on real scans at 2 mm: what half the resolution costs there, and `detail`.

    python -m masm_jax.prepare --input=BRATS --output=records/brats2mm --spacing=2
    python -m masm_jax.sweep --config=configs/sweeps/sizes_brats.py --workdir=runs/sizes_brats

Two cases are scored: for a sense of direction.
"""

from configs.sweeps import missing_brats, sizes


def get_sweep():
    """The rows of sizes.py."""
    return missing_brats.get_sweep() | {"rows": sizes.get_sweep()["rows"]}
