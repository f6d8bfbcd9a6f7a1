"""The encoder: one set of weights for every modality."""

import jax
from flax import nnx

from masm_jax.models.layers import ConvNorm, apply_all


class Encoder(nnx.Module):
    """Per level two (conv 3x3x3, instance norm, leaky ReLU), of the ``single`` first levels one;
    the first carries the level's stride.

    The modalities lie folded in the batch, modality slowest: M B volumes. ``groups`` is M where the
    norms learn a scale and shift per modality, else 1.
    """

    def __init__(self, channels_in, widths, strides, *, init, groups=1, single=0):
        levels = []
        for number, (width, stride) in enumerate(zip(widths, strides)):
            level = [ConvNorm(channels_in, width, init=init, stride=stride, groups=groups)]
            if number >= single:
                level.append(ConvNorm(width, width, init=init, groups=groups))
            levels.append(nnx.List(level))
            channels_in = width
        self.levels = nnx.List(levels)

    @jax.named_scope("encoder")
    def __call__(self, x, depth, wrap=lambda block: block):
        """Planes (M B D, H, W, C_in) -> per level the planes of its features, and their depth.

        ``wrap`` goes around every level: ``jax.checkpoint``, or nothing.
        """
        features = []
        for number, level in enumerate(self.levels, 1):
            with jax.named_scope(f"level{number}"):  # for those who look at the compiled program
                x = wrap(lambda x, level=level, depth=depth: apply_all(level, x, depth))(x)
            depth = -(-depth // level[0].stride)
            features.append((x, depth))
        return features
