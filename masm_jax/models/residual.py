"""The convolutions of UNETR and Swin UNETR: residual blocks, projections up, the decoder.

Source: UNETR (Hatamizadeh et al., WACV 2022), figure 2, and Swin UNETR (Hatamizadeh et al., 2022),
figure 1; the numbers are those of MONAI's UnetResBlock, UnetrPrUpBlock and UnetrUpBlock with the
same weights (tests/parity/test_monai.py). Instance norms have no parameters there. What MONAI does
by a transposed convolution of kernel 2 and stride 2 is dense + depth-to-space here.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from masm_jax.models.conv import conv
from masm_jax.models.decoder import PRIOR_LOGIT
from masm_jax.models.layers import LEAKY_SLOPE, Dense, depth_to_space, instance_norm, volumes


class ResidualBlock(nnx.Module):
    """Conv 3x3x3, norm, leaky ReLU, conv, norm; plus the input; leaky ReLU.

    Where the width changes the input comes through a 1x1x1 convolution and a norm.
    """

    def __init__(self, channels_in, channels, *, init):
        gain = 2 / (1 + LEAKY_SLOPE**2)
        self.conv1 = nnx.Param(init.fan_in((3, 3, 3, channels_in, channels), gain))
        self.conv2 = nnx.Param(init.fan_in((3, 3, 3, channels, channels), gain))
        same = channels_in == channels
        self.conv3 = None if same else Dense(channels_in, channels, init=init, bias=False)

    def __call__(self, x, depth):
        """x: (B D, H, W, C_in), planes -> (B D, H, W, C)."""
        y = jax.nn.leaky_relu(_norm(conv(x, self.conv1[...], depth=depth), depth), LEAKY_SLOPE)
        y = _norm(conv(y, self.conv2[...], depth=depth), depth)
        if self.conv3 is not None:
            x = _norm(self.conv3(x), depth)
        return jax.nn.leaky_relu(y + x, LEAKY_SLOPE)


class Up(nnx.Module):
    """Twice as large, without more."""

    def __init__(self, channels_in, channels, *, init):
        self.dense = Dense(channels_in, 8 * channels, init=init, copies=8, bias=False)

    def __call__(self, x):
        """x: (N, H, W, C_in), planes -> (2 N, 2 H, 2 W, C)."""
        return depth_to_space(self.dense(x), 2)


class Projection(nnx.Module):
    """Up once, then ``more`` times up with a residual block: a hidden state becomes a skip."""

    def __init__(self, channels_in, channels, more, *, init):
        self.first = Up(channels_in, channels, init=init)
        self.ups = nnx.List([Up(channels, channels, init=init) for _ in range(more)])
        self.blocks = nnx.List([ResidualBlock(channels, channels, init=init) for _ in range(more)])

    def __call__(self, x, depth):
        """x: planes ``depth`` deep -> planes 2^(1 + more) times as large along each axis."""
        x = self.first(x)
        for number, (up, block) in enumerate(zip(self.ups, self.blocks), 2):
            x = block(up(x), depth * 2**number)
        return x


class ResidualDecoder(nnx.Module):
    """The decoder of both: up, beside the skip, a residual block. One head.

    Args:
      widths: channels per level, from level 1; every level is twice as coarse as the one above.
      num_regions: R.
    """

    def __init__(self, widths, *, num_regions, init):
        steps = list(zip(widths, widths[1:]))
        self.ups = nnx.List([Up(below, width, init=init) for width, below in steps])
        self.blocks = nnx.List([ResidualBlock(2 * width, width, init=init) for width, _ in steps])
        self.out = Dense(widths[0], num_regions, init=init)
        self.out.bias[...] = np.full((num_regions,), PRIOR_LOGIT, np.float32)

    @jax.named_scope("decoder")
    def __call__(self, skips, scans, deep=False, wrap=lambda block: block):
        """As ``Decoder``, but for the heads: [(B, D, H, W, R) float32], whatever ``deep`` says."""
        (x,), _ = skips[-1]
        for level in reversed(range(len(self.ups))):
            (skip,), depth = skips[level]
            up, block = self.ups[level], self.blocks[level]
            with jax.named_scope(f"level{level + 1}"):
                x = wrap(
                    lambda x, skip, up=up, block=block, depth=depth: block(
                        jnp.concatenate([up(x), skip], axis=-1), depth
                    )
                )(x, skip)
        return [volumes(self.out(x).astype(jnp.float32), skips[0][1])]


def _norm(x, depth):
    """Instance norm without parameters."""
    ones = jnp.ones_like(x[:1, 0, 0], jnp.float32)  # of each device, as x is
    return instance_norm(x, ones, jnp.zeros_like(ones), depth)
