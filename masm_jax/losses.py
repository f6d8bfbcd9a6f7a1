"""Losses: soft Dice and binary cross-entropy per region, deep supervision, keep-ratio loss.

Everything is summed in float32. Dice follows nnU-Net's region training (Isensee et al. 2021:
smooth 1e-5, sigmoid regions, equal weights of Dice and cross-entropy).
"""

import jax
import jax.numpy as jnp

from masm_jax.models.layers import average_pool


def region_targets(label, regions):
    """Label map -> one binary map per region.

    Args:
      label: (B, D, H, W) uint8 internal labels.
      regions: sequence of tuples of label values, outer to inner.

    Returns:
      (B, D, H, W, R) float32 of 0 and 1.
    """
    maps = [sum(label == value for value in values) > 0 for values in regions]
    return jnp.stack(maps, axis=-1).astype(jnp.float32)


def overlaps(logits, targets):
    """What Dice needs of every example: overlap, and the sum of both volumes.

    Args:
      logits, targets: (B, D, H, W, R) float32.

    Returns:
      two (B, R) float32.
    """
    probability, voxels = jax.nn.sigmoid(logits), (1, 2, 3)
    return (probability * targets).sum(voxels), probability.sum(voxels) + targets.sum(voxels)


def soft_dice(overlap, total, *, batch_dice, smooth=1e-5):
    """1 - soft Dice, per region.

    Args:
      overlap, total: (B, R) float32, as ``overlaps`` gives them.
      batch_dice: sum over the batch before dividing; a region absent from one crop then still has a
        gradient from the others.
      smooth: added above and below.

    Returns:
      (R,) float32, mean over the batch.
    """
    if batch_dice:
        overlap, total = overlap.sum(0, keepdims=True), total.sum(0, keepdims=True)
    return (1 - (2 * overlap + smooth) / (total + smooth)).mean(0)


def cross_entropy(logits, targets):
    """Mean binary cross-entropy per example and region: (B, D, H, W, R) twice -> (B, R)."""
    # max(x, 0) - x t + log(1 + exp(-|x|)), the form that neither over- nor underflows.
    loss = jnp.maximum(logits, 0) - logits * targets + jnp.log1p(jnp.exp(-jnp.abs(logits)))
    return loss.mean((1, 2, 3))


def segmentation_terms(logits, targets):
    """The few numbers per example of which the loss is a function.

    A batch may come in parts: with their terms one after another the loss is that of the whole,
    also where it is no mean over examples, as Dice summed over the batch is not.

    Args:
      logits: list over heads; [0] at full resolution, the others at coarser grids.
      targets: (B, D, H, W, R) float32; a coarser head sees the mean over its cells (soft targets).

    Returns:
      a list over heads of {"overlap", "total", "entropy"}, each (B, R) float32; the lowest of
      several heads has no weight and is left out.
    """
    terms = []
    for head in logits[: max(1, len(logits) - 1)]:
        coarse = average_pool(targets, targets.shape[1] // head.shape[1])
        overlap, total = overlaps(head, coarse)
        entropy = cross_entropy(head, coarse)
        terms.append({"overlap": overlap, "total": total, "entropy": entropy})
    return terms


def segmentation_loss(terms, *, batch_dice):
    """Dice + cross-entropy over the heads, weighted 1/2^i, normalised to 1.

    Args:
      terms: of ``segmentation_terms``.
      batch_dice: see ``soft_dice``.

    Returns:
      total, and {"dice_loss", "cross_entropy"} of the full-resolution head; scalars, float32.
    """
    weights = [0.5**i for i in range(len(terms))]
    total = 0.0
    for i, (head, weight) in enumerate(zip(terms, weights)):
        dice = soft_dice(head["overlap"], head["total"], batch_dice=batch_dice).mean()
        entropy = head["entropy"].mean()
        if i == 0:
            parts = {"dice_loss": dice, "cross_entropy": entropy}
        total += weight / sum(weights) * (dice + entropy)
    return total, parts


def keep_ratios(keep):
    """Keep ratio of every example: {"level1": (B, M', d, h, w)} -> {"level1": (B, M')} float32."""
    return {level: mask.mean((2, 3, 4)) for level, mask in keep.items()}


def ratio_loss(ratios, target):
    """(mean keep - target)^2, averaged over levels and modalities (DynamicViT, section 3.3).

    Args:
      ratios: of ``keep_ratios``; the mean is over the batch.
      target: in (0, 1].
    """
    if not ratios:
        return jnp.zeros((), jnp.float32)
    means = jnp.stack([ratio.mean(0) for ratio in ratios.values()])
    return ((means - target) ** 2).mean()
