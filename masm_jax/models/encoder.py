"""The encoder: one set of weights for every modality."""

from flax import nnx

from masm_jax.models.layers import ConvNorm


class Encoder(nnx.Module):
    """Per level two (conv 3x3x3, instance norm, leaky ReLU); the first carries the level's stride.

    The modality axis lies folded in the batch: (B * M, D, H, W, C). ``groups`` is M where the norms
    learn a scale and shift per modality, else 1.
    """

    def __init__(self, channels_in, widths, strides, *, init, groups=1):
        levels = []
        for width, stride in zip(widths, strides):
            first = ConvNorm(channels_in, width, init=init, stride=stride, groups=groups)
            levels.append(nnx.List([first, ConvNorm(width, width, init=init, groups=groups)]))
            channels_in = width
        self.levels = nnx.List(levels)

    def __call__(self, x):
        """x: (B * M, D, H, W, C_in) -> a list with the features of every level."""
        features = []
        for level in self.levels:
            for layer in level:
                x = layer(x)
            features.append(x)
        return features
