"""Detail: what the half resolution of the first level has lost, given back to the first logits."""

import jax
import numpy as np
from flax import nnx

from masm_jax.models.layers import ConvNorm, Dense, depth_to_space, space_to_depth


class Detail(nnx.Module):
    """A correction of the first logits.

    Level 1 goes up to the resolution of the scans and meets a convolution of them there; a second
    one beside it says what to add. The head starts at zero: at first nothing is added.

    Args:
      width: channels of level 1.
      channels: at the resolution of the scans.
      stem: how much coarser level 1 is.
      modalities: M.
      num_regions: R.
    """

    def __init__(self, width, channels, stem, modalities, num_regions, *, init):
        self.up = Dense(width, stem**3 * channels, init=init, copies=stem**3)
        self.scans = ConvNorm(modalities, channels, init=init)
        self.block = ConvNorm(channels, channels, init=init)
        self.head = Dense(channels, num_regions, init=init)
        self.head.kernel[...] = np.zeros_like(self.head.kernel[...])
        self.stem = stem

    @jax.named_scope("detail")
    def __call__(self, x, scans, depth):
        """Planes of level 1, ``depth`` deep, and of the scans (B D, H, W, M).

        Returns:
          (B D_1, H_1, W_1, stem^3 R), as the first head has them.
        """
        depth = depth * self.stem
        x = depth_to_space(self.up(x), self.stem) + self.scans(scans, depth)
        x = x + self.block(x, depth)
        return space_to_depth(self.head(x), self.stem)
