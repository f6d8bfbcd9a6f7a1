"""The compiled steps: train, evaluate a batch of patches, segment a batch of tiles.

All are pure functions for ``jax.jit``; metrics stay on the device until somebody asks.
"""

import jax
import jax.numpy as jnp
import optax

from masm_jax import losses, optim
from masm_jax.data.augment import augment
from masm_jax.models import spatial
from masm_jax.sharding import EXAMPLE, IMAGE, LABEL


def train_step(network):
    """One step of training: (state, batch, key) -> (state, metrics).

    batch: {"image": (B, M, D, H, W) float16, "label": (B, D, H, W) uint8}. metrics: a flat dict of
    float32 scalars. All randomness is folded from (key, state["step"]) and the place in the batch;
    the key is an argument and not a constant, so that runs that differ in their seed alone share
    one compiled program.
    """
    config = network.config
    tx = optim.optimiser(config.optim, config.total_steps)
    schedule = optim.learning_rate(config.optim, config.total_steps)
    temperature = optim.temperature(config.gumbel, config.total_steps)
    noise = optim.gumbel_noise(config.gumbel, config.total_steps)
    keep_target = optim.keep_target(config.loss, config.total_steps)
    regions = list(network.regions.values())

    def local_terms(params, image, label, keys, present, heat, noise):
        targets = losses.region_targets(label, regions, network.stem)
        how = {"key": keys, "temperature": heat, "noise": noise, "present": present}
        logits, keep = network.apply(params, image, deep=True, packed=True, **how)
        terms = losses.segmentation_terms(logits, targets, len(regions))
        for head in terms:
            head["overlap"] = spatial.total(head["overlap"])
            head["total"] = spatial.total(head["total"])
            head["entropy"] = spatial.mean(head["entropy"])
        return terms, jax.tree.map(spatial.mean, losses.keep_ratios(keep))

    # The few numbers per example of which the loss is a function, each device on its part.
    specs = (IMAGE, LABEL, EXAMPLE, EXAMPLE, jax.P(), jax.P())
    terms_of = spatial.over(network.mesh, local_terms, specs, EXAMPLE)

    def loss_of(terms, step, free):
        heads, ratios = terms
        segmentation, parts = losses.segmentation_loss(heads, batch_dice=config.loss.batch_dice)
        kept = losses.mean_ratios(ratios, free)
        ratio = losses.ratio_loss(kept, keep_target(step), free)
        loss = segmentation + config.loss.ratio_weight * ratio
        return loss, parts | {"ratio_loss": ratio}, kept

    def step(state, batch, key):
        number = state["step"]
        image, label, gumbel_key = augmented(batch, key, number, recipe=config.augment)
        present = drawn_modalities(gumbel_key, image, config.data.modality_dropout)
        free = deciding(network, present)
        places = jnp.arange(len(image))
        keys = jax.vmap(jax.random.fold_in, (None, 0))(gumbel_key, places)
        heat = temperature(number)
        gradient, terms = accumulated(
            lambda params, part: terms_of(params, *part, heat, noise(number)),
            lambda terms: loss_of(terms, number, free)[0],
            state["params"],
            (image.astype(network.dtype), label, keys, present),
            config.accumulate,
        )
        loss, parts, kept = loss_of(terms, number, free)
        norm = optim.global_norm(gradient)
        updates, opt_state = tx.update(gradient, state["opt_state"], state["params"], norm=norm)
        params = optax.apply_updates(state["params"], updates)
        metrics = {
            "train/loss": loss,
            **{f"train/{name}": value for name, value in parts.items()},
            "train/learning_rate": schedule(number),
            "train/grad_norm": norm,
        }
        if kept:
            metrics["train/temperature"] = heat
            metrics |= {f"train/keep/{level}": jnp.nanmean(ratio) for level, ratio in kept.items()}
        state = {
            "step": number + 1,
            "params": params,
            "ema": optim.average(state["ema"], params, number, config.optim.ema_decay),
            "opt_state": opt_state,
        }
        return state, jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), metrics)

    return step


def augmented(batch, key, number, *, recipe):
    """What the network sees of a batch at step ``number``.

    Args:
      batch: {"image": (B, M, D, H, W) float16, "label": (B, D, H, W) uint8}.
      key: of the run.
      number: () int32, steps done before.
      recipe: of ``data.augment``.

    Returns:
      image float32, label uint8, of the same shapes; and the key for what else the step draws.
    """
    own, rest = jax.random.split(jax.random.fold_in(key, number))
    image, label = augment(own, batch["image"].astype(jnp.float32), batch["label"], recipe=recipe)
    return image, label, rest


def drawn_modalities(key, image, share):
    """Which modalities each example has: (B, M) float32 of 0 and 1; None where ``share`` is 0.

    An example loses some with probability ``share``: then all non-empty subsets are as likely, as
    in Dorent et al. (2019) and the networks for missing modalities since.
    """
    if not share:
        return None
    batch, modalities = image.shape[:2]
    if_any, which = jax.random.split(jax.random.fold_in(key, 2**31 - 1))  # 0, 1, ... are examples
    subset = jax.random.randint(which, (batch,), 1, 2**modalities)
    subset = (subset[:, None] >> jnp.arange(modalities)) & 1
    loses = jax.random.bernoulli(if_any, share, (batch, 1))
    return jnp.where(loses, subset, 1).astype(jnp.float32)


