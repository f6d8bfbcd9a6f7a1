"""The Modality-Shift mixer: patches change modality in a mosaic, then attend, then go home.

Source: MASM (arXiv 2403.02074): patches are swapped between modalities in a mosaic pattern before
self-attention at the high level, without extra parameters; the patterns are in models/mosaic.py.
"""

from flax import nnx

from masm_jax.models import spatial
from masm_jax.models.attention import MLP, SelfAttention
from masm_jax.models.mosaic import offsets, shift, unshift
from masm_jax.models.tokens import Tokens


class ShiftMixer(nnx.Module):
    """Blocks of: shift, spatial attention per plane, shift back, attention over modalities, MLP."""

    def __init__(
        self, channels, patch, grid, *, mosaic, modalities, width, heads, depth, init
    ):
        self.tokens = Tokens(channels, width, patch, grid, modalities, init=init)
        self.spatial = nnx.List([SelfAttention(width, heads, init=init) for _ in range(depth)])
        self.across = nnx.List([SelfAttention(width, heads, init=init) for _ in range(depth)])
        self.mlp = nnx.List([MLP(width, init=init) for _ in range(depth)])
        self.mosaic, self.modalities = mosaic, modalities

    def __call__(self, x, depth):
        """x: (M B D, H, W, C), planes of volumes ``depth`` deep, modality slowest -> the same."""
        # Few tokens: every device that has a part of the volume works on all of them.
        tokens = spatial.whole(self.tokens.encode(x, depth), 2)
        table = offsets(self.mosaic, self.tokens.grid, self.modalities)
        b, m, d, h, w, width = tokens.shape
        for within, across, mlp in zip(self.spatial, self.across, self.mlp):
            mixed = shift(tokens, table).reshape(b * m, d * h * w, width)
            tokens = unshift(within(mixed).reshape(tokens.shape), table)
            places = tokens.transpose(0, 2, 3, 4, 1, 5).reshape(b * d * h * w, m, width)
            places = mlp(across(places))
            tokens = places.reshape(b, d, h, w, m, width).transpose(0, 4, 1, 2, 3, 5)
        return self.tokens.modulate(x, self.tokens.cells_of(spatial.own(tokens, 2)))
