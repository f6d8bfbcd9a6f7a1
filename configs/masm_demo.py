"""MASM (tiny) on phantoms, on a CPU: what ``make demo`` trains (with ``gumbel.quiet=0.75``).

    make demo

Phantoms are simulated (masm_jax/phantom.py): these results are phantom results, not BraTS results.
"""

from configs import masm_laptop


def get_config():
    """masm_laptop on phantoms of 3 mm, where a smaller crop holds most of a brain."""
    config = masm_laptop.get_config()
    config.total_steps = 1100
    config.patch = 48
    config.augment = "swin"  # the phantoms come with shading of their own
    config.model.detail = 0  # quicker
    config.infer.minimum_ml = 8.0  # the training phantoms have no enhancing tumour, or over 10 ml
    config.data.records = "demo/records"
    config.data.spacing = 0.0  # of the scans
    config.data.split = "holdout:" + ",".join(f"Phantom_{i:05d}" for i in range(32, 40))
    return config
