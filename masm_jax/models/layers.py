"""Small layers: dense, norms, convolution block, moves between space and channels.

Modules hold float32 parameters; they compute in the dtype of their input and reduce in float32.
"""

import functools
import operator

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
    if platform_of_trace() == "cpu":
        return _norm(x, scale, shift, depth, eps, spatial.count())
    return _norm_forward(x, scale, shift, depth, eps, spatial.count())[0]


# A way back of its own, for CPUs: XLA's there adds up number by number. A TPU moves 1.3 % more
# bytes with it (docs/performance.md).
@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def _norm(x, scale, shift, depth, eps, devices):
    return _norm_forward(x, scale, shift, depth, eps, devices)[0]


def _norm_forward(x, scale, shift, depth, eps, devices):
    anchor = x[depth // 2 :: depth, x.shape[1] // 2, x.shape[2] // 2].astype(jnp.float32)
    anchor = _over_devices(jax.lax.stop_gradient(anchor), devices)
    centred = x.astype(jnp.float32) - _per_plane(anchor, depth)
    mean, square = _over_devices(_means(centred, centred, depth), devices)
    variance = jnp.maximum(square - mean * mean, 0)
    # A constant channel comes out as its shift and hands nothing back: of a crop of air, while
    # shifts are 0 still, each norm of the chain made gradients 316 times as large, until infinite.
    slope = jnp.where(variance > 0, jax.lax.rsqrt(variance + eps), 0)
    mean = mean + anchor
    gain, offset = scale * slope, shift - mean * scale * slope
    # Cast last: on the way back the planes are added up in float32.
    y = x * _per_plane(gain, depth).astype(x.dtype) + _per_plane(offset, depth).astype(x.dtype)
    return y, (x, scale, mean, slope)


def _norm_backward(depth, eps, devices, saved, dy):
    """With z = (x - mean) slope: dx = gain (dy - mean(dy) - z mean(z dy))."""
    x, scale, mean, slope = saved
    dy, centred = dy.astype(jnp.float32), x.astype(jnp.float32) - _per_plane(mean, depth)
    means = _means(dy, centred, depth) * jnp.stack([jnp.ones_like(slope), slope])
    of_dy, of_both = _over_devices(means, devices)
    gain = scale * slope
    dx = dy * _per_plane(gain, depth) - _per_plane(gain * of_dy, depth)
    dx = dx - centred * _per_plane(gain * slope * of_both, depth)
    dshift, dscale = means * (depth * x.shape[1] * x.shape[2])
    if len(scale) == 1:
        dshift, dscale = dshift.sum(0, keepdims=True), dscale.sum(0, keepdims=True)
    return dx.astype(x.dtype), dscale, dshift


_norm.defvjp(_norm_forward, _norm_backward)


def _means(x, y, depth):
    """Over the voxels, of x and of x y: (B D, H, W, C), float32 -> (2, B, C).

    Planes are added up by their rows first, vectors of W C numbers: those of C, often 8, take a CPU
    thrice as long.
    """
    n, h, w, c = x.shape
    sums = jnp.stack([x.sum(1), (x * y).sum(1)])
    return sums.reshape(2, n // depth, depth * w, c).sum(2) / (depth * h * w)


def _over_devices(means, devices):
    """Means over a device's planes -> over those of all ``devices`` that share a volume."""
    with spatial.shared_by(devices):  # the way back is traced when that is long forgotten
        return spatial.mean(means) if devices > 1 else means


def _per_plane(values, depth):
    """(B, C) -> (B D, 1, 1, C)."""
    batch, c = values.shape
    return jnp.broadcast_to(values[:, None], (batch, depth, c)).reshape(-1, 1, 1, c)


def product(x, kernel):
    """(N, C) @ (C, C_out), summed in float32.

    For a CPU, which takes long for a product over three numbers, as a layer with three outputs has
    on its way back: four rows are taken as one then (docs/performance.md). A row that is not
    finite spoils the other three.
    """
    fold = 4 if kernel.shape[-1] < 8 and isinstance(x.shape[0], int) and x.shape[0] % 4 == 0 else 1
    kernel = jnp.kron(jnp.eye(fold, dtype=kernel.dtype), kernel) if fold > 1 else kernel
    y = jax.lax.dot(x.reshape(-1, kernel.shape[0]), kernel, preferred_element_type=jnp.float32)
    return y.reshape(-1, kernel.shape[-1] // fold)


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

    def __call__(self, *parts):
        """Of what lies side by side in the channels, or in one array: (..., C) -> (..., C_out)."""
        kernel = self.kernel[...].astype(parts[0].dtype)
        if platform_of_trace() == "cpu":
            # As matrices, without putting them side by side: of a cotangent of more axes there were
            # three copies, for the gradients by the kernel, by the bias and by x.
            rows = np.cumsum([part.shape[-1] for part in parts[:-1]])
            flat = (part.reshape(-1, part.shape[-1]) for part in parts)
            products = map(product, flat, jnp.split(kernel, rows))
            y = functools.reduce(operator.add, products).astype(kernel.dtype)
        else:
            y = (parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=-1)) @ kernel
        y = y if self.bias is None else y + self.bias[...].astype(y.dtype)
        return y.reshape(*parts[0].shape[:-1], kernel.shape[-1])


class LayerNorm(nnx.Module):
    """Norm over the last axis, statistics in float32, eps 1e-5."""

    def __init__(self, features):
        self.scale = nnx.Param(np.ones((features,), np.float32))
        self.shift = nnx.Param(np.zeros((features,), np.float32))

    def __call__(self, x):
        return _layer_norm(x, self.scale[...], self.shift[...])


@jax.custom_vjp
def _layer_norm(x, scale, shift):
    return _layer_norm_forward(x, scale, shift)[0]


@jax.jit  # traced once for each shape: there are fifty in a network
def _layer_norm_forward(x, scale, shift):
    y = x.astype(jnp.float32)
    y = y - y.mean(-1, keepdims=True)
    slope = jax.lax.rsqrt((y * y).mean(-1, keepdims=True) + 1e-5)
    y = y * slope
    return (y * scale + shift).astype(x.dtype), (y, slope, scale)


@jax.jit
def _layer_norm_backward(saved, dy):
    """dx = slope (g - mean(g) - y mean(y g)), g = dy scale."""
    y, slope, scale = saved
    dtype, dy = dy.dtype, dy.astype(jnp.float32)
    g = dy * scale
    dx = slope * (g - g.mean(-1, keepdims=True) - y * (y * g).mean(-1, keepdims=True))
    rows = tuple(range(dy.ndim - 1))
    return dx.astype(dtype), (dy * y).sum(rows), dy.sum(rows)


_layer_norm.defvjp(_layer_norm_forward, _layer_norm_backward)


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


class Fuse(Dense):
    """What lies side by side in the channels, together: dense, instance norm, leaky ReLU.

    Without the norm the result grows as training goes on, since a norm later on hides how large it
    is from the loss, and drowns what comes from below in the decoder (docs/results.md).
    """

    def __init__(self, features_in, features_out, *, init):
        gain = 2 / (1 + LEAKY_SLOPE**2)
        super().__init__(features_in, features_out, init=init, gain=gain, bias=False)
        self.scale = nnx.Param(np.ones((1, features_out), np.float32))
        self.shift = nnx.Param(np.zeros((1, features_out), np.float32))

    def __call__(self, *parts, depth):
        """Planes (B D, H, W, C) each -> (B D, H, W, C_out)."""
        x = super().__call__(*parts)
        x = instance_norm(x, self.scale[...], self.shift[...], depth)
        return jax.nn.leaky_relu(x, LEAKY_SLOPE)