def deciding(network, present):
    """(B, M') float32, M' as ``keep_names`` has it: 1 where both of a pair are there, so that the
    one may be replaced by the other; None where all are."""
    members = _members(network)
    if present is None or not members:
        return None
    found = present[:, [network.modalities.index(modality) for modality in members]]
    found = found.reshape(len(found), -1, 2)
    return jnp.repeat(found.prod(-1), 2, axis=1)


def accumulated(terms_of, loss_of, params, batch, parts):
    """Gradient of ``loss_of(terms_of(params, batch))``, the batch taken in parts.

    The loss of the parts need not add up to that of the batch (Dice summed over it, the keep
    ratio), but it is a function of a few numbers per example. A first pass, forward alone, finds
    them, and with them what a change of each does to the loss; a second one pulls that back through
    the network, part by part. Exact; more than one part costs one more forward pass.

    Args:
      terms_of: (params, batch) -> tree of arrays with a leading axis B.
      loss_of: terms -> scalar.
      params: nested dict.
      batch: tree of arrays with a leading axis B.
      parts: a divisor of B.

    Returns:
      gradient, like ``params``; and the terms.
    """
    if parts == 1:
        terms, pull = jax.vjp(lambda params: terms_of(params, batch), params)
        return pull(jax.grad(loss_of)(terms))[0], terms

    def split(x):  # every n-th example: a part lies on the same devices as the whole
        return x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1)

    def joined(x):
        return x.swapaxes(0, 1).reshape(-1, *x.shape[2:])

    batch = jax.tree.map(split, batch)
    terms = jax.tree.map(joined, jax.lax.map(lambda part: terms_of(params, part), batch))
    slopes = jax.tree.map(split, jax.grad(loss_of)(terms))

    def add(gradient, now):
        part, slope = now
        _, pull = jax.vjp(lambda params: terms_of(params, part), params)
        return jax.tree.map(jnp.add, gradient, pull(slope)[0]), None

    zero = jax.tree.map(jnp.zeros_like, params)
    return jax.lax.scan(add, zero, (batch, slopes))[0], terms


def eval_step(network):
    """Overlap on a batch of patches: (params, batch) -> {"overlap", "total"}: (R,) float32 sums.

    2 * overlap / total, summed over many batches, is nnU-Net's "pseudo Dice": of patches, not of
    cases. "keep": {level: mean of the decisions}, which are made without noise here.
    """
    regions = list(network.regions.values())

    def local(params, image, label):
        logits, keep = network.apply(params, image, packed=True)
        predicted = (logits[0] > 0).astype(jnp.float32)
        targets = losses.region_targets(label, regions, network.stem)

        def summed(x):
            return spatial.total(x.reshape(len(x), -1, len(regions)).sum(1))

        kept = jax.tree.map(spatial.mean, losses.keep_ratios(keep))
        return summed(predicted * targets), summed(predicted + targets), kept

    counts = spatial.over(network.mesh, local, (IMAGE, LABEL), EXAMPLE)

    def step(params, batch):
        overlap, total, keep = counts(params, batch["image"], batch["label"])
        keep = {level: ratio.mean() for level, ratio in keep.items()}
        return {"overlap": overlap.sum(0), "total": total.sum(0), "keep": keep}

    return step


def segment_step(network):
    """Tiles to logits: (params, (B, M, D, H, W), present) -> (B, D, H, W, R) float32.

    present: (M,) of 0 and 1, the modalities that are there; None, or left out: all.
    """
    share = network.config.infer.token_share

    def local(params, image, present):
        present = _of_each(present, image)
        return network.apply(params, image, share=share, present=present)[0][0]

    over = spatial.over(network.mesh, local, (IMAGE, jax.P()), LABEL)
    return lambda params, image, present=None: over(params, image, present)


def _of_each(present, image):
    """(M,) of a scan -> (b, M) of its tiles; None stays None."""
    return None if present is None else jnp.broadcast_to(present, (len(image), len(present)))


def _members(network):
    model = network.config.model
    prunes = "aware" in model.mixers and model.pruning != "none"
    return [name for pair in model.pairs for name in pair] if prunes else []


def keep_names(network):
    """(level, modality) of every channel of ``keep_step``; none where nothing is pruned."""
    mixers = tuple(network.config.model.mixers)
    return [
        (f"level{level}", modality)
        for level, mixer in enumerate(mixers, 1) if mixer == "aware"
        for modality in dict.fromkeys(_members(network))
    ]  # fmt: skip


def keep_step(network):
    """Tiles to what the mixers keep of them, voxel by voxel.

    (params, (B, M, p, p, p), present) -> (B, p, p, p, K) logits of +-20, channels as
    ``keep_names``: what averages the probabilities of tiles then averages their decisions. Of a
    modality in several pairs the mean of its decisions. present: as of ``segment_step``.
    """
    members = _members(network)
    slots = [
        jnp.array([slot for slot, member in enumerate(members) if member == name])
        for name in dict.fromkeys(members)
    ]

    def local(params, image, present):
        _, keep = network.apply(params, image, present=_of_each(present, image))
        channels = []
        for level in dict.fromkeys(level for level, _ in keep_names(network)):
            votes = jnp.stack([keep[level][:, own].mean(1) for own in slots], -1)
            for axis in (1, 2, 3):
                votes = jnp.repeat(votes, image.shape[axis + 1] // votes.shape[axis], axis)
            channels.append(votes)
        share = jnp.concatenate(channels, -1).astype(jnp.float32)
        return jnp.clip(jax.scipy.special.logit(share), -20.0, 20.0)

    over = spatial.over(network.mesh, local, (IMAGE, jax.P()), LABEL)
    return lambda params, image, present=None: over(params, image, present)
