"""Checks on a config, all of them, once: value, expectation, fix."""

import math

from masm_jax.evaluation.lesions import STYLES
from masm_jax.models.aware import PRUNING
from masm_jax.models.masm import MIXERS, REMAT, divisor, edges
from masm_jax.models.mosaic import learnt_edge, offsets
from masm_jax.models.shift import EXTRAS
from masm_jax.models.sizes import BACKBONES


def validate(config):
    """Check a config by itself.

    Raises:
      ValueError: one line per fault, each with the value, what was expected and what to do.
    """
    faults = []

    def check(good, key, value, expectation):
        if not good:
            faults.append(f"config.{key} = {value!r}: expected {expectation}")

    def among(key, value, choices):
        check(value in choices, key, value, "one of " + ", ".join(map(str, choices)))

    model, optim, data, log = config.model, config.optim, config.data, config.log
    among("augment", config.augment, ("nnunet", "swin", "scanner", "none"))
    among("model.backbone", model.backbone, tuple(BACKBONES))
    among("model.size", model.size, tuple(BACKBONES.get(model.backbone, BACKBONES["unet"])))
    check(
        not model.start_from or model.backbone != "unet", "model.start_from", model.start_from,
        "nothing with model.backbone='unet': MONAI's weights are those of unetr or swin_unetr",
    )  # fmt: skip
    if model.backbone != "unet":
        check(
            config.mesh.spatial == 1, "mesh.spatial", config.mesh.spatial,
            f"1: the transformer of model.backbone={model.backbone!r} sees whole volumes",
        )  # fmt: skip
        check(
            not model.modality_affine, "model.modality_affine", model.modality_affine,
            f"False: the norms of model.backbone={model.backbone!r} have no parameters",
        )  # fmt: skip
    check(
        0 < model.encoder_width <= 4, "model.encoder_width", model.encoder_width,
        "above 0, at most 4",
    )  # fmt: skip
    check(
        0 <= model.encoder_single <= 6, "model.encoder_single", model.encoder_single,
        "0 to 6, levels of the encoder",
    )  # fmt: skip
    check(
        0 <= model.fused_levels <= 6, "model.fused_levels", model.fused_levels,
        "0 to 6, levels whose skip is fused",
    )  # fmt: skip
    among("model.dtype", model.dtype, ("float32", "bfloat16"))
    among("model.remat", model.remat, REMAT)
    among("model.pruning", model.pruning, PRUNING)
    check(
        config.batch_size % max(1, config.accumulate) == 0,
        "accumulate",
        config.accumulate,
        f"a divisor of batch_size ({config.batch_size})",
    )
    among("optim.name", optim.name, ("adamw", "sgd"))
    among("optim.schedule", optim.schedule, ("cosine", "poly", "constant"))
    for key in ("total_steps", "batch_size", "accumulate"):
        check(config[key] >= 1, key, config[key], "1 or more")
    patch = config.patch
    if isinstance(patch, list):  # of JSON
        patch = tuple(patch)
    given = patch if isinstance(patch, tuple) else (patch,) * 3
    check(
        len(given) == 3 and all(isinstance(edge, int) and edge >= 1 for edge in given),
        "patch",
        patch,
        "one edge in voxels, or three (D, H, W)",
    )
    for key in ("data", "spatial"):
        least = 1 if key == "spatial" else 0
        check(config.mesh[key] >= least, f"mesh.{key}", config.mesh[key], f"{least} or more")
    check(0 <= config.seed < 2**32 - 1, "seed", config.seed, "0 to 2^32 - 2")
    for key in ("every", "checkpoint_every", "patches", "volumes"):
        check(log[key] >= 1, f"log.{key}", log[key], "1 or more")
    for key in ("patch_every", "volume_every"):
        check(log[key] >= 0, f"log.{key}", log[key], "0 (never) or a number of steps")
    check(log.overlays >= 0, "log.overlays", log.overlays, "0 or more")
    for key in ("aware_depth", "shift_depth"):
        check(model[key] >= 1, f"model.{key}", model[key], "1 or more")
    check(model.detail >= 0, "model.detail", model.detail, "0 (none) or more")
    for key in ("learning_rate", "clip_norm"):
        check(optim[key] > 0, f"optim.{key}", optim[key], "above 0")
    for key in (
        "optim.mixer_rate", "optim.weight_decay", "loss.ratio_weight", "data.workers",
        "data.split_seed",
    ):  # fmt: skip
        section, name = key.split(".")
        check(config[section][name] >= 0, key, config[section][name], "0 or more")
    check(0 <= optim.momentum < 1, "optim.momentum", optim.momentum, "in [0, 1)")
    check(math.isfinite(model.keep_bias), "model.keep_bias", model.keep_bias, "a number")
    check(log.keep >= 1, "log.keep", log.keep, "1 or more")
    check(
        1 <= config.infer.average <= log.keep,
        "infer.average",
        config.infer.average,
        f"1 to log.keep ({log.keep}): no more of the newest checkpoints are kept",
    )
    share = config.infer.token_share
    scored = "aware" in tuple(model.mixers) and model.pruning != "none"
    check(
        0 < share <= 1 and (scored or share == 1),
        "infer.token_share",
        share,
        "in (0, 1]" if scored else "1: this model gives tokens no scores to choose by",
    )
    among("infer.dtype", config.infer.dtype, ("auto", "float32", "bfloat16"))
    check(config.infer.batch >= 1, "infer.batch", config.infer.batch, "1 or more")
    check(config.stop_at_step >= 0, "stop_at_step", config.stop_at_step, "0 (never) or a step")
    check(
        0 <= data.modality_dropout <= 1,
        "data.modality_dropout",
        data.modality_dropout,
        "a share in [0, 1]",
    )
    check(0 <= data.foreground <= 1, "data.foreground", data.foreground, "a share in [0, 1]")
    check(0 <= config.infer.overlap < 1, "infer.overlap", config.infer.overlap, "in [0, 1)")
    threshold = tuple(config.infer.threshold)
    check(
        threshold and all(isinstance(t, int | float) and 0 < t < 1 for t in threshold),
        "infer.threshold",
        threshold,
        "numbers in (0, 1): one for all regions, or one each",
    )
    check(config.infer.minimum_ml >= 0, "infer.minimum_ml", config.infer.minimum_ml, "0 or more")
    check(
        set(config.infer.flips) <= {0, 1, 2},
        "infer.flips",
        tuple(config.infer.flips),
        "axes 0, 1, 2",
    )
    tolerance = config.evaluation.tolerance
    check(tolerance >= 0, "evaluation.tolerance", tolerance, "mm, 0 or more")
    check(
        set(config.evaluation.styles) <= set(STYLES),
        "evaluation.styles",
        tuple(config.evaluation.styles),
        "some of " + ", ".join(STYLES),
    )
    check(
        0 <= optim.warmup_steps <= config.total_steps,
        "optim.warmup_steps",
        optim.warmup_steps,
        f"between 0 and total_steps ({config.total_steps}); shorten the warm-up or train longer",
    )
    check(0 <= optim.ema_decay < 1, "optim.ema_decay", optim.ema_decay, "in [0, 1)")
    keep_target = config.loss.keep_target
    check(0 < keep_target <= 1, "loss.keep_target", keep_target, "in (0, 1]")
    for key in ("start", "end"):
        check(config.gumbel[key] > 0, f"gumbel.{key}", config.gumbel[key], "above 0")
    check(config.gumbel.quiet > 0, "gumbel.quiet", config.gumbel.quiet, "above 0 (large: noise)")
    mixers = tuple(model.mixers)
    check(
        not mixers or (len(mixers) == 6 and set(mixers) <= set(MIXERS)),
        "model.mixers",
        mixers,
        f"six entries, level 1 to 6, each one of {', '.join(MIXERS)}; or () for the plain U-Net",
    )
    pairs = [frozenset(pair) for pair in model.pairs]
    check(
        all(len(pair) == 2 for pair in pairs) and len(set(pairs)) == len(pairs),
        "model.pairs",
        model.pairs,
        "pairs of two modality names, no pair twice; or () for those of the records",
    )
    if not learnt_edge(model.mosaic):
        try:
            offsets(model.mosaic, (1, 1, 1), 4)
        except ValueError as error:
            faults.append(f"config.model.{error}")
    check(
        set(model.shift_extras) <= set(EXTRAS),
        "model.shift_extras",
        tuple(model.shift_extras),
        "some of " + ", ".join(EXTRAS),
    )
    if not faults:
        multiple = divisor(model)
        nearest = [max(multiple, round(edge / multiple) * multiple) for edge in edges(patch)]
        check(
            not any(edge % multiple for edge in edges(patch)),
            "patch",
            patch,
            f"a multiple of {multiple}, the stride of model.size={model.size!r} with its tokens; "
            f"the nearest is {nearest[0] if isinstance(patch, int) else tuple(nearest)}",
        )
        planes = edges(patch)[0] // multiple
        check(
            planes % config.mesh.spatial == 0,
            "mesh.spatial",
            config.mesh.spatial,
            f"a divisor of {planes}: a patch {edges(patch)[0]} deep has as many planes at the "
            f"lowest level, and every device needs some; make config.patch deeper, or cut less",
        )
    if faults:
        raise ValueError("\n".join(faults))


