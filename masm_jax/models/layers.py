"""Small layers: dense, norms, convolution block, moves between space and channels.

Modules hold float32 parameters; they compute in the dtype of their input and reduce in float32.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from masm_jax.models import spatial
from masm_jax.models.conv import conv, platform_of_trace

LEAKY_SLOPE = 0.01
RESAMPLE = "resample"  # scope of products with fixed matrices, which stand for moves of voxels


def planes(x):
    """(..., D, H, W, C) -> (N, H, W, C): all planes of all volumes one after another.

    The form in which the network computes what is as large as its input. A TPU lays N into its 128
    lanes and nothing is padded; five axes at once, or few channels in the lanes, moved two to four
    times the bytes (docs/scaling.md). Elsewhere it costs nothing.
    """
    return x.reshape(-1, *x.shape[-3:])


def volumes(x, depth):
    """(B D, H, W, C) -> (B, D, H, W, C): the inverse of ``planes``."""
    return x.reshape(-1, depth, *x.shape[1:])


def depth_to_space(x, factor):
    """(N, H, W, f^3 C) -> (f N, f H, f W, C), planes; the channel order is (fd, fh, fw, C).

    On TPU the planes, which lie in its lanes, are put between each other by themselves: with all
    axes at once the channels came into the lanes, and eight of them fill a sixteenth
    (docs/scaling.md).
    """
    if factor == 1:
        return x
    n, h, w, c = x.shape
    if platform_of_trace() == "tpu":
        parts = [_up_in_plane(part, factor) for part in jnp.split(x, factor, axis=-1)]
        return jnp.stack(parts, 1).reshape(n * factor, *parts[0].shape[1:])
    x = x.reshape(n, h, w, factor, factor, factor, c // factor**3)
    x = x.transpose(0, 3, 1, 4, 2, 5, 6)
    return x.reshape(n * factor, h * factor, w * factor, c // factor**3)


def space_to_depth(x, factor):
    """(f N, f H, f W, C) -> (N, H, W, f^3 C), planes: the inverse of ``depth_to_space``."""
    if factor == 1:
        return x
    n, h, w, c = x.shape
    if platform_of_trace() == "tpu":
        x = x.reshape(n // factor, factor, h, w, c)
        return jnp.concatenate([_down_in_plane(x[:, i], factor) for i in range(factor)], -1)
    x = x.reshape(n // factor, factor, h // factor, factor, w // factor, factor, c)
    x = x.transpose(0, 2, 4, 1, 3, 5, 6)
    return x.reshape(n // factor, h // factor, w // factor, factor**3 * c)


def _up_in_plane(x, factor):
    """(N, H, W, f^2 C) -> (N, f H, f W, C)."""
    n, h, w, c = x.shape
    x = x.reshape(n, h, w, factor, factor, c // factor**2).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(n, h * factor, w * factor, c // factor**2)


def _down_in_plane(x, factor):
    """(N, f H, f W, C) -> (N, H, W, f^2 C)."""
    n, h, w, c = x.shape
    x = x.reshape(n, h // factor, factor, w // factor, factor, c).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(n, h // factor, w // factor, factor**2 * c)


@jax.named_scope(RESAMPLE)
def stem(x, factor):
    """``space_to_depth`` of one channel: (f N, f H, f W) -> (N, H, W, f^3).

    On TPU the last axis, which scans come with, is taken apart by a product with a matrix of ones
    and zeros: seven axes at once moved twelve times the bytes. A voxel that is not finite spoils
    its row there (records and scans are checked before).
    """
    if factor == 1 or platform_of_trace() != "tpu":
        return space_to_depth(x[..., None], factor)
    n, h, w = (size // factor for size in x.shape)
    apart = np.eye(w * factor, dtype=np.float32).reshape(w * factor, w, factor)
    y = jnp.einsum(
        "nihjw,wvk->nhvijk",
        x.reshape(n, factor, h, factor, w * factor),
        jnp.asarray(apart, x.dtype),
        precision=jax.lax.Precision.HIGHEST,  # nothing is rounded
    )
    return y.reshape(n, h, w, factor**3)


@jax.named_scope(RESAMPLE)
def upsample(x, factor, depth):
    """Trilinear upsampling by a whole factor, PyTorch's align_corners=False.

    A small matrix per axis: no gather, and the rows of each sum to 1. Depth first, while the array
    is small.

    Args:
      x: (B D, H, W, C), planes.
      factor: f.
      depth: D.

    Returns:
      (B f D, f H, f W, C).
    """
    if factor == 1:
        return x
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
    size = x.shape[axis]
    place = np.clip((np.arange(size * factor) + 0.5) / factor - 0.5, 0, size - 1)
    matrix = np.maximum(0, 1 - np.abs(place[:, None] - np.arange(size)))
    return jnp.moveaxis(jnp.tensordot(x, jnp.asarray(matrix, x.dtype), (axis, 1)), -1, axis)


def average_pool(x, factor):
    """Mean over cells of factor^3 voxels, summed in float32: (f N, f H, f W, C) -> (N, H, W, C)."""
    if factor == 1:
        return x
    n, h, w, c = x.shape
    # One axis after the other, depth last: a TPU has it in the lanes, and by then there is little.
    rows = x.reshape(n, h, w // factor, factor, c).sum(3, dtype=jnp.float32)
    rows = rows.reshape(n, h // factor, factor, w // factor, c).sum(2)
    cells = rows.reshape(n // factor, factor, h // factor, w // factor, c).sum(1)
    return (cells / factor**3).astype(x.dtype)


def instance_norm(x, scale, shift, depth, eps=1e-5):
    """Instance norm over the voxels, statistics in float32, applied as one scale and one shift.

    E[x^2] - E[x]^2 cancels where the mean is large against the spread; taking off the value of one
    voxel first leaves numbers of the size of the spread.

    Args:
      x: (B D, H, W, C), planes.
      scale, shift: (B or 1, C), float32.
      depth: D.
      eps: added to the variance (PyTorch's default).

    Returns:
      (B D, H, W, C) in the dtype of ``x``.
    """
    n, h, w, c = x.shape
    batch = n // depth

    def per_plane(values):  # (B, C) -> (B D, 1, 1, C)
        return jnp.broadcast_to(values[:, None], (batch, depth, c)).reshape(-1, 1, 1, c)

    anchor = jax.lax.stop_gradient(x[depth // 2 :: depth, h // 2, w // 2]).astype(jnp.float32)
    anchor = spatial.mean(anchor)
    centred = x.astype(jnp.float32) - per_plane(anchor)
    sums = jnp.stack([centred.sum((1, 2)), (centred * centred).sum((1, 2))])
    sums = sums.reshape(2, batch, depth, c).sum(2) / (depth * h * w)
    mean, square = spatial.mean(sums)
    gain = scale * jax.lax.rsqrt(jnp.maximum(square - mean * mean, 0) + eps)
    offset = shift - (mean + anchor) * gain
    return x * per_plane(gain).astype(x.dtype) + per_plane(offset).astype(x.dtype)


class Dense(nnx.Module):
    """x @ kernel + bias over the last axis; ``gain`` 0 starts it at zero.

    Without ``bias`` it has none. ``copies`` > 1 starts it with that many equal blocks of outputs:
    ``depth_to_space`` of them is nearest-neighbour upsampling, without a checkerboard (ICNR, Aitken
    et al. 2017).
    """

    def __init__(self, features_in, features_out, *, init, gain=1.0, copies=1, bias=True):
        kernel = init.fan_in((features_in, features_out // copies), gain)
        self.kernel = nnx.Param(np.tile(kernel, (1, copies)))
        self.bias = nnx.Param(np.zeros((features_out,), np.float32)) if bias else None

    def __call__(self, x):
        y = x @ self.kernel[...].astype(x.dtype)
        return y if self.bias is None else y + self.bias[...].astype(x.dtype)


class LayerNorm(nnx.Module):
    """Norm over the last axis, statistics in float32, eps 1e-5."""

    def __init__(self, features):
        self.scale = nnx.Param(np.ones((features,), np.float32))
        self.shift = nnx.Param(np.zeros((features,), np.float32))

    def __call__(self, x):
        y = x.astype(jnp.float32)
        y = y - y.mean(-1, keepdims=True)
        y = y * jax.lax.rsqrt((y * y).mean(-1, keepdims=True) + 1e-5)
        return (y * self.scale[...] + self.shift[...]).astype(x.dtype)


def apply_all(blocks, x, depth):
    """One block of convolutions after the other: planes ``depth`` deep -> planes."""
    for block in blocks:
        x = block(x, depth)
        depth = -(-depth // block.stride)
    return x


class ConvNorm(nnx.Module):
    """Convolution 3x3x3, instance norm, leaky ReLU.

    ``groups`` > 1 holds one scale and shift per modality where modalities are folded into the batch
    (M B, ...): the option ``modality_affine``. No convolution bias: the norm would take it off.
    """

    def __init__(self, features_in, features_out, *, init, stride=1, groups=1):
        gain = 2 / (1 + LEAKY_SLOPE**2)  # He et al. 2015, for the leaky slope
        self.kernel = nnx.Param(init.fan_in((3, 3, 3, features_in, features_out), gain))
        self.scale = nnx.Param(np.ones((groups, features_out), np.float32))
        self.shift = nnx.Param(np.zeros((groups, features_out), np.float32))
        self.stride = stride

    def __call__(self, x, depth):
        """x: (B D, H, W, C), planes -> planes, strided."""
        x = conv(x, self.kernel[...], depth=depth, stride=self.stride)
        depth = -(-depth // self.stride)
        batch = x.shape[0] // depth
        x = instance_norm(x, self._each(self.scale, batch), self._each(self.shift, batch), depth)
        return jax.nn.leaky_relu(x, LEAKY_SLOPE)

    def _each(self, affine, batch):
        """(groups, C) -> (B, C); of the folded batch a modality is a block."""
        return jnp.repeat(affine[...], batch // len(affine[...]), axis=0)
