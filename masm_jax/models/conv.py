"""The 3-D convolution, in the form that each backend runs fastest.

One function, ``conv``, one result; three ways to compute it:

* ``direct``  one 3-D convolution: what cuDNN is made for.
* ``taps``    the sum over the depth taps of 2-D convolutions with depth folded into the batch. On
              TPU the large folded batch is laid into the lanes, so few channels are not padded to
              128.
* ``stacked`` the depth neighbours side by side in the channels, then one 2-D convolution or matrix
              products (conv_planes.py). On CPU it runs forward and backward several times faster
              than ``direct`` (docs/performance.md).
"""

import contextlib
import contextvars

import jax
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.layout import Layout, with_layout_constraint

from masm_jax.models import spatial
from masm_jax.models.conv_planes import convolved, shifted, stacked

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
    taps = shifted(x, kernel, depth, stride)
    return sum(convolved(tap, kernel[t], stride) for t, tap in enumerate(taps))


_FORMS = {"direct": _direct, "taps": _taps, "stacked": stacked}
