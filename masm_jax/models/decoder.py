"""The decoder: up, beside the skip, two convolutions; a head per level for deep supervision."""

import functools

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
      widths: channels per level, from level 1.
      strides: of the levels; level j + 1 -> j goes up by strides[j].
      skips: channels of the skip per level, of all its parts together.
      stem: edge of the space-to-depth stem; the first head is sub-pixel by that factor.
      num_regions: R.
      heads: number of levels, from the first, with a head.
      detail: corrects the first logits (models/detail.py); None: nothing does.
    """

    def __init__(
        self, widths, strides, *, skips, stem, num_regions, heads, init, detail=None
    ):  # fmt: skip
        ups, blocks = [], []
        below = (*widths[1:-1], skips[-1])  # the last level comes up as it is
        for width, deeper, skip, stride in zip(widths, below, skips, strides[1:]):
            children = stride**3
            ups.append(Dense(deeper, children * width, init=init, copies=children))
            first = ConvNorm(width + skip, width, init=init)
            blocks.append(nnx.List([first, ConvNorm(width, width, init=init)]))
        self.ups, self.blocks = nnx.List(ups), nnx.List(blocks)
        self.detail = detail
        factors = [stem] + [1] * (heads - 1)
        self.heads = nnx.List(
            [
                Dense(width, f**3 * num_regions, init=init, copies=f**3)
                for width, f in zip(widths, factors)
            ]
        )
        for head in self.heads:
            head.bias[...] = np.full_like(head.bias[...], PRIOR_LOGIT)
        self.strides = tuple(strides)

    @jax.named_scope("decoder")
    def __call__(self, skips, scans, deep=False, wrap=lambda block: block):
        """From the skips to logits.

        Args:
          skips: per level (list of planes (B D_j, H_j, W_j, C), D_j): one, or of every modality.
          scans: planes (B D, H, W, M); looked at where there is ``detail``.
          deep: heads of the lower levels too.
          wrap: goes around every level: ``jax.checkpoint``, or nothing.

        Returns:
          float32 logits, one array per head: (B, D_1, H_1, W_1, stem^3 R), to be unpacked by
          ``depth_to_space``; then, if ``deep``, (B, D_j, H_j, W_j, R) of levels 2, 3, ...
        """
        below, _ = skips[-1]
        logits = []
        for level in reversed(range(len(self.ups))):
            skip, depth = skips[level]
            with jax.named_scope(f"level{level + 1}"):
                x = wrap(functools.partial(self._level, level, depth))(below, skip)
                if level < len(self.heads) and (deep or level == 0):
                    y = self.heads[level](x)
                    if level == 0 and self.detail is not None:
                        y = y + wrap(functools.partial(self.detail, depth=depth))(x, scans)
                    logits.append(volumes(y.astype(jnp.float32), depth))
                below = (x,)
        logits.reverse()
        return logits

    def _level(self, level, depth, below, skip):
        x = depth_to_space(self.ups[level](*below), self.strides[level + 1])
        return apply_all(self.blocks[level], jnp.concatenate([x, *skip], axis=-1), depth)