def validate_records(config, records):
    """Check a config against the records it is to be trained on.

    ``model.pairs`` = () becomes the pairs of their description.

    Raises:
      ValueError: spacing, thresholds or modalities do not fit.
    """
    if config.data.spacing and records.spacing != config.data.spacing:
        raise ValueError(
            f"config.data.spacing = {config.data.spacing}: the records in {config.data.records} "
            f"have spacing {records.spacing or 'of the scans'}; set config.data.spacing to it (0 "
            f"takes any), or prepare again with --spacing={config.data.spacing}"
        )
    check_thresholds(config, records.regions)
    unknown = [name for name in config.infer.present if name not in records.modalities]
    if unknown:
        raise ValueError(
            f"config.infer.present names {', '.join(unknown)}: the records have "
            f"{', '.join(records.modalities)}; name some of them, or () for all"
        )
    if "aware" not in tuple(config.model.mixers):
        return
    if not config.model.pairs:
        config.model.pairs = records.pairs
    named = {modality for pair in config.model.pairs for modality in pair}
    missing = sorted(named - set(records.modalities))
    if missing or not named:
        what = f"names {', '.join(missing)}" if missing else "is (), and the description has none"
        example = records.pairs or (tuple(records.modalities[:2]),)
        fix = (
            f"pair those that exist: --config.model.pairs='{example}'"
            if len(records.modalities) > 1
            else "one modality has no partner: --config.model.mixers='()' is the plain U-Net"
        )
        raise ValueError(
            f"config.model.pairs {what}: the records in {config.data.records} have "
            f"{', '.join(records.modalities)}; {fix}"
        )


def check_thresholds(config, regions):
    """One threshold, or one for each region.

    Raises:
      ValueError: another number.
    """
    thresholds = len(config.infer.threshold)
    if thresholds not in (1, len(regions)):
        raise ValueError(
            f"config.infer.threshold = {tuple(config.infer.threshold)}: {thresholds} numbers for "
            f"the regions {', '.join(regions)}; expected one, or one for each"
        )
