"""Mosaic patterns of the modality shift: which modality a place borrows its patch from.

A pattern is a small periodic table of offsets; ``shift`` moves, at each place p, the patch of
modality ``(m + offset(p)) mod M`` into the plane of modality m. It is a permutation, so ``unshift``
is exact, and it has no parameters. Source: MASM (arXiv 2403.02074) swaps patches between modalities
in a mosaic before self-attention; the pattern was not available to us, so every one here is our
assumption (docs/paper.md). ``bayer`` and ``tps`` follow the temporal patch shift of TPS (Xiang et
al., ECCV 2022), with time read as modality. ``learnt`` chooses the offsets while training
(``LearntMosaic``).
"""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

_WRITTEN = re.compile(r"(?:random:(?P<seed>\d+)|(?P<learnt>learnt))(?::(?P<edge>[1-9]\d*))?")
_EDGE = 2  # tokens, of the cell that is repeated
_BAYER = [[[0, 1], [3, 2]]]
PATTERNS = {
    "none": [[[0]]],
    "bayer": _BAYER,  # every 2x2 cell over (h, w) holds each of four modalities once
    "bayer3d": _BAYER + [[[2, 3], [1, 0]]],  # bayer + 2 (d mod 2): every 2x2x2 cell, each twice
    "tps": [[[-4, 1, 2], [-1, 0, 3], [-2, -3, 4]]],
    "diagonal": None,  # (d + h + w) mod M: its period is M
}


def offsets(pattern, grid, num_modalities):
    """Offsets of a pattern on a token grid, taken mod M.

    Args:
      pattern: a name of PATTERNS; "random:SEED" or "random:SEED:EDGE", every offset equally often,
        shuffled in a cell of EDGE^3 tokens (2); or a list of integers nested 2 deep (h, w) or 3
        deep (d, h, w).
      grid: (d, h, w) number of tokens per axis.
      num_modalities: M >= 1.

    Returns:
      (d, h, w) int32 NumPy array with values in [0, M).

    Raises:
      ValueError: an unknown name, or a list that is not a 2-D or 3-D table.
    """
    written = _WRITTEN.fullmatch(pattern) if isinstance(pattern, str) else None
    if written and written["seed"]:
        edge = int(written["edge"] or _EDGE)
        table = np.arange(edge**3) % num_modalities
        table = np.random.default_rng(int(written["seed"])).permutation(table)
        table = table.reshape(edge, edge, edge)
    elif isinstance(pattern, str):
        if pattern not in PATTERNS:
            raise ValueError(
                f"mosaic={pattern!r}: expected one of {sorted(PATTERNS)}, random:SEED, "
                f"random:SEED:EDGE, learnt, learnt:EDGE, or a list of integers"
            )
        table = PATTERNS[pattern]
        if table is None:
            return (np.indices(grid).sum(0) % num_modalities).astype(np.int32)
    else:
        table = pattern
    table = np.asarray(table)
    if table.ndim == 2:
        table = table[None]
    if table.ndim != 3 or not np.issubdtype(table.dtype, np.integer):
        raise ValueError(
            f"mosaic={pattern!r}: expected integers nested 2 deep (h, w) or 3 (d, h, w)"
        )
    d, h, w = np.indices(grid)
    periodic = table[d % table.shape[0], h % table.shape[1], w % table.shape[2]]
    return (periodic % num_modalities).astype(np.int32)


def shift(x, offsets):  # noqa: A002 - the published name
    """X'[b, m, p] = X[b, (m + offset(p)) mod M, p], the offsets known while tracing.

    Written as a choice between the M rolls of the modality axis: on TPU a gather is a loop over
    places, and so is its way back.

    Args:
      x: (B, M, D, H, W, C).
      offsets: (D, H, W) integers, constant while tracing.

    Returns:
      (B, M, D, H, W, C), a permutation of ``x`` within every place.
    """
    return _chosen(x, np.asarray(offsets))


def unshift(x, offsets):
    """The exact inverse of ``shift`` with the same offsets."""
    return _chosen(x, -np.asarray(offsets))


