"""The Modality-Aware mixer: pairs of modalities look at each other, and prune what is redundant.

Source: MASM (arXiv 2403.02074): pairwise dependencies between specific modalities at the low
levels, a decision mask that prunes redundant patches and replaces them with the aligned modality's
features. The predictor is DynamicViT's. What the paper leaves open is listed in docs/paper.md.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from masm_jax.models import spatial
from masm_jax.models.attention import MLP, SelfAttention
from masm_jax.models.layers import Dense, LayerNorm, upsample
from masm_jax.models.masking import sample_keep
from masm_jax.models.tokens import Tokens


class Predictor(nnx.Module):
    """Two logits (keep, prune) per token from the token itself and the mean over all tokens.

    ``bias`` is the logit difference at the start: sigmoid(bias) is the first share of kept tokens.
    """

    def __init__(self, width, *, init, bias):
        self.norm = LayerNorm(width)
        self.inner = Dense(width, width, init=init)
        self.hidden = Dense(width, width // 2, init=init)
        self.logits = Dense(width // 2, 2, init=init)
        self.logits.bias[...] = jnp.array([bias / 2, -bias / 2], jnp.float32)

    def __call__(self, x):
        """x: (B, N, width) -> (B, N, 2)."""
        x = jax.nn.gelu(self.inner(self.norm(x)), approximate=False)
        local, whole = jnp.split(x, 2, axis=-1)
        mean = spatial.mean(whole.mean(1, keepdims=True))
        whole = jnp.broadcast_to(mean, whole.shape)
        x = jnp.concatenate([local, whole], axis=-1)
        return self.logits(jax.nn.gelu(self.hidden(x), approximate=False))


class AwareMixer(nnx.Module):
    """Masked attention within pairs of modalities; one set of weights serves every pair.

    Args:
      channels: C of the level.
      patch, grid: P_j and the token grid (d, h, w) of the level.
      pairs: index pairs into the modality axis; a modality in no pair passes through.
      modalities: M.
      width, heads, depth: of the attention blocks.
      keep_bias: start of the predictor, as a logit.
    """

    def __init__(
        self, channels, patch, grid, *, pairs, modalities, width, heads, depth, keep_bias, init
    ):
        self.pairs = tuple(tuple(pair) for pair in pairs)
        self.tokens = Tokens(channels, width, patch, grid, modalities, init=init)
        self.predictor = Predictor(width, init=init, bias=keep_bias)
        self.attention = nnx.List([SelfAttention(width, heads, init=init) for _ in range(depth)])
        self.mlp = nnx.List([MLP(width, init=init) for _ in range(depth)])

    def __call__(self, x, depth, key=None, temperature=1.0, noise=1.0):
        """Mix the pairs.

        Args:
          x: (M B D, H, W, C), planes of the features of one level, modality slowest.
          depth: D.
          key: (B,) PRNG keys while training, None otherwise.
          temperature: of the Gumbel-Softmax.
          noise: scale of its noise.

        Returns:
          mixed features like ``x``, and keep (B, M', d, h, w) float32 of 0 and 1, where M' runs
          over the modalities of the pairs in their order.
        """
        modalities = len(self.tokens.modality[...])
        members = np.array(self.pairs).reshape(-1)  # a0 b0 a1 b1 ...
        partners = np.array([pair[::-1] for pair in self.pairs]).reshape(-1)
        tokens = _pick(self.tokens.encode(x, depth), members)
        batch, count, *grid, width = tokens.shape
        flat = tokens.reshape(batch * count, -1, width)
        keep = sample_keep(self.predictor(flat), key, temperature, noise)
        keep = keep.reshape(batch, count, *grid)

        # Blended across the border of a patch: a hard border shows in the segmentation.
        mask = _spread(keep, members, modalities, 1.0).swapaxes(0, 1)
        mask = upsample(mask.reshape(-1, *grid[1:], 1), self.tokens.patch, grid[0])
        source = np.arange(modalities)
        source[members] = partners
        mixed = _replace(x, exchanged(x, source), mask)
        swapped = tokens.reshape(batch, -1, 2, *grid, width)[:, :, ::-1].reshape(tokens.shape)
        tokens = _replace(tokens, swapped, keep[..., None])

        pair_tokens = tokens.reshape(batch * len(self.pairs), -1, width)
        pair_keep = keep.reshape(batch * len(self.pairs), -1)
        for attention, mlp in zip(self.attention, self.mlp):
            pair_tokens = mlp(attention(pair_tokens, pair_keep))
        cells = self.tokens.cells_of(pair_tokens.reshape(tokens.shape))
        cells = _spread(cells, members, modalities, 0.0)  # no gate, no shift where there is no pair
        return self.tokens.modulate(mixed, cells), keep


def _replace(own, other, keep):
    """m x_a + (1 - m) x_b: kept patches stay, pruned ones become the partner's."""
    keep = keep.astype(own.dtype)
    return keep * own + (1 - keep) * other


def _pick(x, chosen):
    """x[:, chosen] by slices: XLA has no fast gather on TPU, and a loop for its way back."""
    if list(chosen) == list(range(x.shape[1])):
        return x
    return jnp.stack([x[:, i] for i in chosen], axis=1)


def _spread(x, places, size, rest):
    """The inverse of ``_pick``: x[:, i] comes to places[i] of ``size``; ``rest`` is elsewhere."""
    if list(places) == list(range(size)):
        return x
    found = {int(place): x[:, i] for i, place in enumerate(places)}
    empty = jnp.full_like(x[:, 0], rest)
    return jnp.stack([found.get(place, empty) for place in range(size)], axis=1)


def exchanged(x, source):
    """Planes (M B D, H, W, C), modality slowest, of which m is taken from source[m]."""
    if list(source) == list(range(len(source))):
        return x
    parts = jnp.split(x, len(source))
    return jnp.concatenate([parts[m] for m in source])
