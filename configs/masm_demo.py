"""MASM (tiny) on phantoms, on a CPU: what ``make demo`` trains.

    make demo

Phantoms are simulated (masm_jax/phantom.py): these results are phantom results, not BraTS results.
"""

from configs import masm_brats


def get_config():
    """masm_brats, shrunk to minutes on two cores."""
    config = masm_brats.get_config()
    config.total_steps = 300
    config.batch_size = 2
    config.patch = 48
    config.augment = "swin"
    config.data.records = "demo/records"
    config.data.spacing = 0.0
    config.data.split = "demo/split.json"
    config.model.size = "tiny"
    config.model.dtype = "float32"
    config.optim.learning_rate = 2e-3
    config.optim.warmup_steps = 20
    config.optim.ema_decay = 0.99
    config.log.every = 10
    config.log.patch_every = 100
    config.log.patches = 8
    config.log.volume_every = 0
    config.log.checkpoint_every = 100
    config.infer.batch = 2
    return config
