"""The compiled steps: train, evaluate a batch of patches, segment a batch of tiles.

All are pure functions for ``jax.jit``; metrics stay on the device until somebody asks.
"""

import jax
import jax.numpy as jnp
import optax

from masm_jax import losses, optim
from masm_jax.data.augment import augment


def train_step(network):
    """One step of training: (state, batch, key) -> (state, metrics).

    batch: {"image": (B, M, D, H, W) float16, "label": (B, D, H, W) uint8}. metrics: a flat dict of
    float32 scalars. All randomness is folded from (key, state["step"]); the key is an argument and
    not a constant, so that runs that differ in their seed alone share one compiled program.
    """
    config = network.config
    tx = optim.optimiser(config.optim, config.total_steps)
    schedule = optim.learning_rate(config.optim, config.total_steps)
    temperature = optim.temperature(config.gumbel, config.total_steps)
    noise = optim.gumbel_noise(config.gumbel, config.total_steps)
    keep_target = optim.keep_target(config.loss, config.total_steps)
    regions = list(network.regions.values())

    def step(state, batch, key):
        augment_key, gumbel_key = jax.random.split(jax.random.fold_in(key, state["step"]))
        image, label = augment(
            augment_key, batch["image"].astype(jnp.float32), batch["label"], recipe=config.augment
        )
        targets = losses.region_targets(label, regions)
        heat = temperature(state["step"])

        def loss_fn(params):
            gumbel = {"key": gumbel_key, "temperature": heat, "noise": noise(state["step"])}
            logits, keep = network.apply(params, image, deep=True, **gumbel)
            segmentation, parts = losses.segmentation_loss(
                logits, targets, batch_dice=config.loss.batch_dice
            )
            ratio = losses.ratio_loss(keep, keep_target(state["step"]))
            loss = segmentation + config.loss.ratio_weight * ratio
            return loss, (parts | {"ratio_loss": ratio}, losses.keep_ratios(keep))

        (loss, (parts, ratios)), gradient = jax.value_and_grad(loss_fn, has_aux=True)(
            state["params"]
        )
        updates, opt_state = tx.update(gradient, state["opt_state"], state["params"])
        params = optax.apply_updates(state["params"], updates)
        metrics = {
            "train/loss": loss,
            **{f"train/{name}": value for name, value in parts.items()},
            "train/learning_rate": schedule(state["step"]),
            "train/grad_norm": optax.tree.norm(gradient),
        }
        if ratios:
            metrics["train/temperature"] = heat
            metrics |= {f"train/keep/{level}": ratio.mean() for level, ratio in ratios.items()}
        state = {
            "step": state["step"] + 1,
            "params": params,
            "ema": optim.average(state["ema"], params, state["step"], config.optim.ema_decay),
            "opt_state": opt_state,
        }
        return state, jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), metrics)

    return step


def eval_step(network):
    """Overlap on a batch of patches: (params, batch) -> {"overlap", "total"}: (R,) float32 sums.

    2 * overlap / total, summed over many batches, is nnU-Net's "pseudo Dice": of patches, not of
    cases. "keep": {level: mean of the decisions}, which are made without noise here.
    """
    regions = list(network.regions.values())

    def step(params, batch):
        logits, keep = network.apply(params, batch["image"])
        predicted = (logits[0] > 0).astype(jnp.float32)
        targets = losses.region_targets(batch["label"], regions)
        axes = (0, 1, 2, 3)
        return {
            "overlap": (predicted * targets).sum(axes),
            "total": predicted.sum(axes) + targets.sum(axes),
            "keep": {level: ratio.mean() for level, ratio in losses.keep_ratios(keep).items()},
        }

    return step


def segment_step(network):
    """Tiles to logits: (params, (B, M, D, H, W)) -> (B, D, H, W, R) float32."""

    def step(params, image):
        return network.apply(params, image)[0][0]

    return step


def keep_names(network):
    """(level, modality) of every channel of ``keep_step``; none without Modality-Aware mixers."""
    members = [modality for pair in network.config.model.pairs for modality in pair]
    mixers = tuple(network.config.model.mixers)
    return [
        (f"level{level}", modality)
        for level, mixer in enumerate(mixers, 1) if mixer == "aware"
        for modality in members
    ]  # fmt: skip


def keep_step(network):
    """Tiles to what the mixers keep of them, voxel by voxel.

    (params, (B, M, p, p, p)) -> (B, p, p, p, K) logits of +-20, channels as ``keep_names``: what
    averages the probabilities of tiles then averages their decisions.
    """

    def step(params, image):
        _, keep = network.apply(params, image)
        channels = []
        for level in dict.fromkeys(level for level, _ in keep_names(network)):
            votes = jnp.moveaxis(keep[level], 1, -1)
            for axis in (1, 2, 3):
                votes = jnp.repeat(votes, image.shape[axis + 1] // votes.shape[axis], axis)
            channels.append(votes)
        return 40.0 * jnp.concatenate(channels, -1).astype(jnp.float32) - 20.0

    return step
