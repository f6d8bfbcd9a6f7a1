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


def soft_dice(logits, targets, *, batch_dice, smooth=1e-5):
    """1 - soft Dice, per region.

    Args:
      logits, targets: (B, D, H, W, R) float32.
      batch_dice: sum over the batch before dividing; a region absent from one crop then still has a
        gradient from the others.
      smooth: added above and below.

    Returns:
      (R,) float32, mean over the batch.
    """
    probability = jax.nn.sigmoid(logits)
    axes = (0, 1, 2, 3) if batch_dice else (1, 2, 3)
    overlap = (probability * targets).sum(axes)
    total = probability.sum(axes) + targets.sum(axes)
    loss = 1 - (2 * overlap + smooth) / (total + smooth)
    return loss if batch_dice else loss.mean(0)


def cross_entropy(logits, targets):
    """Mean binary cross-entropy per region: (B, D, H, W, R) twice -> (R,)."""
    # max(x, 0) - x t + log(1 + exp(-|x|)), the form that neither over- nor underflows.
    loss = jnp.maximum(logits, 0) - logits * targets + jnp.log1p(jnp.exp(-jnp.abs(logits)))
    return loss.mean((0, 1, 2, 3))


def segmentation_loss(logits, targets, *, batch_dice):
    """Dice + cross-entropy over the heads, weighted 1/2^i, the lowest 0, normalised to 1.

    Args:
      logits: list over heads; [0] at full resolution, the others at coarser grids.
      targets: (B, D, H, W, R) float32; a coarser head sees the mean over its cells (soft targets).
      batch_dice: see ``soft_dice``.

    Returns:
      total, and {"dice_loss", "cross_entropy"} of the full-resolution head; scalars, float32.
    """
    weights = [0.5**i for i in range(len(logits))]
    if len(weights) > 1:
        weights[-1] = 0.0
    total = 0.0
    for i, (head, weight) in enumerate(zip(logits, weights)):
        if weight == 0:
            continue
        coarse = average_pool(targets, targets.shape[1] // head.shape[1])
        dice = soft_dice(head, coarse, batch_dice=batch_dice).mean()
        entropy = cross_entropy(head, coarse).mean()
        if i == 0:
            parts = {"dice_loss": dice, "cross_entropy": entropy}
        total += weight / sum(weights) * (dice + entropy)
    return total, parts


def keep_ratios(keep):
    """Mean keep ratio per modality: {"level1": (B, M', d, h, w)} -> {"level1": (M',)} float32."""
    return {level: mask.mean((0, 2, 3, 4)) for level, mask in keep.items()}


def ratio_loss(keep, target):
    """(mean keep - target)^2, averaged over levels and modalities (DynamicViT, section 3.3)."""
    if not keep:
        return jnp.zeros((), jnp.float32)
    ratios = jnp.stack([ratio for ratio in keep_ratios(keep).values()])
    return ((ratios - target) ** 2).mean()
