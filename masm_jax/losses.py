"""Losses: soft Dice and binary cross-entropy per region, deep supervision, keep-ratio loss.

Everything is summed in float32. Dice follows nnU-Net's region training (Isensee et al. 2021:
smooth 1e-5, sigmoid regions, equal weights of Dice and cross-entropy).
"""

import jax
import jax.numpy as jnp
import numpy as np

from masm_jax.models.layers import planes, stem, volumes
from masm_jax.models.resample import average_pool


def region_targets(label, regions, factor=1):
    """Label map -> one binary map per region, laid out as the logits are.

    Args:
      label: (B, D, H, W) uint8 internal labels.
      regions: sequence of tuples of label values, outer to inner.
      factor: f, the stem of the network: its first logits hold f^3 voxels in their channels.

    Returns:
      (B, D / f, H / f, W / f, f^3 R) float32 of 0 and 1, the region running fastest.
    """
    regions = list(regions)
    # As the scans are taken apart; labels are small whole numbers, exact in bfloat16.
    cells = stem(planes(label[..., None])[..., 0].astype(jnp.bfloat16), factor)
    voxels = jnp.repeat(volumes(cells, label.shape[1] // factor), len(regions), axis=-1)
    target = jnp.zeros(voxels.shape, bool)
    for value in sorted({value for values in regions for value in values}):
        inside = np.tile([value in values for values in regions], factor**3)
        target |= (voxels == value) & inside
    return target.astype(jnp.float32)


def overlaps(logits, targets, num_regions):
    """What Dice needs of every example: overlap, and the sum of both volumes.

    Args:
      logits, targets: (B, D, H, W, K R) float32, the region running fastest.
      num_regions: R.

    Returns:
      two (B, R) float32.
    """
    probability = jax.nn.sigmoid(logits)
    overlap = _voxels_summed(probability * targets, num_regions)
    return overlap, _voxels_summed(probability + targets, num_regions)


def _voxels_summed(x, num_regions):
    """(B, D, H, W, K R) -> (B, R)."""
    rows = planes(x).sum(1)  # long vectors first, for a CPU
    return rows.reshape(len(x), -1, num_regions).sum(1)


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


def cross_entropy(logits, targets, num_regions):
    """Mean binary cross-entropy per example and region; arguments and result as ``overlaps``.

    Finite for finite logits up to 1e38. An infinite logit gives NaN or infinity, whichever its
    target: a network that has diverged stops the training (metric_log.py), and is not hidden.
    """
    # max(x, 0) - x t + log(1 + exp(-|x|)), the form that neither over- nor underflows. The maximum
    # is (x + |x|) / 2: its kink and the logarithm's then cancel, and the gradient is right at 0,
    # where all logits of an empty crop are when a training starts.
    size = jnp.abs(logits)
    loss = 0.5 * logits + 0.5 * size - logits * targets + jnp.log1p(jnp.exp(-size))
    # Divided first: the sum of a few logits of 1e38 is infinite, their mean is not.
    return _voxels_summed(loss * (num_regions / np.prod(logits.shape[1:])), num_regions)


def segmentation_terms(logits, targets, num_regions):
    """The few numbers per example of which the loss is a function.

    A batch may come in parts: with their terms one after another the loss is that of the whole,
    also where it is no mean over examples, as Dice summed over the batch is not.

    Args:
      logits: list over heads; [0] (B, D, H, W, K R), the others (B, D', H', W', R) coarser.
      targets: (B, D, H, W, K R) float32; a coarser head sees the mean over its cells.
      num_regions: R.

    Returns:
      a list over heads of {"overlap", "total", "entropy"}, each (B, R) float32; the lowest of
      several heads has no weight and is left out.
    """
    terms, wanted = [], targets
    for i, head in enumerate(logits[: max(1, len(logits) - 1)]):
        if i:
            factor = targets.shape[1] // head.shape[1]
            targets = volumes(average_pool(planes(targets), factor), head.shape[1])
            wanted = targets.reshape(*targets.shape[:4], -1, num_regions).mean(4)
        overlap, total = overlaps(head, wanted, num_regions)
        entropy = cross_entropy(head, wanted, num_regions)
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
        entropy = (head["entropy"] / head["entropy"].size).sum()  # divided first, as above
        if i == 0:
            parts = {"dice_loss": dice, "cross_entropy": entropy}
        total += weight / sum(weights) * (dice + entropy)
    return total, parts


def keep_ratios(keep):
    """Keep ratio of every example: {"level1": (B, M', d, h, w)} -> {"level1": (B, M')} float32."""
    return {level: mask.mean((2, 3, 4)) for level, mask in keep.items()}


def mean_ratios(ratios, free=None):
    """The mean over the batch: {"level1": (M',), ...} float32.

    Args:
      ratios: of ``keep_ratios``.
      free: (B, M') of 0 and 1, the examples that count; None: all. Where none does it is NaN.
    """
    if free is None:
        return {level: ratio.mean(0) for level, ratio in ratios.items()}
    counted = free.sum(0)
    weight = free / jnp.maximum(counted, 1)
    means = {level: (ratio * weight).sum(0) for level, ratio in ratios.items()}
    return {level: jnp.where(counted > 0, mean, jnp.nan) for level, mean in means.items()}


def ratio_loss(kept, target, free=None):
    """(mean keep - target)^2, averaged over levels and modalities (DynamicViT, section 3.3).

    Args:
      kept: of ``mean_ratios``.
      target: in (0, 1].
      free: as there; where no example counts nothing is off target.
    """
    if not kept:
        return jnp.zeros((), jnp.float32)
    off = jnp.stack(list(kept.values())) - target
    if free is not None:
        off = jnp.where(free.sum(0) > 0, off, 0)
    return (off**2).mean()
