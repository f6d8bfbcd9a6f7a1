"""The 3-D convolution plane by plane: its pieces, and the form for CPUs, ``stacked``.

XLA's 2-D convolution on a CPU is slow on very small planes, with stride 2 and for gradients, and
of a whole level it wants the neighbours of every voxel in memory that was never used before. There
the work is done in parts that stay in a core's cache, as matrix products: the neighbours of some
rows beside each other, times the kernel. What each form gains: docs/performance.md.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from masm_jax.models import conv_parts, spatial

_LARGE = 32 * 32  # voxels of a plane
# Of the gradient of a kernel: bytes of the neighbours of a part. Where there are many of the small
# parts, of so many places at least, so many of them at once are worth their compilation.
_OF_PLANES, _OF_BLOCK = 2**22, 2**19
_PLACES, _MANY, _AT_ONCE = 256, 512, 8
_NARROW = 16  # channels, in and out, for which two places are taken as one


def shifted(x, kernel, depth, stride):
    """What each depth tap of the kernel sees: k arrays (B ceil(D / stride), H, W, C)."""
    taps = (spatial.neighbour(x, t - kernel.shape[0] // 2, depth) for t in range(kernel.shape[0]))
    return [_every(tap, depth, stride) for tap in taps]


def _every(x, depth, stride):
    """Every ``stride``-th plane, where possible without unfolding depth."""
    if depth % stride:
        volumes = x.reshape(-1, depth, *x.shape[1:])[:, ::stride]
        return volumes.reshape(-1, *x.shape[1:])
    return x[::stride]


def convolved(x, kernel, stride):
    """The same 2-D convolution in every plane: (N, H, W, C) -> (N, H', W', C_out)."""
    pad = [(kernel.shape[0] // 2,) * 2] * 2
    numbers = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(x, kernel, (stride, stride), pad, dimension_numbers=numbers)


def stacked(x, kernel, depth, stride):
    """The 3-D convolution (arguments and result as of ``conv.conv``), as fast as a CPU can."""
    exported = not isinstance(x.shape[0], int)  # for any number of tiles at once (export.py)
    plane = x.shape[1] * x.shape[2]
    few = not exported and x.shape[0] * plane // stride**3 <= kernel.shape[-1]
    if few or plane <= kernel.shape[0] ** 2:
        return _as_product(x, kernel, depth, stride)
    large = plane >= _LARGE and not exported
    if stride == 1:
        return _dense(x, kernel, depth, large, spatial.count())
    halves = not any(size % 2 for size in (depth, *x.shape[1:3]))
    if stride == 2 and kernel.shape[0] == 3 and large and halves:
        return _halved(x, kernel, depth, spatial.count())
    return convolved(*_beside(x, kernel, depth, stride), stride)


def _beside(x, kernel, depth, stride=1):
    """x with its depth neighbours in the channels, and the 2-D kernel for that."""
    size = kernel.shape[0]
    beside = jnp.concatenate(shifted(x, kernel, depth, stride), axis=-1)
    return beside, jnp.moveaxis(kernel, 0, 2).reshape(size, size, -1, kernel.shape[-1])


def _as_product(x, kernel, depth, stride):
    """All that the kernel sees of a voxel beside each other, times the kernel as it is.

    Where there are fewer voxels than channels the kernel is what is large: turned round for the way
    back, or its gradient put in order, took longer than the products. And on planes of 2 x 2 XLA's
    own convolution is 25 times slower.
    """
    size, side = kernel.shape[0], kernel.shape[0] // 2
    h, w = x.shape[1:3]
    around = ((0, 0), (side, side), (side, side), (0, 0))
    taps = [jnp.pad(tap, around) for tap in shifted(x, kernel, depth, stride)]
    places = np.ndindex(size, size, size)
    seen = [taps[t][:, i : i + h : stride, j : j + w : stride] for t, i, j in places]
    return jnp.concatenate(seen, -1) @ kernel.reshape(-1, kernel.shape[-1])


# ---------------------------------------------------------------- stride 1


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _dense(x, kernel, depth, large, devices):
    with spatial.shared_by(devices):  # the way back is traced when that is long forgotten
        if large:
            return _in_parts(x, kernel, depth)
        return convolved(*_beside(x, kernel, depth), 1)


def _dense_forward(x, kernel, depth, large, devices):
    return _dense(x, kernel, depth, large, devices), (x, kernel)


def _dense_backward(depth, large, devices, saved, dy):
    x, kernel = saved
    turned = jnp.flip(kernel, (0, 1, 2)).swapaxes(3, 4)
    with spatial.shared_by(devices):
        gradient = _kernel_gradient(x, dy, kernel.shape[0], depth, large and devices == 1)
    return _dense(dy, turned, depth, large, devices), gradient


_dense.defvjp(_dense_forward, _dense_backward)


def _in_parts(x, kernel, depth):
    """The neighbours along depth (along width too, where channels are not in fours), times the
    kernel for all places of its plane that are left; their sum.
    """
    n, h, w, channels = x.shape
    size, out = kernel.shape[0], kernel.shape[-1]
    narrow = max(channels, out) <= _NARROW and channels % 4 == 0
    fold = 2 if narrow and size == 3 and w % 2 == 0 else 1
    if fold == 2:  # pairs of places, each with twice the channels, that see two pairs
        kernel = _of_pairs(kernel)
    across, channels, out = kernel.shape[2:]
    # XLA puts many pieces side by side as they are, and few of them number by number, up to thrice
    # as slow: three planes are given to it as twelve pieces, or their nine neighbours as nine.
    pieces = 4 if channels % 4 == 0 else 1
    beside = 1 if pieces > 1 else across  # of width, before the product and not after it
    after = across // beside
    wide = kernel.transpose(0, 2, 3, 1, 4) if beside > 1 else kernel.transpose(0, 3, 1, 2, 4)
    wide = wide.reshape(size * beside * channels, size * after * out)
    row = w // fold * size * x.dtype.itemsize * max(beside * channels, after * out)
    parts, rows, window = conv_parts.windows(x, depth, size, 1, row)

    def part(index):
        x = window(index)
        x = x.reshape(*x.shape[:2], -1, pieces, channels // pieces)
        width = x.shape[2] - beside + 1
        seen = [x[i, :, j : j + width, c] for i, j, c in np.ndindex(size, beside, pieces)]
        y = (jnp.concatenate(seen, -1) @ wide).reshape(-1, width, size, after, out)
        return sum(y[t : t + rows, j : j + w // fold, t, j] for t, j in np.ndindex(size, after))

    return lax.map(part, jnp.arange(parts)).reshape(n, h, w, out // fold)


def _of_pairs(kernel):
    """(3, 3, 3, C, C_out) -> (3, 3, 2, 2 C, 2 C_out), for two places along width as one.

    Of the four places that a pair sees the first one does not reach the last, nor the second the
    first: a third more products, of longer vectors, and fewer sums after them.
    """
    taps = [jnp.pad(kernel, ((0, 0), (0, 0), (i, 1 - i), (0, 0), (0, 0))) for i in range(2)]
    channels, out = kernel.shape[-2:]
    return jnp.stack(taps, 4).reshape(3, 3, 2, 2 * channels, 2 * out)


def _kernel_gradient(x, dy, size, depth, both):
    """The gradient by the kernel, stride 1: x with its depth neighbours times the neighbours of dy
    in the plane, summed.

    XLA takes the planes for channels there, and the grid for a kernel: 5 to 10 GFLOP/s for 128
    planes of 32 x 32.

    Args:
      x: (B D, H, W, C).
      dy: (B D, H, W, C_out).
      size: k.
      depth: D.
      both: dy is padded as the gradient by x pads it, so that both read one array.

    Returns:
      (k, k, k, C, C_out) in the dtype of ``x``, summed in float32.
    """
    _, h, w, channels = x.shape
    out, side = dy.shape[-1], size // 2
    place = size**2 * out * dy.dtype.itemsize  # bytes of its neighbours
    planes, rows, parts = conv_parts.blocks(x.shape, depth, max(_OF_BLOCK // place, _PLACES))
    at_once = _AT_ONCE if parts >= _MANY and parts % _AT_ONCE == 0 else 1
    if at_once == 1:
        planes, rows, parts = conv_parts.blocks(x.shape, depth, _OF_PLANES // place)
    volumes = spatial.with_halo(x.reshape(-1, depth, h, w, channels), side)
    padded, before = conv_parts.padded(dy, depth, side, ends=both), side if both else 0
    block, split = (planes, rows, w), h // rows

    def product(index, seen, near):
        """The part ``index``, in the memory of its neighbours: what they are after it too."""
        plane, row = index // split * planes, index % split * rows
        volume, plane = plane // depth, plane % depth
        for tap in range(size):
            start = (volume, plane + tap, row, 0, 0)
            (part,) = conv_parts.cut(volumes, start, (1, *block, channels))
            seen = conv_parts.beside_others(seen, part, tap)
        for tap, (i, j) in enumerate(np.ndindex(size, size)):
            start = (volume, plane + before, row + i, j, 0)
            (part,) = conv_parts.cut(padded, start, (1, *block, out))
            near = conv_parts.beside_others(near, part, tap)
        return conv_parts.over_places(seen, near), seen, near

    shape = size * channels, size**2 * out
    memory = [(*block, each) for each in shape]
    total = conv_parts.total(product, parts, shape, memory, at_once, like=x)
    total = total.reshape(size, channels, size, size, out)
    # What tap (i, j) sees of x at a place is seen of dy from there at the tap turned round.
    return jnp.flip(total, (2, 3)).transpose(0, 2, 3, 1, 4).astype(x.dtype)


# ---------------------------------------------------------------- stride 2, kernels of 3


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _halved(x, kernel, depth, devices):
    with spatial.shared_by(devices):
        parts, neighbours = _of_every_second(x, depth)
    flat = kernel.reshape(-1, kernel.shape[-1])
    y = lax.map(lambda index: neighbours(index) @ flat, jnp.arange(parts))
    n, h, w, _ = x.shape
    return y.reshape(n // 2, h // 2, w // 2, kernel.shape[-1])


def _halved_forward(x, kernel, depth, devices):
    return _halved(x, kernel, depth, devices), (x, kernel)


def _halved_backward(depth, devices, saved, dy):
    x, kernel = saved
    with spatial.shared_by(devices):
        parts, neighbours = _of_every_second(x, depth)
        dx = _to_every_second(dy, kernel, depth // 2)

    split = dy.reshape(parts, -1, dy.shape[-1])

    def product(index):
        return (conv_parts.over_places(neighbours(index), split[index]),)

    shape = math.prod(kernel.shape[:-1]), kernel.shape[-1]
    total = conv_parts.total(product, parts, shape, like=x)
    return dx, total.reshape(kernel.shape).astype(x.dtype)


_halved.defvjp(_halved_forward, _halved_backward)


def _of_every_second(x, depth):
    """Number of parts, and index -> (rows, W / 2, 27 C), all that the kernel sees."""
    _, h, w, channels = x.shape
    row = w // 2 * 27 * channels * x.dtype.itemsize
    parts, rows, window = conv_parts.windows(x, depth, 3, 2, row)

    def neighbours(index):
        x = window(index)
        taps = np.ndindex(3, 3, 3)
        return jnp.concatenate([x[d, i : i + 2 * rows : 2, j : j + w : 2] for d, i, j in taps], -1)

    return parts, neighbours


def _to_every_second(dy, kernel, depth):
    """The gradient by the input: eight neighbours of dy give eight voxels, by one product."""
    n, h, w, out = dy.shape
    channels = kernel.shape[-2]
    ahead = spatial.with_halo(dy.reshape(-1, depth, h, w, out), 1)[:, 1:]
    ahead = jnp.pad(ahead, ((0, 0), (0, 0), (0, 1), (0, 1), (0, 0)))
    # Along each axis tap t of place o reaches voxel 2 o + t - 1. With one zero tap before them they
    # are (place before this one or this, first or second voxel of it).
    pairs = jnp.pad(kernel, ((1, 0), (1, 0), (1, 0), (0, 0), (0, 0)))
    pairs = jnp.flip(pairs.reshape(2, 2, 2, 2, 2, 2, channels, out), (0, 2, 4))
    flat = pairs.transpose(0, 2, 4, 7, 1, 3, 5, 6).reshape(8 * out, 8 * channels)

    def plane(index):
        start = (index // depth, index % depth, 0, 0, 0)
        (seen,) = conv_parts.cut(ahead, start, (1, 2, *ahead.shape[2:]))
        seen = [seen[d, i : i + h, j : j + w] for d, i, j in np.ndindex(2, 2, 2)]
        dx = (jnp.concatenate(seen, -1) @ flat).reshape(h, w, 2, 2, 2, channels)
        return dx.transpose(2, 0, 3, 1, 4, 5)

    return lax.map(plane, jnp.arange(n)).reshape(2 * n, 2 * h, 2 * w, channels)
