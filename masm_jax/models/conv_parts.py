"""Convolutions part by part: cut what a kernel sees into parts, add up what each part gives."""

import jax.numpy as jnp
from jax import lax

from masm_jax.models import spatial

CACHE = 2**23  # bytes: about a core's cache


def windows(x, depth, size, stride, row):
    """Cut the output of a convolution into parts, some rows of a plane each.

    Args:
      x: (B D, H, W, C).
      depth: D.
      size, stride: of the kernel.
      row: bytes of the neighbours of a row of the output.

    Returns:
      The number of parts, the rows of each, and index -> what its rows see:
      (k, stride rows + k - stride, W + k - 1, C).
    """
    n, h, w, channels = x.shape
    side, planes = size // 2, depth // stride
    volumes = padded(x, depth, side)
    split = equal_parts(h // stride, max(1, CACHE // row))
    rows = h // stride // split
    shape = (1, size, stride * rows + size - stride, *volumes.shape[3:])

    def window(index):
        plane, part = index // split, index % split
        start = (plane // planes, plane % planes * stride, part * rows * stride, 0, 0)
        return cut(volumes, start, shape)[0]

    return n // stride * split, rows, window


def blocks(shape, depth, places):
    """Cut (B D, H, W, C) into equal blocks of some rows of a plane, or of some planes of a volume.

    Args:
      shape: (B D, H, W, C).
      depth: D.
      places: of a block, at most, but a row at least.

    Returns:
      Planes and rows of a block, and the number of blocks.
    """
    n, h, w, _ = shape
    rows = h // equal_parts(h, max(1, places // w))
    planes = depth // equal_parts(depth, max(1, places // (h * w))) if rows == h else 1
    return planes, rows, n * h // (planes * rows)


def padded(x, depth, side, ends=True):
    """(B D, H, W, C) -> (B, D + 2 side, H + 2 side, W + 2 side, C), zero past the ends.

    Without ``ends`` depth stays D.
    """
    volumes, before = x.reshape(-1, depth, *x.shape[1:]), side if ends else 0
    if ends and spatial.count() > 1:
        volumes, before = spatial.with_halo(volumes, side), 0
    around = ((before,) * 2, (side,) * 2, (side,) * 2)
    return jnp.pad(volumes, ((0, 0), *around, (0, 0)))


def cut(x, start, shape):
    """``lax.dynamic_slice`` from indices of which none counts from the end: three operations an
    index less, in the program and in its trace."""
    return lax.dynamic_slice(x, start, shape, allow_negative_indices=False)


def equal_parts(n, most):
    """The least number of equal parts of n with at most ``most`` each."""
    return next(parts for parts in range(-(-n // most), n + 1) if n % parts == 0)


def beside_others(all_of_them, part, number):
    """``part`` in its place among the channels of all, which XLA writes there without a copy."""
    start = (0,) * (part.ndim - 1) + (number * part.shape[-1],)
    return lax.dynamic_update_slice(all_of_them, part, start, allow_negative_indices=False)


def over_places(x, y):
    """(..., C) and (..., C_out) of the same places -> (C, C_out): products summed in float32."""
    x, y = (array.reshape(-1, array.shape[-1]) for array in (x, y))
    return jnp.matmul(x.T, y, preferred_element_type=jnp.float32)


def total(product, parts, shape, memory=(), at_once=1, *, like):
    """The sum over all parts, in place: a stack of them would be read once more.

    Args:
      product: index and arrays of the shapes ``memory`` -> (``shape``) and those arrays, changed.
      parts: how many.
      shape: of the sum, float32.
      memory: shapes of what is taken once, for what lies side by side in a part.
      at_once: how many parts a turn has, which divides them. They have nothing to do with each
        other, so that each core works on its own (with four XLA 0.10.2 copies on one core alone).
      like: an array of the dtype of ``memory``. The arrays begin with 0 of it, a number that may be
        another one on each device.

    Returns:
      ``shape``, float32.
    """
    zero = 0 * like.reshape(-1)[0]
    spare = [[jnp.zeros(size, like.dtype) + zero for size in memory] for _ in range(at_once)]

    def step(index, carry):
        total, spare = carry
        done = [product(index * at_once + number, *own) for number, own in enumerate(spare)]
        return total + sum(part for part, *_ in done), [own for _, *own in done]

    begin = jnp.zeros(shape, jnp.float32) + zero.astype(jnp.float32)
    return lax.fori_loop(0, parts // at_once, step, (begin, spare))[0]
