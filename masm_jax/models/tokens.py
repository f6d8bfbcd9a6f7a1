"""Between voxels and tokens: the patches both mixers work on."""

import jax.numpy as jnp
from flax import nnx

from masm_jax.models import spatial
from masm_jax.models.layers import Dense, LayerNorm, planes
from masm_jax.models.resample import average_pool, upsample


class Tokens(nnx.Module):
    """Cuts features into patches, projects them to tokens, and brings tokens back to voxels.

    A patch of P^3 voxels is average-pooled to 2^3 cells (P > 1), flattened and projected. The way
    back is a projection to the same cells, upsampled to voxels: a gate and a shift of the features
    there. It starts at zero, so that a network with mixers starts as one without. The gate is what
    lets a mixer say "here, listen to T1ce": the fusion behind it is linear and the same everywhere.
    """

    def __init__(self, channels, width, patch, grid, modalities, *, init):
        self.cells = 2 if patch > 1 else 1
        self.patch, self.grid = patch, tuple(grid)
        self.embed = Dense(self.cells**3 * channels, width, init=init)
        self.norm = LayerNorm(width)
        self.restore = Dense(width, self.cells**3 * 2 * channels, init=init, gain=0.0)
        self.position = nnx.Param(init.normal((*self.grid, width), 0.02))
        self.modality = nnx.Param(init.normal((modalities, width), 0.02))

    def encode(self, x, depth):
        """Planes (M B D, H, W, C) -> (B, M, d, h, w, width), positions and modalities embedded.

        Raises:
          ValueError: the token grid is not the one the positions were made for.
        """
        d, h, w = (n // self.patch for n in (depth, *x.shape[1:3]))
        grid = (d * spatial.count(), h, w)
        if grid != self.grid:
            raise ValueError(
                f"input gives a token grid of {grid}, the model was made for {self.grid}: feed "
                f"patches of the configured edge (config.patch), as the sliding window does"
            )
        n, m, c = self.cells, len(self.modality[...]), x.shape[-1]
        x = average_pool(x, self.patch // n)
        x = x.reshape(m, -1, d, n, h, n, w, n, c).transpose(1, 0, 2, 4, 6, 3, 5, 7, 8)
        tokens = self.embed(x.reshape(-1, m, d, h, w, n**3 * c))
        modality = self.modality[...][:, None, None, None, :]
        return tokens + (spatial.own(self.position[...], 0) + modality).astype(x.dtype)

    def cells_of(self, tokens):
        """(B, M, d, h, w, width) -> gate and shift of every cell, (B, M, n d, n h, n w, 2 C)."""
        y = self.restore(self.norm(tokens))
        b, m, d, h, w, c = y.shape
        n = self.cells
        y = y.reshape(b, m, d, h, w, n, n, n, c // n**3).transpose(0, 1, 2, 5, 3, 6, 4, 7, 8)
        return y.reshape(b, m, d * n, h * n, w * n, c // n**3)

    def modulate(self, x, cells):
        """What the tokens say, applied to the features they came from: x (1 + gate) + shift.

        Args:
          x: (M B D, H, W, C), planes.
          cells: of ``cells_of``.

        Returns:
          (M B D, H, W, C).
        """

        # Upsampled smoothly: held constant over cells, the gates draw their edges into the result.
        def smooth(part):
            rows = planes(part.swapaxes(0, 1))
            return upsample(rows, self.patch // self.cells, part.shape[2])

        gate, shift = jnp.split(cells, 2, axis=-1)
        return x * (1 + smooth(gate)) + smooth(shift)