def verify(pattern, grid, num_modalities):
    """Shift numbered patches on the host, and shift them back: every one must come home.

    A cheap check at every start; a wrong shift trains all the same, only worse.

    Args:
      pattern, grid, num_modalities: of ``offsets``.

    Returns:
      The offsets.

    Raises:
      ValueError: a place loses a patch, has one twice, or has another after the way back.
    """
    table = offsets(pattern, grid, num_modalities)
    shape = (1, num_modalities, *grid, 1)
    here = np.arange(np.prod(shape)).reshape(shape)
    moved = shift(here, table)
    for what, found in (
        ("has not each modality once after the shift", np.sort(moved, axis=1)),
        ("has other patches after the way back", unshift(moved, table)),
    ):
        wrong = np.argwhere((found != here).any(axis=(0, 1, 5)))
        if len(wrong):
            raise ValueError(
                f"mosaic={pattern!r}: place {tuple(wrong[0].tolist())} of the token grid "
                f"{tuple(grid)} {what}, with offset {table[tuple(wrong[0])]} of {num_modalities} "
                f"modalities; expected a permutation and its inverse (models/mosaic.py)"
            )
    return table


def _chosen(x, offsets):
    xp = np if isinstance(x, np.ndarray) else jnp  # on the host: ``verify``
    modalities = x.shape[1]
    if not offsets.any() or modalities == 1:
        return x
    offsets = offsets % modalities
    result = x
    for step in range(1, modalities):
        here = offsets == step
        if here.any():
            result = xp.where(xp.asarray(here)[..., None], xp.roll(x, -step, axis=1), result)
    return result


def learnt_edge(pattern):
    """Edge in tokens of the cell of "learnt" or "learnt:EDGE"; None for any other pattern."""
    written = _WRITTEN.fullmatch(pattern) if isinstance(pattern, str) else None
    return int(written["edge"] or _EDGE) if written and written["learnt"] else None


class LearntMosaic(nnx.Module):
    """A distribution over the M offsets for every place of a cell, which is repeated over the grid.

    While training each example draws its offsets by a hard Gumbel-Softmax (Jang et al., ICLR 2017;
    the gradient is that of the soft one); otherwise the likeliest count. What is drawn is a
    permutation at every place, so the way back is exact.

    Args:
      edge: of the cell, in tokens.
      grid: (d, h, w) of the tokens.
      modalities: M.
    """

    def __init__(self, edge, grid, modalities, *, init):
        self.logits = nnx.Param(init.normal((edge, edge, edge, modalities), 0.1))
        self.grid = tuple(grid)

    def __call__(self, batch, key=None, temperature=1.0, noise=1.0):
        """Which offset each place has: (B, d, h, w, M) float32 of 0 and 1. key: (B,), or None."""
        logits = jnp.broadcast_to(self.logits[...], (batch, *self.logits[...].shape))
        if key is not None:
            draw = jax.vmap(functools.partial(jax.random.gumbel, shape=logits.shape[1:]))
            soft = jax.nn.softmax((logits + noise * draw(key)) / temperature)
        else:
            soft = logits
        chosen = jax.nn.one_hot(soft.argmax(-1), soft.shape[-1])
        if key is not None:
            chosen = chosen + soft - jax.lax.stop_gradient(soft)
        for axis, size in enumerate(self.grid, 1):
            chosen = jnp.take(chosen, np.arange(size) % chosen.shape[axis], axis=axis)
        return chosen


def shift_chosen(x, chosen, back=False):
    """``shift`` (``back``: ``unshift``) with the offsets of a ``LearntMosaic``.

    Args:
      x: (B, M, D, H, W, C).
      chosen: (B, D, H, W, M) of 0 and 1.
    """
    weights = chosen.astype(x.dtype)[:, None, ..., None]  # (B, 1, D, H, W, M, 1)
    sign = 1 if back else -1
    return sum(jnp.roll(x, sign * o, axis=1) * weights[..., o, :] for o in range(x.shape[1]))
