"""Sweeps of ``python -m masm_jax.sweep``: each file here compares variants of one part of MASM."""

COMMON = {
    "total_steps": 300,  # minutes a run on two CPU cores
    "log.patch_every": 100,  # keep ratios without noise are of these validations
    "log.volume_every": 0,  # whole cases are scored at the end
}


def on_phantoms(rows):
    """The sweep of these rows on the phantoms of ``make demo-records``, with three seeds."""
    return {
        "config": "configs/masm_demo.py",
        "common": COMMON,
        "rows": rows,
        "seeds": (0, 1, 2),
        "split": "val",
    }
