"""Schedules and optimisers, all pure functions of the step: no resuming changes a learning rate."""

import jax
import jax.numpy as jnp
import optax


def learning_rate(optim, total_steps):
    """Schedule: linear warm-up, then cosine to zero, polynomial (power 0.9), or constant.

    Args:
      optim: the ``optim`` section of a config.
      total_steps: where the schedule ends.

    Returns:
      step -> learning rate.
    """
    after = max(1, total_steps - optim.warmup_steps)
    bodies = {
        "cosine": optax.cosine_decay_schedule(optim.learning_rate, after),
        "poly": optax.polynomial_schedule(optim.learning_rate, 0.0, 0.9, after),
        "constant": optax.constant_schedule(optim.learning_rate),
    }
    warmup = optax.linear_schedule(0.0, optim.learning_rate, max(1, optim.warmup_steps))
    # Counted from one, so that the first step of a warm-up already moves.
    joined = optax.join_schedules([warmup, bodies[optim.schedule]], [optim.warmup_steps])
    return lambda step: joined(step + 1)


def optimiser(optim, total_steps):
    """Clipping by global norm, then AdamW or SGD with Nesterov momentum; decay on kernels alone."""
    schedule = learning_rate(optim, total_steps)
    if optim.name == "adamw":
        update = optax.adamw(schedule, weight_decay=optim.weight_decay, mask=_is_kernel)
    else:
        # nnU-Net's SGD: the decay is part of the gradient and goes through the momentum.
        update = optax.chain(
            optax.add_decayed_weights(optim.weight_decay, mask=_is_kernel),
            optax.sgd(schedule, momentum=optim.momentum, nesterov=True),
        )
    mixers = optax.masked(optax.scale(optim.mixer_rate), _in_mixers)
    return optax.chain(_clip_by_global_norm(optim.clip_norm), update, mixers)


def _clip_by_global_norm(most):
    """Gradients of a global norm above ``most`` are scaled down to it.

    As optax's, but by one factor: optax divides by the norm, multiplies by ``most`` and chooses,
    passes over the gradients that a CPU takes as long for as for AdamW itself. Who knows the norm
    already hands it to ``update``.
    """

    def update(gradient, state, params=None, *, norm=None):
        del params
        norm = global_norm(gradient) if norm is None else norm
        scale = jnp.minimum(1.0, most / norm)
        return jax.tree.map(lambda leaf: leaf * scale, gradient), state

    return optax.GradientTransformationExtraArgs(lambda _: optax.EmptyState(), update)


def global_norm(gradient):
    """Euclidean norm of all arrays together: () float32.

    The short ones side by side and as one: on a CPU, XLA makes two kernels of the sum of each of
    250 arrays, an eighth of all that is compiled and read at a start (docs/performance.md).
    """
    short, long = [], []
    for leaf in jax.tree.leaves(gradient):
        (short if leaf.size <= 2**14 else long).append(leaf)
    flat = [jnp.concatenate([leaf.reshape(-1) for leaf in short])] if short else []
    return optax.tree.norm(flat + long)


def temperature(gumbel, total_steps):
    """Gumbel-Softmax temperature: exponential from ``start`` to ``end`` over the run."""
    ratio = gumbel.end / gumbel.start
    return lambda step: gumbel.start * ratio ** jnp.clip(step / total_steps, 0.0, 1.0)


def gumbel_noise(gumbel, total_steps):
    """Scale of the Gumbel noise: from 1 down to 0 at the share ``quiet`` of the run.

    With noise to the end, "keep every token with 90 %" meets a target of 90 %: patches are replaced
    by chance while training, and none without noise. Without noise the target can be met by
    decisions alone.
    """
    return lambda step: jnp.clip(1 - step / (gumbel.quiet * total_steps), 0.0, 1.0)


def keep_target(loss, total_steps):
    """Target of the keep ratio: from 1 down to ``keep_target`` over the first half of the run.

    Pruning from the first step replaces patches at random, before features or predictor mean
    anything.
    """
    return lambda step: 1 - (1 - loss.keep_target) * jnp.clip(2 * step / total_steps, 0.0, 1.0)


def average(ema, params, step, decay):
    """Exponential moving average whose decay grows with the step: min(decay, (1 + s) / (10 + s)).

    The first weights are forgotten quickly; with decay 0 the average is the weights themselves.
    """
    step = step.astype(jnp.float32)
    rate = jnp.minimum(decay, (1 + step) / (10 + step))
    rest = 1 - rate
    return jax.tree.map(lambda old, new: old * rate + new * rest, ema, params)


def _is_kernel(params):
    names = ("kernel", "conv1", "conv2")  # the last two of models/residual.py
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key in names, params)


def _in_mixers(params):
    return jax.tree_util.tree_map_with_path(lambda path, _: path[0].key == "mixers", params)
