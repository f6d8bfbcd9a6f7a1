"""The 3-D convolution, in the form that each backend runs fastest.

One function, ``conv``, one result; three ways to compute it:

* ``direct``  one 3-D convolution: what cuDNN is made for.
* ``taps``    the sum over the depth taps of 2-D convolutions with depth folded into the batch. On
              TPU the large folded batch is laid into the lanes, so few channels are not padded to
              128.
* ``stacked`` the depth neighbours side by side in the channels, then one 2-D convolution; of large
              planes, of very small ones, and for the gradient of the kernel matrix products. On CPU
              it runs forward and backward several times faster than ``direct``
              (docs/performance.md).
"""

import contextlib
import contextvars
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.layout import Layout, with_layout_constraint

from masm_jax.models import spatial

LOWERINGS = ("direct", "taps", "stacked")
CONV = "conv"  # name of the results, for those who decide what is kept for the way back
_FASTEST = {"cpu": "stacked", "tpu": "taps"}
_platform = contextvars.ContextVar("platform", default=None)


def fastest(platform):
    """The lowering for a platform: "cpu", "tpu", "cuda", ..."""
    return _FASTEST.get(platform, "direct")


@contextlib.contextmanager
def traced_for(platform):
    """Inside, ``conv`` takes the lowering for ``platform``: for programs that run elsewhere."""
    token = _platform.set(platform)
    try:
        yield
    finally:
        _platform.reset(token)


def platform_of_trace():
    """Where the program being traced will run: the default backend, or that of ``traced_for``."""
    return _platform.get() or jax.default_backend()


def conv(x, kernel, *, depth, stride=1, lowering=None):
    """3-D convolution, padded as PyTorch's ``padding=k // 2`` (symmetric, at every stride).

    Args:
      x: (B D, H, W, C) features, as planes (layers.planes).
      kernel: (k, k, k, C, C_out) with odd k; cast to the dtype of ``x``.
      depth: D.
      stride: 1 or 2, the same on every axis.
      lowering: one of LOWERINGS; None picks the fastest for the default backend, or for the
        platform of ``traced_for``.

    Returns:
      (B ceil(D / stride), ceil(H / stride), ceil(W / stride), C_out) in the dtype of ``x``.
    """
    size = kernel.shape[0]
    if size == 1 and stride == 1:
        return x @ kernel[0, 0, 0].astype(x.dtype)
    platform = platform_of_trace()
    lowering = lowering or fastest(platform)
    if lowering not in LOWERINGS:
        raise ValueError(f"lowering={lowering!r}: expected one of {LOWERINGS} or None")
    laid = planes_in_lanes if platform == "tpu" else lambda planes, _: planes
    channels = min(kernel.shape[-2:])
    y = _FORMS[lowering](laid(x, channels), kernel.astype(x.dtype), depth, stride)
    return checkpoint_name(laid(y, channels), CONV)


def planes_in_lanes(x, channels):
    """(N, H, W, C) in the order of memory that a TPU reads with the least padding.

    Tiles of its memory have 128 lanes. Left to itself, the compiler lays the channels there where
    there are few hundred planes: of a decoder at level 1, 24 of 128 lanes were used, and it moved
    four times the bytes (docs/scaling.md).

    Args:
      x: planes.
      channels: the smaller number of them on the two sides of the convolution.
    """
    exported = not isinstance(x.shape[0], int)  # for any number of tiles at once (export.py)
    if exported or 2 * _padding(x.shape[0]) > _padding(channels):
        return x  # unknown, or little to gain: the compiler's choice
    return with_layout_constraint(x, Layout(major_to_minor=(1, 2, 3, 0)))


