"""UNETR's encoder: a vision transformer on tokens of 16^3 voxels, its states projected to skips.

Source: Hatamizadeh et al., WACV 2022 (arXiv 2103.10504). With the same weights the plain network,
this and ``ResidualDecoder``, gives the numbers of MONAI's UNETR (tests/parity/test_monai.py).
"""

import math

import jax
from flax import nnx

from masm_jax.models.attention import MLP, SelfAttention
from masm_jax.models.layers import Dense, LayerNorm, space_to_depth
from masm_jax.models.residual import Projection, ResidualBlock

TOKEN = 16  # voxels an edge
STATES = (3, 6, 9)  # after which the skips of levels 2, 3 and 4 are taken, counted from 0


class Block(nnx.Module):
    """A block of the transformer: attention, then an MLP of four times the width."""

    def __init__(self, width, heads, *, init):
        self.attention = SelfAttention(width, heads, init=init, qkv_bias=False)
        self.mlp = MLP(width, init=init, ratio=4)

    def __call__(self, x):
        """x: (B, N, width) -> the same."""
        return self.mlp(self.attention(x))


class UNETREncoder(nnx.Module):
    """Six feature maps, of strides 1, 2, 4, 8, 16 and 16.

    The paper has five. As an encoder of MASM the fifth is the state before the last block and the
    sixth the last one, normed, both projected to the widths of the size; ``plain`` gives the five
    of the paper, the last of the transformer's width.

    Args:
      channels_in: 1 where modalities are seen one by one, else M.
      size: sizes.Size with a transformer.
      patch: (D, H, W), multiples of 16: there is an embedding for every place.
      plain: the five maps of the paper.
    """

    def __init__(self, channels_in, size, *, patch, init, plain=False):
        width, heads = size.transformer.width, size.transformer.heads[0]
        places = math.prod(edge // TOKEN for edge in patch)
        self.patch_embedding = Dense(TOKEN**3 * channels_in, width, init=init)
        self.position_embeddings = nnx.Param(init.normal((places, width), 0.02))
        blocks = range(size.transformer.blocks[0])
        self.blocks = nnx.List([Block(width, heads, init=init) for _ in blocks])
        self.norm = LayerNorm(width)
        self.encoder1 = ResidualBlock(channels_in, size.widths[0], init=init)
        self.projections = nnx.List(
            [
                Projection(width, size.widths[level], more, init=init)
                for level, more in ((1, 2), (2, 1), (3, 0))
            ]
        )
        self.widths = (*size.widths[:4], width) if plain else size.widths
        ends = () if plain else size.widths[4:]
        self.last = nnx.List([Dense(width, channels, init=init) for channels in ends])

    @jax.named_scope("encoder")
    def __call__(self, x, depth, wrap=lambda block: block):
        """As ``Encoder``: planes (N D, H, W, C_in) -> per level the planes, and their depth."""
        cells = self.patch_embedding(space_to_depth(x, TOKEN))  # (N D / 16, H / 16, W / 16, width)
        low = depth // TOKEN
        tokens = cells.reshape(len(cells) // low, -1, cells.shape[-1])
        tokens = tokens + self.position_embeddings[...].astype(x.dtype)
        states = []
        for block in self.blocks:
            tokens = wrap(block)(tokens)
            states.append(tokens.reshape(cells.shape))
        features = [(wrap(lambda x: self.encoder1(x, depth))(x), depth)]
        for project, number, stride in zip(self.projections, STATES, (2, 4, 8)):
            state = wrap(lambda x, project=project: project(x, low))(states[number])
            features.append((state, depth // stride))
        ends = [self.norm(states[-1])]
        if self.last:
            ends = [dense(end) for dense, end in zip(self.last, (states[-2], *ends))]
        return features + [(end, low) for end in ends]
