"""The training step for a PyTorch network: the same crops, loss and update as masm_jax/steps.py.

tests/benchmark/test_accuracy_torch.py holds each part against the one in JAX.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import torch
from torch.nn import functional

from masm_jax import optim, steps
from masm_jax.models.decoder import PRIOR_LOGIT


def crops(config):
    """What a step of the JAX networks sees of its batch, as tensors.

    A modality that a crop loses is zero, as it is for our plain U-Net.

    Args:
      config: of the run; seed, augment and data.modality_dropout count.

    Returns:
      a function (host batch, steps done) -> image (B, M, D, H, W) float32, label (B, D, H, W)
      uint8.
    """
    key = jax.random.key(config.seed)

    augmented = jax.jit(functools.partial(steps.augmented, recipe=config.augment))

    def at(batch, number):
        batch = {name: batch[name] for name in ("image", "label")}
        image, label, rest = augmented(batch, key, jnp.int32(number))
        present = steps.drawn_modalities(rest, image, config.data.modality_dropout)
        image = np.array(image)
        if present is not None:
            image[np.asarray(present) == 0] = 0
        return torch.from_numpy(image), torch.from_numpy(np.array(label))

    return at


def region_targets(label, regions):
    """Label map -> one binary map per region.

    Args:
      label: (B, D, H, W) uint8 internal labels.
      regions: sequence of tuples of label values, outer to inner.

    Returns:
      (B, R, D, H, W) float32 of 0 and 1.
    """
    values = (torch.tensor(inside, dtype=label.dtype) for inside in regions)
    return torch.stack([torch.isin(label, inside) for inside in values], 1).float()


def segmentation_loss(logits, targets, *, batch_dice, smooth=1e-5):
    """Dice + cross-entropy over the heads, as losses.segmentation_loss.

    Args:
      logits: (B, R, D, H, W), or (B, heads, R, D, H, W) with the main one first; every head counts,
        weighted 1/2^i, normalised to 1.
      targets: (B, R, D, H, W) float32.
      batch_dice: sum over the batch before dividing.
      smooth: added above and below.

    Returns:
      total, and {"dice_loss", "cross_entropy"} of the main head; scalars.
    """
    heads = [logits] if logits.ndim == targets.ndim else logits.unbind(1)
    weights = [0.5**i for i in range(len(heads))]
    total, main = 0.0, None
    for head, weight in zip(heads, weights):
        probability = torch.sigmoid(head)
        overlap = (probability * targets).sum((2, 3, 4))
        volume = (probability + targets).sum((2, 3, 4))
        if batch_dice:
            overlap, volume = overlap.sum(0), volume.sum(0)
        dice = (1 - (2 * overlap + smooth) / (volume + smooth)).mean()
        entropy = functional.binary_cross_entropy_with_logits(head, targets)
        main = main or {"dice_loss": dice, "cross_entropy": entropy}
        total = total + weight / sum(weights) * (dice + entropy)
    return total, main


def start_rare(network, num_regions):
    """Start the heads where ours start, at sigmoid(-4) = 2 %: part of the recipe, not of a network.

    Args:
      network: changed in place; its heads are the convolutions with R channels out.
      num_regions: R.
    """
    for module in network.modules():
        head = isinstance(module, torch.nn.Conv3d) and module.out_channels == num_regions
        if head and module.bias is not None:
            torch.nn.init.constant_(module.bias, PRIOR_LOGIT)


class Trainer:
    """A network with its optimiser and its averaged weights.

    Clipping by global norm, then AdamW with decay on kernels alone (what has more than one axis),
    on the schedule of the config; the average as optim.average.

    Args:
      network: ``torch.nn.Module``; trained in place.
      config: of the run.
      regions: label values of each region, outer to inner.

    Raises:
      ValueError: the config asks for an optimiser or a precision that is not here.
    """

    def __init__(self, network, config, regions):
        for key, value, expected in (
            ("optim.name", config.optim.name, "adamw"),
            ("model.dtype", config.model.dtype, "float32"),
        ):
            if value != expected:
                raise ValueError(
                    f"config.{key} = {value!r}: networks in PyTorch are trained with {expected!r} "
                    f"alone; expected that for all networks of a comparison"
                )
        self.network, self._config, self._regions = network, config, list(regions)
        self._parameters = list(network.parameters())
        decayed = config.optim.weight_decay
        self.optimiser = torch.optim.AdamW(
            [
                {"params": [p for p in self._parameters if p.ndim > 1], "weight_decay": decayed},
                {"params": [p for p in self._parameters if p.ndim <= 1], "weight_decay": 0.0},
            ],
            lr=0.0,  # of the schedule, at each step
        )
        schedule = jax.jit(jax.vmap(optim.learning_rate(config.optim, config.total_steps)))
        self._rates = np.asarray(schedule(jnp.arange(config.total_steps)), np.float64)
        self.ema = {name: tensor.clone() for name, tensor in network.state_dict().items()}

    def step(self, number, image, label):
        """One step of training.

        Args:
          number: steps done before.
          image: (B, M, D, H, W) float32.
          label: (B, D, H, W) uint8.

        Returns:
          a flat dict of floats, named as those of train_step.
        """
        # Dropout is a function of (seed, step), so that a run resumes to the last bit.
        torch.manual_seed((self._config.seed << 32) + number)
        targets = region_targets(label, self._regions)
        self.network.train()
        self.optimiser.zero_grad()
        loss, parts = segmentation_loss(
            self.network(image), targets, batch_dice=self._config.loss.batch_dice
        )
        loss.backward()
        norm = self.update(number)
        metrics = {"loss": loss, **parts, "grad_norm": norm}
        metrics = {f"train/{name}": float(value.detach()) for name, value in metrics.items()}
        return metrics | {"train/learning_rate": float(self._rates[number])}

    def update(self, number):
        """Apply the gradients of step ``number``; returns their norm before clipping."""
        norm = torch.nn.utils.clip_grad_norm_(self._parameters, self._config.optim.clip_norm)
        for group in self.optimiser.param_groups:
            group["lr"] = float(self._rates[number])
        self.optimiser.step()
        rate = min(self._config.optim.ema_decay, (1 + number) / (10 + number))
        with torch.no_grad():
            for name, tensor in self.network.state_dict().items():
                if tensor.is_floating_point():
                    self.ema[name].lerp_(tensor, 1 - rate)
                else:  # a counter
                    self.ema[name].copy_(tensor)
        return norm
