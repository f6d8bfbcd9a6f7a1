"""Swin UNETR's encoder: attention within windows that shift, four stages, residual blocks.

Source: Swin UNETR (Hatamizadeh et al., 2022, arXiv 2201.01266) and Swin Transformer (Liu et al.,
ICCV 2021), sections 3.1 and 3.2. With the same weights the plain network, this and
``ResidualDecoder``, gives the numbers of MONAI's SwinUNETR (tests/parity/test_monai.py).
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from masm_jax.models.attention import MLP
from masm_jax.models.layers import Dense, LayerNorm, planes, space_to_depth, volumes
from masm_jax.models.masking import attention_scores, soft_average
from masm_jax.models.residual import ResidualBlock

WINDOW = 7  # tokens an edge
_APART = -100.0  # added to the scores of tokens that are no neighbours, as in the paper's code


class WindowAttention(nnx.Module):
    """Pre-norm self-attention inside of windows, with a bias by relative place, and a residual."""

    def __init__(self, width, heads, *, init):
        self.norm = LayerNorm(width)
        self.qkv = Dense(width, 3 * width, init=init)
        self.out = Dense(width, width, init=init)
        self.table = nnx.Param(init.normal(((2 * WINDOW - 1) ** 3, heads), 0.02))
        self.heads = heads

    def __call__(self, x, shifted):
        """Attend.

        Args:
          x: (B, D, H, W, C).
          shifted: windows half a window further on; along an axis of one window they stay.

        Returns:
          the same shape.
        """
        sizes = x.shape[1:4]
        window = [min(WINDOW, size) for size in sizes]
        shift = [WINDOW // 2 if shifted and size > WINDOW else 0 for size in sizes]
        y = self.norm(x)
        more = [-size % edge for size, edge in zip(sizes, window)]
        y = jnp.pad(y, [(0, 0), *[(0, extra) for extra in more], (0, 0)])
        y = jnp.roll(y, [-step for step in shift], (1, 2, 3))
        cells = _apart(y, window)
        cells = self._attend(cells, window, _mask(y.shape[1:4], window, shift))
        y = jnp.roll(_together(cells, y.shape, window), shift, (1, 2, 3))
        return x + y[:, : sizes[0], : sizes[1], : sizes[2]]

    def _attend(self, x, window, mask):
        """(B, windows, N, C) -> the same; mask (windows, N, N) or None is added to the scores."""
        batch, windows, tokens, width = x.shape
        head = width // self.heads
        qkv = self.qkv(x).reshape(batch, windows, tokens, 3, self.heads, head)
        q, k, v = qkv.transpose(3, 0, 1, 4, 2, 5)  # each (B, windows, heads, N, head)
        scores = attention_scores(q * head**-0.5, k)
        scores = scores + self.table[...][_relative(tokens)].transpose(2, 0, 1)
        if mask is not None:
            scores = scores + mask[:, None]
        y = soft_average(scores, v)
        return self.out(y.swapaxes(2, 3).reshape(x.shape))


class Block(nnx.Module):
    """Attention in windows, then an MLP of four times the width."""

    def __init__(self, width, heads, *, init):
        self.attention = WindowAttention(width, heads, init=init)
        self.mlp = MLP(width, init=init, ratio=4)

    def __call__(self, x, shifted):
        """x: (B, D, H, W, C) -> the same."""
        return self.mlp(self.attention(x, shifted))


class Stage(nnx.Module):
    """Blocks, every other one with shifted windows; then 2^3 tokens become one, twice as wide."""

    def __init__(self, width, blocks, heads, *, init):
        self.blocks = nnx.List([Block(width, heads, init=init) for _ in range(blocks)])
        self.norm = LayerNorm(8 * width)
        self.reduction = Dense(8 * width, 2 * width, init=init, bias=False)

    def __call__(self, x, wrap):
        """x: (B, D, H, W, C) -> (B, D / 2, H / 2, W / 2, 2 C)."""
        for number, block in enumerate(self.blocks):
            x = wrap(lambda x, block=block, odd=number % 2 == 1: block(x, odd))(x)
        return self.reduction(self.norm(_merged(x)))


class SwinEncoder(nnx.Module):
    """Six feature maps, of strides 1, 2, 4, 8, 16 and 32.

    Args:
      channels_in: 1 where modalities are seen one by one, else M.
      size: sizes.Size with a transformer.
    """

    def __init__(self, channels_in, size, *, init):
        first, stages = size.transformer.width, size.transformer
        self.patch_embed = Dense(8 * channels_in, first, init=init)
        self.stages = nnx.List(
            [
                Stage(first * 2**i, blocks, heads, init=init)
                for i, (blocks, heads) in enumerate(zip(stages.blocks, stages.heads))
            ]
        )
        widths = size.widths
        ins = (channels_in, *widths[1:4], widths[5])
        outs = (*widths[:4], widths[5])  # the map of stride 16 is left as it comes
        self.blocks = nnx.List([ResidualBlock(*pair, init=init) for pair in zip(ins, outs)])
        self.widths = widths

    @jax.named_scope("encoder")
    def __call__(self, x, depth, wrap=lambda block: block):
        """As ``Encoder``: planes (N D, H, W, C_in) -> per level the planes, and their depth."""
        y = volumes(self.patch_embed(space_to_depth(x, 2)), depth // 2)
        maps = [x, planes(_norm(y))]
        for stage in self.stages:
            y = stage(y, wrap)
            maps.append(planes(_norm(y)))
        depths = [depth // 2**level for level in range(6)]
        blocks = dict(zip((0, 1, 2, 3, 5), self.blocks))
        for level, block in blocks.items():
            run = wrap(lambda x, block=block, depth=depths[level]: block(x, depth))
            maps[level] = run(maps[level])
        return list(zip(maps, depths))


def _norm(x):
    """Layer norm without parameters over the last axis."""
    y = x.astype(jnp.float32)
    y = y - y.mean(-1, keepdims=True)
    return (y * jax.lax.rsqrt((y * y).mean(-1, keepdims=True) + 1e-5)).astype(x.dtype)


def _apart(x, window):
    """(B, D, H, W, C) -> (B, windows, N, C)."""
    batch, d, h, w, c = x.shape
    a, b, e = window
    x = x.reshape(batch, d // a, a, h // b, b, w // e, e, c)
    return x.transpose(0, 1, 3, 5, 2, 4, 6, 7).reshape(batch, -1, a * b * e, c)


def _together(x, shape, window):
    """The inverse of ``_apart``; ``shape``: (B, D, H, W, C)."""
    batch, d, h, w, c = shape
    a, b, e = window
    x = x.reshape(batch, d // a, h // b, w // e, a, b, e, c)
    return x.transpose(0, 1, 4, 2, 5, 3, 6, 7).reshape(shape)


# The order in which the eight neighbours become channels, (d, h, w).
_ORDER = sorted(itertools.product((0, 1), repeat=3), key=lambda at: (sum(at), [-i for i in at]))


def _merged(x):
    """(B, D, H, W, C) -> (B, D / 2, H / 2, W / 2, 8 C)."""
    return jnp.concatenate([x[:, d::2, h::2, w::2] for d, h, w in _ORDER], axis=-1)


def _relative(tokens):
    """(N, N) rows of the table of biases, for the first N places of a whole window.

    Windows cut short by a small grid take the rows of the same numbers, not of the same distances:
    so do MONAI's, and weights trained there expect it.
    """
    places = np.stack(np.meshgrid(*[np.arange(WINDOW)] * 3, indexing="ij"), -1).reshape(-1, 3)
    apart = places[:tokens, None] - places[None, :tokens] + WINDOW - 1
    return apart @ np.array([(2 * WINDOW - 1) ** 2, 2 * WINDOW - 1, 1])


def _mask(sizes, window, shift):
    """(windows, N, N) float32: what comes from the other end of the volume is no neighbour."""
    if not any(shift):
        return None
    region = np.zeros(sizes, np.int64)
    for axis, (size, edge, step) in enumerate(zip(sizes, window, shift)):
        part = np.zeros(size, np.int64)
        if step:
            part[-edge:], part[-step:] = 1, 2
        region = 3 * region + part.reshape([-1 if i == axis else 1 for i in range(3)])
    ids = np.asarray(_numpy_apart(region, window))
    return np.where(ids[:, :, None] == ids[:, None, :], 0, _APART).astype(np.float32)


def _numpy_apart(region, window):
    """(D, H, W) -> (windows, N)."""
    (d, h, w), (a, b, e) = region.shape, window
    region = region.reshape(d // a, a, h // b, b, w // e, e)
    return region.transpose(0, 2, 4, 1, 3, 5).reshape(-1, a * b * e)
