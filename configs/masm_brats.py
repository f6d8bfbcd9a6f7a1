r"""MASM (base) on BraTS 2021/2023: the full setting.

    python -m masm_jax.prepare --input=BRATS --output=records/brats --spacing=1
    python train.py --config=configs/masm_brats.py --workdir=runs/masm \
        --config.data.records=records/brats
    python eval.py --workdir=runs/masm --split=val --output=runs/masm/eval

Meant for one node of accelerators (8 x 128^3 per step). Not run at full length by us: its Dice on
BraTS is not known. What was measured, where and when, is in docs/results.md.
"""

import ml_collections


def get_config():
    """The complete list of keys; the other configs change a few of them."""
    config = ml_collections.ConfigDict()
    config.seed = 0  # of parameters, data order, augmentation and Gumbel noise
    config.total_steps = 60_000  # optimiser steps; the schedules end here
    config.batch_size = 8  # crops per step over all devices and processes
    config.accumulate = 1  # parts that a batch is worked on in: less memory, a third more time
    # Edge of a crop in voxels; or three, (D, H, W), such as (256, 256, 160) for whole volumes.
    config.patch = ml_collections.FieldReference(128, field_type=object)
    config.augment = "nnunet"  # nnunet, swin, scanner or none (data/augment.py)
    config.stop_at_step = 0  # leave after this step as if preempted (0 = never)

    config.mesh = mesh = ml_collections.ConfigDict()
    mesh.data = 0  # devices over which the batch is cut; 0: all that `spatial` leaves
    mesh.spatial = 1  # devices over which the depth of every volume is cut (docs/scaling.md)

    config.data = data = ml_collections.ConfigDict()
    data.records = "records/brats"  # folder made by masm_jax.prepare
    data.spacing = 1.0  # mm of the records, checked against them (0 = whatever they have)
    # "K/N" = fold K of N, "holdout:ID,ID", or a JSON file {"train", "val", "test"}
    data.split = "0/5"
    data.split_seed = 0  # of the shuffle before "K/N": the folds stay where seed changes
    data.foreground = 1 / 3  # share of crops centred on tumour
    # Share of the crops that lose modalities, so that scans may be missing later: a random subset
    # of them, at least one, stays (docs/data.md)
    data.modality_dropout = 0.0
    data.workers = 0  # reader processes; 0 reads in threads, enough for memory-mapped records

    config.model = model = ml_collections.ConfigDict()
    # The encoder that the modalities share: unet, unetr or swin_unetr; the latter two without
    # mixers are the networks as published, and have no size "full"
    model.backbone = "unet"
    # Weights of MONAI's UNETR or SwinUNETR to start from (.pt, .pth, .npz; docs/paper.md); "": none
    model.start_from = ""
    model.size = "base"  # tiny, base or full (models/sizes.py)
    # Channels of the U-Net's encoder, times those of the decoder: it runs once for each modality.
    # With 1, for 1.7 times the multiply-adds, trainings of minutes show no clear gain; of hours
    # nothing is known (docs/sweeps.md). The plain U-Net, where it runs once, has 1
    model.encoder_width = 0.5
    # Its first so many levels have one convolution in place of two and, where they are fused, all
    # the channels, for as many multiply-adds; 1 pays in size tiny (docs/sweeps.md)
    model.encoder_single = 0
    # At its first so many levels the modalities are fused to one skip, for which the decoder is
    # cheaper; at the others it looks at all of them side by side (docs/sweeps.md)
    model.fused_levels = 6
    model.mixers = ("aware",) * 5 + ("shift",)  # per level: aware, shift, concat; () = plain U-Net
    # Of the Modality-Aware mixer; a modality may be in several, or in none; (): the description's
    model.pairs = (("t1", "t1ce"), ("t2", "flair"))
    # Of the Modality-Shift mixer: a named one, "random:SEED", "learnt", or a table of integers
    # (models/mosaic.py)
    model.mosaic = "bayer3d"
    # What follows its attention over modalities, in this order: channel, gate, window
    model.shift_extras = ()
    # What becomes of pruned patches: replace, the partner's come in their place; mask, they stay,
    # but nothing attends to them; none: nothing is pruned
    model.pruning = "replace"
    model.aware_depth = 1  # attention blocks per Modality-Aware mixer
    model.shift_depth = 2  # blocks of the Modality-Shift mixer
    model.keep_bias = 5.0  # logit of "keep" at the start: sigmoid(5) = 99 % of the tokens
    # Channels at the resolution of the scans that correct the first logits: what the half
    # resolution of level 1 loses in base and tiny (models/detail.py; the other sizes begin at full
    # resolution and have none). 0: none, quicker on a CPU, less Dice (docs/sweeps.md)
    model.detail = 8
    model.modality_affine = False  # norms learn a scale and shift per modality
    # What is computed again on the way back instead of kept: none; blocks: norms and activations;
    # full: all but the results of a level (docs/scaling.md has bytes and time)
    model.remat = "none"
    model.dtype = "bfloat16"  # of the computation; parameters and reductions are float32

    config.loss = loss = ml_collections.ConfigDict()
    loss.batch_dice = True  # sum Dice over the batch (ET is absent from some crops)
    loss.keep_target = 0.7  # share of tokens to keep from half of the run on; falls from 1 to it
    loss.ratio_weight = 0.1  # weight of (mean keep - target)^2

    config.optim = optim = ml_collections.ConfigDict()
    optim.name = "adamw"  # adamw or sgd (Nesterov)
    optim.learning_rate = 1e-3  # peak
    optim.schedule = "cosine"  # cosine, poly or constant, after the warm-up
    optim.warmup_steps = 500
    optim.weight_decay = 1e-2  # on kernels alone; nnU-Net's SGD takes 3e-5
    optim.momentum = 0.99  # of sgd
    optim.clip_norm = 12.0  # global gradient norm
    optim.ema_decay = 0.999  # averaged weights, used for evaluation (0 = the weights themselves)
    optim.mixer_rate = 1.0  # multiplies the learning rate of the mixers

    config.gumbel = gumbel = ml_collections.ConfigDict()
    gumbel.start = 1.0  # temperature at the first step
    gumbel.end = 0.3  # and at the last, exponential between
    gumbel.quiet = 0.75  # share of the run at which the noise has died away, linearly

    config.log = log = ml_collections.ConfigDict()
    log.every = 50  # steps between lines of metrics.jsonl
    log.patch_every = 1000  # steps between pseudo Dice on validation crops (0 = never)
    log.patches = 64  # how many crops
    log.volume_every = 5000  # steps between full-volume Dice (0 = never)
    log.volumes = 16  # how many validation cases
    log.overlays = 4  # how many of them are drawn, to overlays/ and TensorBoard
    log.checkpoint_every = 1000  # steps between checkpoints
    log.keep = 2  # how many of the newest are kept, beside the best; one may turn out broken

    config.infer = infer = ml_collections.ConfigDict()
    infer.overlap = 0.5  # of neighbouring tiles
    infer.batch = 4  # tiles per compiled call
    # float32, bfloat16, or auto: model.dtype, but on a CPU float32, which is six times as fast
    infer.dtype = "auto"
    infer.flips = ()  # axes (0, 1, 2) mirrored at test time; (0, 1, 2) averages 8 views
    # Share of the tokens that the Modality-Aware mixers work on, by score (docs/performance.md)
    infer.token_share = 1.0
    infer.present = ()  # modalities to work with, as if the others were missing; () = all
    infer.average = 1  # newest checkpoints whose weights are averaged; log.keep must be as many
    infer.runs = ()  # folders of more runs, such as folds: probabilities are averaged with theirs
    infer.threshold = (0.5,)  # on the probability: one for all regions, or one each
    infer.largest_component = False  # of the whole tumour keep the largest part alone
    infer.fill_holes = False  # of the whole tumour and the core
    infer.minimum_ml = 0.0  # enhancing tumour smaller than this becomes core

    config.evaluation = evaluation = ml_collections.ConfigDict()
    evaluation.tolerance = 1.0  # mm, of the normalised surface Dice
    evaluation.styles = ("brats2023", "brats2025")  # lesion-wise metrics (evaluation/lesions.py)
    return config
