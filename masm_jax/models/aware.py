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
from masm_jax.models.layers import Dense, LayerNorm
from masm_jax.models.masking import highest, sample_keep
from masm_jax.models.resample import upsample
from masm_jax.models.tokens import Tokens

PRUNING = ("replace", "mask", "none")


class Predictor(nnx.Module):
    """Two logits (keep, prune) per token from the token itself and the mean over all tokens.

    ``bias`` is the logit difference at the start: sigmoid(bias) is the first share of kept tokens.
    """

    def __init__(self, width, *, init, bias):
        self.norm = LayerNorm(width)
        self.inner = Dense(width, width, init=init)
        self.hidden = Dense(width, width // 2, init=init)
        self.logits = Dense(width // 2, 2, init=init)
        self.logits.bias[...] = np.array([bias / 2, -bias / 2], np.float32)

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
      pairs: index pairs into the modality axis; a modality in no pair passes through, of one in
        several the results are averaged.
      modalities: M.
      width, heads, depth: of the attention blocks.
      keep_bias: start of the predictor, as a logit.
      pruning: "replace": pruned patches become the partner's, and their tokens are no keys; "mask":
        they are no keys, but stay; "none": nothing is pruned, and there is no predictor.
    """

    def __init__(
        self,
        channels,
        patch,
        grid,
        *,
        pairs,
        modalities,
        width,
        heads,
        depth,
        keep_bias,
        init,
        pruning="replace",
    ):
        self.pairs, self.pruning = tuple(tuple(pair) for pair in pairs), pruning
        self.tokens = Tokens(channels, width, patch, grid, modalities, init=init)
        if pruning != "none":
            self.predictor = Predictor(width, init=init.apart(), bias=keep_bias)
        self.attention = nnx.List([SelfAttention(width, heads, init=init) for _ in range(depth)])
        self.mlp = nnx.List([MLP(width, init=init) for _ in range(depth)])

    def __call__(self, x, depth, key=None, temperature=1.0, noise=1.0, share=1.0, present=None):
        """Mix the pairs.

        Args:
          x: (M B D, H, W, C), planes of the features of one level, modality slowest.
          depth: D.
          key: (B,) PRNG keys while training, None otherwise.
          temperature: of the Gumbel-Softmax.
          noise: scale of its noise.
          share: of the tokens of a pair (of this device, where several share a volume), those that
            are worked on; the others, of the lowest scores, attend to nothing and are no keys.
          present: (B, M) of 0 and 1: a missing modality is no key and replaces nothing (its partner
            keeps all); None: none is missing.

        Returns:
          mixed features like ``x``, and keep (B, M', d, h, w) float32 of 0 and 1, where M' runs
          over the modalities of the pairs in their order; None where nothing is pruned.
        """
        modalities = len(self.tokens.modality[...])
        members = np.array(self.pairs, int).reshape(-1)  # a0 b0 a1 b1 ...
        tokens = _pick(self.tokens.encode(x, depth), members)
        batch, count, *grid, width = tokens.shape
        pairs = batch * len(self.pairs)
        here = None if present is None else present[:, members].reshape(batch, count, 1, 1, 1)
        if self.pruning == "none":
            keys = None if here is None else jnp.broadcast_to(here, tokens.shape[:-1])
            flat = tokens.reshape(pairs, -1, width)
            done, keep = self._attend(flat, None if keys is None else keys.reshape(pairs, -1)), None
        else:
            logits = self.predictor(tokens.reshape(batch * count, -1, width))
            keep = sample_keep(logits, key, temperature, noise).reshape(batch, count, *grid)
            scores = (logits[..., 0] - logits[..., 1]).reshape(keep.shape)
            keys = keep
            if here is not None:
                # What is missing is neither kept nor lent: its place is its partner's.
                keep = jnp.where(_swapped(here) > 0, keep, 1.0)
                keys, scores = keep * here, jnp.where(here > 0, scores, -jnp.inf)
            if self.pruning == "replace":
                x, tokens = self._replaced(x, tokens, keep, modalities)
            flat, keys = tokens.reshape(pairs, -1, width), keys.reshape(pairs, -1)
            if share < 1:
                done = self._attend_some(flat, keys, scores.reshape(pairs, -1), share)
            else:
                done = self._attend(flat, keys)
        cells = self.tokens.cells_of(done.reshape(tokens.shape))
        cells = _spread(cells, members, modalities, 0.0)  # no gate, no shift where there is no pair
        return self.tokens.modulate(x, cells), keep

    def _replaced(self, x, tokens, keep, modalities):
        """Features and tokens, the pruned ones become the partner's."""
        own, lent = 1.0, 0.0
        for slots, who, source, weight in _turns(self.pairs, modalities):
            share = _spread(1 - _pick(keep, slots), who, modalities, 0.0).swapaxes(0, 1)
            share = share * weight.reshape(-1, 1, 1, 1, 1)
            # Blended across the border of a patch: a hard border shows in the segmentation.
            share = share.reshape(-1, *share.shape[3:], 1).astype(x.dtype)
            share = upsample(share, self.tokens.patch, keep.shape[2])
            own, lent = own - share, lent + share * exchanged(x, source)
        kept = keep[..., None].astype(tokens.dtype)
        return own * x + lent, kept * tokens + (1 - kept) * _swapped(tokens)

    def _attend(self, tokens, keep=None):
        """(B, N, width), the tokens of a pair, the one modality after the other -> the same."""
        for attention, mlp in zip(self.attention, self.mlp):
            tokens = mlp(attention(tokens, keep, cut=True))
        return tokens

    def _attend_some(self, tokens, keep, scores, share):
        """``_attend`` with those of the highest scores alone, the others left as they are."""
        places, rows = highest(scores, share), jnp.arange(tokens.shape[0])[:, None]
        some = self._attend(tokens[rows, places], keep[rows, places])
        done = tokens.at[rows, places].set(some, unique_indices=True)
        if self.pruning == "mask":
            return done
        worked = jnp.zeros(keep.shape, bool).at[rows, places].set(True, unique_indices=True)
        # A replaced token is its partner's: so is what comes of it, where that was worked on.
        partner, known = (jnp.roll(part, part.shape[1] // 2, axis=1) for part in (done, worked))
        borrowed = ~worked & known & (keep == 0)
        return jnp.where(borrowed[..., None], partner, done)


def _turns(pairs, modalities):
    """The pairs as turns in which every modality has one partner at most.

    Yields:
      slots: places of keep decisions (a0 b0 a1 b1 ...) that belong to this turn.
      who: their modalities.
      source: (M,) the partner of each modality, itself where it has none.
      weight: (M,) float32, one over the number of pairs a modality is in.
    """
    partners = [[] for _ in range(modalities)]  # (slot, partner)
    for number, (a, b) in enumerate(pairs):
        partners[a].append((2 * number, b))
        partners[b].append((2 * number + 1, a))
    weight = np.array([1 / max(1, len(found)) for found in partners], np.float32)
    for turn in range(max(map(len, partners))):
        who = [m for m in range(modalities) if turn < len(partners[m])]
        who.sort(key=lambda m: partners[m][turn][0])
        source = np.arange(modalities)
        source[who] = [partners[m][turn][1] for m in who]
        yield [partners[m][turn][0] for m in who], who, source, weight


def _swapped(x):
    """(B, M', ...), a0 b0 a1 b1 ... -> b0 a0 b1 a1 ..."""
    return x.reshape(x.shape[0], -1, 2, *x.shape[2:])[:, :, ::-1].reshape(x.shape)


def _pick(x, chosen):
    """x[:, chosen] by slices: XLA has no fast gather on TPU, and a loop for its way back."""
    if list(chosen) == list(range(x.shape[1])):
        return x
    return jnp.stack([x[:, i] for i in chosen], axis=1)


def _spread(x, places, size, rest):
    """The inverse of ``_pick``: x[:, i] comes to places[i] of ``size``; ``rest`` is elsewhere, and
    where several come to one place their mean."""
    if list(places) == list(range(size)):
        return x
    found = {}
    for i, place in enumerate(places):
        found.setdefault(int(place), []).append(x[:, i])
    empty = jnp.full_like(x[:, 0], rest)
    means = {place: sum(parts) / len(parts) for place, parts in found.items()}
    return jnp.stack([means.get(place, empty) for place in range(size)], axis=1)


def exchanged(x, source):
    """Planes (M B D, H, W, C), modality slowest, of which m is taken from source[m]."""
    if list(source) == list(range(len(source))):
        return x
    parts = jnp.split(x, len(source))
    return jnp.concatenate([parts[m] for m in source])