def _padding(size, lanes=128):
    return -(-size // lanes) * lanes / size


def _direct(x, kernel, depth, stride):
    side = kernel.shape[0] // 2
    numbers = ("NDHWC", "DHWIO", "NDHWC")
    volumes, ends = x.reshape(-1, depth, *x.shape[1:]), (side, side)
    if spatial.count() > 1:
        volumes, ends = spatial.with_halo(volumes, side), (0, 0)
    pad = [ends, (side, side), (side, side)]
    y = lax.conv_general_dilated(volumes, kernel, (stride,) * 3, pad, dimension_numbers=numbers)
    return y.reshape(-1, *y.shape[2:])


def _taps(x, kernel, depth, stride):
    shifted = _shifted(x, kernel, depth, stride)
    return sum(_planes(tap, kernel[t], stride) for t, tap in enumerate(shifted))


def _stacked(x, kernel, depth, stride):
    if stride == 1:
        return _in_all_planes(x, kernel, depth, spatial.count())
    return _planes(*_beside(x, kernel, depth, stride), stride)


def _beside(x, kernel, depth, stride):
    """x with its depth neighbours in the channels, and the 2-D kernel for that."""
    size = kernel.shape[0]
    shifted = jnp.concatenate(_shifted(x, kernel, depth, stride), axis=-1)
    return shifted, jnp.moveaxis(kernel, 0, 2).reshape(size, size, -1, kernel.shape[-1])


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _in_all_planes(x, kernel, depth, devices):
    """Stride 1, in the form that is fastest for planes of this size."""
    with spatial.shared_by(devices):  # the way back is traced when that is long forgotten
        return _of_size(x, kernel, depth)


def _of_size(x, kernel, depth):
    size = kernel.shape[0]
    exported = not isinstance(x.shape[0], int)  # for any number of tiles at once (export.py)
    if x.shape[1] * x.shape[2] >= _LARGE and not exported:
        return _part_by_part(x, kernel, depth)
    x, kernel = _beside(x, kernel, depth, 1)
    if x.shape[1] * x.shape[2] <= size * size:
        return _as_product(x, kernel)
    return _planes(x, kernel, 1)


def _as_product(x, kernel):
    """``_planes`` as one matrix product: on planes of 2 x 2 XLA's is 25 times slower on a CPU."""
    n, h, w, _ = x.shape
    size, side = kernel.shape[0], kernel.shape[0] // 2
    x = jnp.pad(x, ((0, 0), (side, side), (side, side), (0, 0)))
    seen = [x[:, i : i + h, j : j + w] for i in range(size) for j in range(size)]
    return jnp.concatenate(seen, -1) @ kernel.reshape(-1, kernel.shape[-1])


def _part_by_part(x, kernel, depth):
    """Some rows of a plane after the others, in a core's cache: neighbours along depth and width
    beside each other, times the kernel for all of its rows at once; then these are added."""
    n, h, w, channels = x.shape
    size, side, out = kernel.shape[0], kernel.shape[0] // 2, kernel.shape[-1]
    ends = (side, side)
    volumes = spatial.with_halo(x.reshape(-1, depth, h, w, channels), side)
    volumes = jnp.pad(volumes, ((0, 0), (0, 0), ends, ends, (0, 0)))
    wide = kernel.transpose(0, 2, 3, 1, 4).reshape(-1, size * out)
    parts = _parts(h, max(1, _OF_ROWS // (w * size * size * channels * x.dtype.itemsize)))
    rows = h // parts

    def part(index):
        plane, start = index // parts, index % parts * rows
        start = (plane // depth, plane % depth, start, 0, 0)
        shape = (1, size, rows + 2 * side, *volumes.shape[3:])
        (seen,) = lax.dynamic_slice(volumes, start, shape)
        seen = [seen[i, :, j : j + w] for i in range(size) for j in range(size)]
        y = jnp.concatenate(seen, -1) @ wide
        return sum(y[t : t + rows, :, t * out : (t + 1) * out] for t in range(size))

    return lax.map(part, jnp.arange(n * parts)).reshape(n, h, w, out)


def _forward(x, kernel, depth, devices):
    return _in_all_planes(x, kernel, depth, devices), (x, kernel)


def _backward(depth, devices, saved, dy):
    x, kernel = saved
    turned = jnp.flip(kernel, (0, 1, 2)).swapaxes(3, 4)
    with spatial.shared_by(devices):
        beside, _ = _beside(x, kernel, depth, 1)
    gradient = _kernel_gradient(beside, dy, kernel.shape[0])
    gradient = jnp.moveaxis(gradient.reshape(kernel.shape), 2, 0)
    return _in_all_planes(dy, turned, depth, devices), gradient


_in_all_planes.defvjp(_forward, _backward)
_LARGE = 32 * 32  # voxels of a plane
_OF_ROWS, _OF_PLANES = 2**23, 2**22  # bytes of the neighbours of a part: about a core's cache


def _kernel_gradient(x, dy, size):
    """The gradient of ``_planes`` (stride 1) by its kernel: x times the neighbours of dy, summed.

    XLA's CPU convolution takes the planes for channels there, and the grid for a kernel: 5 to 10
    GFLOP/s for 128 planes of 32 x 32. As matrix products of a few planes each, which stay in the
    cache, it is 5 to 10 times faster (docs/performance.md).

    Args:
      x: (N, H, W, C).
      dy: (N, H, W, C_out).
      size: k.

    Returns:
      (k, k, C, C_out) in the dtype of ``x``, summed in float32.
    """
    n, h, w, channels = x.shape
    out, side = dy.shape[-1], size // 2

    def product(x, dy):
        dy = jnp.pad(dy, ((0, 0), (side, side), (side, side), (0, 0)))
        starts = [(size - 1 - i, size - 1 - j) for i in range(size) for j in range(size)]
        beside = jnp.concatenate([dy[:, i : i + h, j : j + w] for i, j in starts], -1)
        return jnp.einsum("nhwc,nhwo->co", x, beside, preferred_element_type=jnp.float32)

    plane = h * w * size * size * out * dy.dtype.itemsize
    parts = _parts(n, max(1, _OF_PLANES // plane))
    split = [a.reshape(parts, n // parts, *a.shape[1:]) for a in (x, dy)]
    total = lax.map(lambda part: product(*part), tuple(split)).sum(0)
    return total.reshape(channels, size, size, out).transpose(1, 2, 0, 3).astype(x.dtype)


def _parts(n, most):
    """The least number of equal parts of n with at most ``most`` each."""
    return next(parts for parts in range(-(-n // most), n + 1) if n % parts == 0)


_FORMS = {"direct": _direct, "taps": _taps, "stacked": _stacked}


def _shifted(x, kernel, depth, stride):
    """What each depth tap of the kernel sees: k arrays (B ceil(D / stride), H, W, C)."""
    taps = (spatial.neighbour(x, t - kernel.shape[0] // 2, depth) for t in range(kernel.shape[0]))
    return [_every(tap, depth, stride) for tap in taps]


def _every(x, depth, stride):
    """Every ``stride``-th plane, where possible without unfolding depth."""
    if depth % stride:
        volumes = x.reshape(-1, depth, *x.shape[1:])[:, ::stride]
        return volumes.reshape(-1, *x.shape[1:])
    return x[::stride]


def _planes(x, kernel, stride):
    """The same 2-D convolution in every plane: (N, H, W, C) -> (N, H', W', C_out)."""
    pad = [(kernel.shape[0] // 2,) * 2] * 2
    numbers = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(x, kernel, (stride, stride), pad, dimension_numbers=numbers)
