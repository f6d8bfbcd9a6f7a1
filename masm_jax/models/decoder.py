"""The decoder: up, beside the skip, two convolutions; a head per level for deep supervision."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from masm_jax.models.layers import ConvNorm, Dense, apply_all, depth_to_space, volumes

# Tumour is rare: heads start at sigmoid(-4) = 2 % instead of 50 %, or the first steps go into the
# bias.
PRIOR_LOGIT = -4.0


class Decoder(nnx.Module):
    """Upsampling is dense + depth-to-space: the same numbers as a transposed convolution of kernel
    2 and stride 2, whose 3-D form XLA runs 30 to 50 times slower.

    Args:
      widths: channels per level, from the first.
      strides: of the levels; level j + 1 -> j goes up by strides[j].
      skips: channels of the skip per level.
      packing: the first head is sub-pixel by this factor.
      num_regions: R.
      heads: number of levels, from the first, with a head.
      first: number of the first level, for those who look at the compiled program.
    """

    def __init__(self, widths, strides, skips, *, packing, num_regions, heads, init, first=1):
        ups, blocks = [], []
        for level, (width, below) in enumerate(itertools.pairwise(widths)):
            children = strides[level + 1] ** 3
            ups.append(Dense(below, children * width, init=init, copies=children))
            beside = ConvNorm(width + skips[level], width, init=init)
            blocks.append(nnx.List([beside, ConvNorm(width, width, init=init)]))
        self.ups, self.blocks = nnx.List(ups), nnx.List(blocks)
        factors = [packing] + [1] * (heads - 1)
        self.heads = nnx.List(
            [
                Dense(width, f**3 * num_regions, init=init, copies=f**3)
                for width, f in zip(widths, factors)
            ]
        )
        for head in self.heads:
            head.bias[...] = np.full_like(head.bias[...], PRIOR_LOGIT)
        self.strides, self.first = tuple(strides), first

    @jax.named_scope("decoder")
    def __call__(self, skips, deep=False, wrap=lambda block: block):
        """From the skips to logits.

        Args:
          skips: per level (planes (B D_j, H_j, W_j, C_j), D_j).
          deep: heads of the lower levels too.
          wrap: goes around every level: ``jax.checkpoint``, or nothing.

        Returns:
          float32 logits, one array per head: (B, D, H, W, packing^3 R) of the first level, to be
          unpacked by ``depth_to_space``; then, if ``deep``, (B, D_j, H_j, W_j, R) of the next.
        """
        x, _ = skips[-1]
        logits = []
        for level in reversed(range(len(self.ups))):
            skip, depth = skips[level]
            with jax.named_scope(f"level{self.first + level}"):
                x = wrap(functools.partial(self._level, level, depth))(x, skip)
                if level < len(self.heads) and (deep or level == 0):
                    logits.append(volumes(self.heads[level](x).astype(jnp.float32), depth))
        logits.reverse()
        return logits

    def _level(self, level, depth, x, skip):
        x = depth_to_space(self.ups[level](x), self.strides[level + 1])
        return apply_all(self.blocks[level], jnp.concatenate([x, skip], axis=-1), depth)
