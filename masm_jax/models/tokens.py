"""Between voxels and tokens: the patches both mixers work on."""

import jax.numpy as jnp
from flax import nnx

from masm_jax.models.layers import Dense, average_pool, repeat3d


class Tokens(nnx.Module):
    """Cuts features into patches, projects them to tokens, and brings tokens back to voxels.

    A patch of P^3 voxels is average-pooled to 2^3 cells (P > 1), flattened and projected. The way back
    is a projection to the same cells, upsampled to voxels; it starts at zero, so that a network with
    mixers starts as one without.
    """

    def __init__(self, channels, width, patch, grid, modalities, *, rngs):
        self.cells = 2 if patch > 1 else 1
        self.patch, self.grid = patch, tuple(grid)
        self.embed = Dense(self.cells**3 * channels, width, rngs=rngs)
        self.restore = Dense(width, self.cells**3 * channels, rngs=rngs, init="zeros")
        small = nnx.initializers.normal(0.02)
        self.position = nnx.Param(small(rngs.params(), (*self.grid, width), jnp.float32))
        self.modality = nnx.Param(small(rngs.params(), (modalities, width), jnp.float32))

    def encode(self, x):
        """(B, M, D, H, W, C) -> (B, M, d, h, w, width), positions and modalities embedded.

        Raises:
          ValueError: the token grid is not the one the positions were made for.
        """
        grid = tuple(n // self.patch for n in x.shape[2:5])
        if grid != self.grid:
            raise ValueError(
                f"input gives a token grid of {grid}, the model was made for {self.grid}: feed "
                f"patches of the configured edge (config.patch), as the sliding window does"
            )
        x = average_pool(x, self.patch // self.cells)
        b, m, _, _, _, c = x.shape
        d, h, w = grid
        n = self.cells
        x = x.reshape(b, m, d, n, h, n, w, n, c).transpose(0, 1, 2, 4, 6, 3, 5, 7, 8)
        tokens = self.embed(x.reshape(b, m, d, h, w, n**3 * c))
        modality = self.modality[...][:, None, None, None, :]
        return tokens + (self.position[...] + modality).astype(x.dtype)

    def decode(self, tokens):
        """(B, M, d, h, w, width) -> (B, M, D, H, W, C): what is added to the features."""
        x = self.restore(tokens)
        b, m, d, h, w, c = x.shape
        n = self.cells
        x = x.reshape(b, m, d, h, w, n, n, n, c // n**3).transpose(0, 1, 2, 5, 3, 6, 4, 7, 8)
        x = x.reshape(b, m, d * n, h * n, w * n, c // n**3)
        return repeat3d(x, self.patch // n)
