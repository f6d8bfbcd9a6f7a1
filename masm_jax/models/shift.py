"""The Modality-Shift mixer: patches change modality in a mosaic, then attend, then go home.

Source: MASM (arXiv 2403.02074): patches are swapped between modalities in a mosaic pattern before
self-attention at the high level, without extra parameters; the patterns are in models/mosaic.py.
"""

import jax.numpy as jnp
from flax import nnx

from masm_jax.models import spatial
from masm_jax.models.attention import MLP, ChannelGate, SelfAttention, SpatialGate
from masm_jax.models.mosaic import (
    LearntMosaic,
    learnt_edge,
    offsets,
    shift,
    shift_chosen,
    unshift,
    verify,
)  # fmt: skip
from masm_jax.models.tokens import Tokens

EXTRAS = ("channel", "gate", "window")  # what may follow the attention over modalities


class ShiftMixer(nnx.Module):
    """Blocks of: shift, spatial attention per plane, shift back, attention over modalities, MLP.

    ``extras``, before the MLP, in their order: "channel", squeeze and excitation of the tokens of a
    modality; "gate", one number per token; "window", attention over all modalities within windows
    of 2 tokens an edge (3 or 1 where 2 does not divide the grid).
    """

    def __init__(
        self, channels, patch, grid, *, mosaic, modalities, width, heads, depth, init, extras=()
    ):
        self.tokens = Tokens(channels, width, patch, grid, modalities, init=init)
        self.spatial = nnx.List([SelfAttention(width, heads, init=init) for _ in range(depth)])
        self.across = nnx.List([SelfAttention(width, heads, init=init) for _ in range(depth)])
        self.mlp = nnx.List([MLP(width, init=init) for _ in range(depth)])
        kinds = {
            "channel": lambda: ChannelGate(width, init=init),
            "gate": lambda: SpatialGate(width, init=init),
            "window": lambda: SelfAttention(width, heads, init=init),
        }
        self.extra_names = tuple(extras)
        self.extras = nnx.List(
            [nnx.List([kinds[name]() for name in extras]) for _ in range(depth if extras else 0)]
        )
        edge = learnt_edge(mosaic)
        self.learnt = LearntMosaic(edge, grid, modalities, init=init) if edge else None
        self.mosaic, self.modalities = mosaic, modalities
        if not edge:
            verify(mosaic, grid, modalities)

    def __call__(self, x, depth, key=None, temperature=1.0, noise=1.0, present=None):
        """Mix all modalities.

        Args:
          x: (M B D, H, W, C), planes of volumes ``depth`` deep, modality slowest.
          depth: D.
          key, temperature, noise: of a learnt mosaic, as in ``AwareMixer``.
          present: (B, M) of 0 and 1: a missing modality is no key; None: none is missing.

        Returns:
          The mixed features, like ``x``.
        """
        # Few tokens: every device that has a part of the volume works on all of them.
        tokens = spatial.whole(self.tokens.encode(x, depth), 2)
        there, back = self._ways(tokens.shape[0], key, temperature, noise)
        b, m, d, h, w, width = tokens.shape
        plane_keys = place_keys = None
        if present is not None:
            here = jnp.broadcast_to(present[:, :, None, None, None, None], (b, m, d, h, w, 1))
            plane_keys = there(here.astype(jnp.float32)).reshape(b * m, d * h * w)
            place_keys = _to_places(here)[..., 0]
        for index, (within, across, mlp) in enumerate(zip(self.spatial, self.across, self.mlp)):
            mixed = there(tokens).reshape(b * m, d * h * w, width)
            tokens = back(within(mixed, plane_keys).reshape(tokens.shape))
            places = across(_to_places(tokens), place_keys)
            tokens = _from_places(places, tokens.shape)
            for name, extra in zip(self.extra_names, self.extras[index] if self.extras else ()):
                tokens = _attend_more(name, extra, tokens, present)
            tokens = mlp(tokens)
        return self.tokens.modulate(x, self.tokens.cells_of(spatial.own(tokens, 2)))

    def _ways(self, batch, key, temperature, noise):
        """The shift and its inverse, as functions of (B, M, d, h, w, C)."""
        if self.learnt is None:
            table = offsets(self.mosaic, self.tokens.grid, self.modalities)
            return (lambda x: shift(x, table)), (lambda x: unshift(x, table))
        chosen = self.learnt(batch, key, temperature, noise)
        return (lambda x: shift_chosen(x, chosen)), (lambda x: shift_chosen(x, chosen, back=True))


def _attend_more(name, extra, tokens, present):
    b, m, d, h, w, width = tokens.shape
    if name != "window":
        return extra(tokens.reshape(b * m, -1, width)).reshape(tokens.shape)
    edges = [next(edge for edge in (2, 3, 1) if size % edge == 0) for size in (d, h, w)]
    split = [part for size, edge in zip((d, h, w), edges) for part in (size // edge, edge)]

    def windows(x):
        x = x.reshape(b, m, *split, -1).transpose(0, 2, 4, 6, 1, 3, 5, 7, 8)
        return x.reshape(-1, m * edges[0] * edges[1] * edges[2], x.shape[-1])

    keys = None
    if present is not None:
        here = jnp.broadcast_to(present[:, :, None, None, None, None], (b, m, d, h, w, 1))
        keys = windows(here)[..., 0].astype(jnp.float32)
    y = extra(windows(tokens), keys)
    y = y.reshape(b, split[0], split[2], split[4], m, *edges, width)
    return y.transpose(0, 4, 1, 5, 2, 6, 3, 7, 8).reshape(tokens.shape)


def _to_places(x):
    """(B, M, d, h, w, C) -> (B d h w, M, C)."""
    return x.transpose(0, 2, 3, 4, 1, 5).reshape(-1, x.shape[1], x.shape[-1])


def _from_places(x, shape):
    """The inverse of ``_to_places``, to ``shape``."""
    b, m, d, h, w, c = shape
    return x.reshape(b, d, h, w, m, c).transpose(0, 4, 1, 2, 3, 5)
