"""Between resolutions: trilinear upsampling, average pooling."""

import functools
import operator

import jax
import jax.numpy as jnp
import numpy as np

from masm_jax.models import spatial
from masm_jax.models.conv import platform_of_trace
from masm_jax.models.layers import RESAMPLE, planes, volumes


@jax.named_scope(RESAMPLE)
def upsample(x, factor, depth):
    """Trilinear upsampling by a whole factor, PyTorch's align_corners=False.

    One axis after the other, depth first, while the array is small. A small matrix each, whose rows
    sum to 1: no gather. On a CPU, which would turn the array for every product, from neighbour to
    neighbour, and by the matrices, depth first, on the way back.

    Args:
      x: (B D, H, W, C), planes.
      factor: f.
      depth: D.

    Returns:
      (B f D, f H, f W, C).
    """
    if factor == 1:
        return x
    if platform_of_trace() == "cpu" and spatial.count() == 1:
        return _interpolated(x, factor, depth)
    return _by_matrices(x, factor, depth)


def _by_matrices(x, factor, depth):
    x = volumes(x, depth)
    if spatial.count() > 1:  # the border is held at the ends of the volume, not at a cut
        first, last = spatial.at_ends()
        x = spatial.with_halo(x, 1)
        x = x.at[:, 0].set(jnp.where(first, x[:, 1], x[:, 0]))
        x = x.at[:, -1].set(jnp.where(last, x[:, -2], x[:, -1]))
        x = _along(x, 1, factor)[:, factor:-factor]
    else:
        x = _along(x, 1, factor)
    return _along(_along(planes(x), 1, factor), 2, factor)


def _along(x, axis, factor):
    """Linear upsampling along one axis; the border is held."""
    matrix = jnp.asarray(_matrix(x.shape[axis], factor), x.dtype)
    return jnp.moveaxis(jnp.tensordot(x, matrix, (axis, 1)), -1, axis)


def _matrix(size, factor):
    """(f size, size): a row for each place, with the shares of its two neighbours."""
    place = np.clip((np.arange(size * factor) + 0.5) / factor - 0.5, 0, size - 1)
    return np.maximum(0, 1 - np.abs(place[:, None] - np.arange(size)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _interpolated(x, factor, depth):
    x = planes(_between(volumes(x, depth), 1, factor))
    return _between(_between(x, 1, factor), 2, factor)


def _interpolated_forward(x, factor, depth):
    return _interpolated(x, factor, depth), None


def _interpolated_backward(factor, depth, _, dy):
    """The transposed matrices, depth first: one product of what lies in a row, and nothing turned;
    the other axes have less to do then.
    """
    n, h, w, channels = dy.shape
    dx = _gathered(dy.reshape(-1, depth * factor, h * w * channels), factor)
    dx = _gathered(dx.reshape(-1, h, w * channels), factor)
    dx = _gathered(dx.reshape(-1, w, channels), factor)
    return (dx.reshape(n // factor, h // factor, w // factor, channels),)


_interpolated.defvjp(_interpolated_forward, _interpolated_backward)


def _gathered(dy, factor):
    """(B, f size, C) -> (B, size, C): the way back of ``_along``."""
    batch, size, _ = dy.shape
    matrix = jnp.asarray(_matrix(size // factor, factor).T, dy.dtype)
    return jnp.matmul(jnp.broadcast_to(matrix, (batch, *matrix.shape)), dy)


def _between(x, axis, factor):
    """``_along``: ``factor`` places between every two neighbours, those past the border cut off."""
    size = x.shape[axis]
    x = jnp.pad(x, [(int(i == axis),) * 2 for i in range(x.ndim)], mode="edge")
    x = jnp.expand_dims(x, axis + 1)
    before = jax.lax.slice_in_dim(x, 0, size + 1, axis=axis)
    behind = jax.lax.slice_in_dim(x, 1, size + 2, axis=axis)
    share = (np.arange(factor) + (factor % 2 == 0) / 2) / factor  # of the one behind
    share = jnp.asarray(share.reshape(-1, *[1] * (x.ndim - axis - 2)), x.dtype)
    y = before * (1 - share) + behind * share
    y = y.reshape(*y.shape[:axis], (size + 1) * factor, *y.shape[axis + 2 :])
    first = factor - factor // 2
    return jax.lax.slice_in_dim(y, first, first + size * factor, axis=axis)


def average_pool(x, factor):
    """Mean over cells of factor^3 voxels, summed in float32: (f N, f H, f W, C) -> (N, H, W, C)."""
    if factor == 1:
        return x
    if platform_of_trace() == "cpu":
        return _pooled(x, factor)
    n, h, w, c = x.shape
    # One axis after the other, depth last: a TPU has it in the lanes, and by then there is little.
    rows = x.reshape(n, h, w // factor, factor, c).sum(3, dtype=jnp.float32)
    rows = rows.reshape(n, h // factor, factor, w // factor, c).sum(2)
    cells = rows.reshape(n // factor, factor, h // factor, w // factor, c).sum(1)
    return (cells / factor**3).astype(x.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _pooled(x, factor):
    """Depth first and one plane plus the next, which a CPU does in long vectors, and in one pass
    with what ``x`` comes from; as sums over an axis it takes three to ten times as long."""
    n, h, w, c = x.shape
    sums = x.astype(jnp.float32)
    for row in (h * w * c, w * c, c):
        parts = sums.reshape(-1, factor, row)
        sums = functools.reduce(operator.add, (parts[:, i] for i in range(factor)))
    return (sums / factor**3).astype(x.dtype).reshape(n // factor, h // factor, w // factor, c)


def _pooled_backward(factor, _, dy):
    n, h, w, c = dy.shape
    share = (dy.astype(jnp.float32) / factor**3).astype(dy.dtype)
    cells = jnp.broadcast_to(share[:, None, :, None, :, None], (n, factor, h, factor, w, factor, c))
    return (cells.reshape(n * factor, h * factor, w * factor, c),)


_pooled.defvjp(lambda x, factor: (_pooled(x, factor), None), _pooled_backward)
