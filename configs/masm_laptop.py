"""MASM (tiny) at 2 mm on a handful of real cases, on a CPU: for trying it all on a laptop.

    python -m masm_jax.prepare --input=BRATS --output=records/brats2mm --spacing=2
    python train.py --config=configs/masm_laptop.py --workdir=runs/laptop \
        --config.data.split=holdout:BraTS2021_01482,BraTS-GLI-00000-000

Times and Dice on ten cases: docs/results.md.
"""

from configs import masm_brats


def get_config():
    """masm_brats, shrunk to minutes on two cores."""
    config = masm_brats.get_config()
    config.total_steps = 400  # with eight cases, more overfit (docs/results.md)
    config.batch_size = 1
    config.patch = 64  # most of a brain at 2 mm: smaller crops learn far worse (docs/results.md)
    config.augment = "scanner"  # few cases: fewer false lesions than "swin" (docs/results.md)
    config.data.records = "records/brats2mm"
    config.data.spacing = 2.0
    config.model.size = "tiny"
    config.model.encoder_single = 1  # half of level 1 would be 8 channels (docs/sweeps.md)
    config.model.dtype = "float32"
    config.loss.keep_target = 0.9  # few steps: who has learnt little should prune little
    # Noise to the end: it regularises, with eight cases, and without it nothing is pruned. With
    # 0.75, as in masm_brats.py, masks decide, and MASM was ahead in fewer seeds (docs/results.md).
    config.gumbel.quiet = 1e6
    config.optim.learning_rate = 3e-3
    config.optim.warmup_steps = 25
    config.optim.ema_decay = 0.99
    config.log.every = 10
    config.log.patch_every = 100
    config.log.patches = 8
    config.log.volume_every = 200
    config.log.volumes = 2
    config.log.checkpoint_every = 100
    config.infer.batch = 1
    config.infer.largest_component = True  # few training cases: false lesions (docs/results.md)
    return config
