"""Transforms of one training example on the device: geometry and intensity, without chance.

Each takes its parameters as arguments and is made for ``vmap`` over a batch inside ``jit``;
``masm_jax.data.augment`` draws the parameters. Formulas follow batchgeneratorsv2, the library of
nnU-Net v2 (Isensee et al., Nature Methods 2021); where they differ the docstring says so.
"""

import functools
import itertools
import math
import operator

import jax
import jax.numpy as jnp

BLUR_RADIUS = 2  # voxels: the widest sigma, 1 voxel, is cut at two sigma (its spread becomes 0.96)
MEAN_OVER_STD = 4.0  # of raw intensities in a brain; 1.8 to 7.3 in ten BraTS cases, median 3.9
_SPATIAL = (1, 2, 3)


# --------------------------------------------------------------------------------------------
# Geometry
# --------------------------------------------------------------------------------------------


def rotation_scale(angles: jax.Array, scale: jax.Array) -> jax.Array:
    """Matrix that takes an output voxel, seen from the centre, to the input voxel it shows.

    Args:
        angles: (3,) float32, radians about the axes D, H, W.
        scale: () float32; above 1 the content shrinks (nnU-Net's direction).

    Returns:
        (3, 3) float32, ``scale * R_w @ R_h @ R_d``.
    """
    (cd, ch, cw), (sd, sh, sw) = jnp.cos(angles), jnp.sin(angles)
    one, nil = jnp.ones_like(cd), jnp.zeros_like(cd)
    about_d = jnp.array([[one, nil, nil], [nil, cd, -sd], [nil, sd, cd]])
    about_h = jnp.array([[ch, nil, sh], [nil, one, nil], [-sh, nil, ch]])
    about_w = jnp.array([[cw, -sw, nil], [sw, cw, nil], [nil, nil, one]])
    # Explicit precision: TF32 or one bf16 pass would move the far corners by tenths of a voxel.
    return scale * jnp.linalg.multi_dot([about_w, about_h, about_d], precision="highest")


def affine(
    image: jax.Array, label: jax.Array, matrix: jax.Array, *, outside: int = 0
) -> tuple[jax.Array, jax.Array]:
    """Resample about the centre: trilinear for the image, nearest for the label.

    Args:
        image: (M, D, H, W) float32.
        label: (D, H, W) integer.
        matrix: (3, 3) float32, output offset from the centre -> input offset, in voxels.
        outside: Label of what comes from outside the grid; the image is 0 there.

    Returns:
        The pair resampled, same shapes and types. The image equals
        ``scipy.ndimage.affine_transform(order=1, mode="grid-constant")``.
    """
    modalities, *grid = image.shape
    centre = [(n - 1) / 2 for n in grid]
    offset = [jnp.arange(n, dtype=jnp.float32) - c for n, c in zip(grid, centre)]
    source = [
        matrix[axis, 0] * offset[0][:, None, None]
        + matrix[axis, 1] * offset[1][None, :, None]
        + matrix[axis, 2] * offset[2][None, None, :]
        + centre[axis]
        for axis in range(3)
    ]
    values = jnp.asarray(image).reshape(modalities, -1)

    def index_and_inside(position):
        within = [(p >= 0) & (p < n) for p, n in zip(position, grid)]
        i, j, k = (jnp.clip(p, 0, n - 1) for p, n in zip(position, grid))
        return (i * grid[1] + j) * grid[2] + k, functools.reduce(operator.and_, within)

    low = [jnp.floor(s).astype(jnp.int32) for s in source]
    resampled = jnp.zeros(image.shape, jnp.float32)
    for corner in itertools.product((0, 1), repeat=3):
        position = [p + step for p, step in zip(low, corner)]
        index, inside = index_and_inside(position)
        # The hat function of the distance to the voxel that is read, not source - floor(source):
        # XLA may compute the source twice with different rounding, and at a whole coordinate the
        # latter then gives the wrong neighbour all the weight (seen in map_coordinates at 96^3).
        weight = math.prod(jnp.maximum(0.0, 1 - jnp.abs(s - p)) for s, p in zip(source, position))
        weight = jnp.where(inside, weight, 0.0)
        resampled += weight * values.at[:, index].get(mode="promise_in_bounds")

    index, inside = index_and_inside([jnp.floor(s + 0.5).astype(jnp.int32) for s in source])
    nearest = jnp.asarray(label).reshape(-1).at[index].get(mode="promise_in_bounds")
    return resampled, jnp.where(inside, nearest, outside).astype(label.dtype)


def mirror(volume: jax.Array, flips: jax.Array) -> jax.Array:
    """Reverse those of the last three axes of (..., D, H, W) that ``flips`` (3,) bool names."""
    for axis in range(3):
        volume = jnp.where(flips[axis], jnp.flip(volume, axis - 3), volume)
    return volume


# --------------------------------------------------------------------------------------------
# Intensity; image is (M, D, H, W) float32 throughout
# --------------------------------------------------------------------------------------------


def gaussian_noise(image: jax.Array, key: jax.Array, sigma: jax.Array) -> jax.Array:
    """Add one Gaussian field of standard deviation ``sigma`` () to all modalities.

    nnU-Net names the range (0, 0.1) "noise_variance" but hands the drawn number to the generator as
    the standard deviation, and with ``synchronize_channels`` repeats one field over the channels.
    Both are kept: what its results rest on is the code, not the name.
    """
    return image + sigma * jax.random.normal(key, image.shape[1:], jnp.float32)


def _along_axes(image: jax.Array, matrices: tuple[jax.Array, ...]) -> jax.Array:
    """Multiply the axes D, H, W of (M, D, H, W) with ``matrices``, three of (M, n_out, n_in)."""
    for axis, matrix in zip("dhw", matrices):
        out = "mdhw".replace(axis, "x")
        image = jnp.einsum(f"mdhw,mx{axis}->{out}", image, matrix, precision="highest")
    return image


def _blur_matrix(sigma: jax.Array, length: int) -> jax.Array:
    """Each row blurs one of ``length`` voxels, mirrored at the ends: (length, length)."""
    steps = jnp.arange(-BLUR_RADIUS, BLUR_RADIUS + 1)
    # 1e-3 is so narrow that only the middle weight is not 0: sigma 0 leaves the image bit by bit.
    kernel = jnp.exp(-0.5 * (steps / jnp.maximum(sigma, 1e-3)) ** 2)
    kernel /= jnp.sum(kernel)
    read = jnp.abs(jnp.arange(length)[:, None] + steps)  # left end: -1 -> 1
    read = length - 1 - jnp.abs(length - 1 - read)  # right end: n -> n - 2
    return jnp.sum(jax.nn.one_hot(read, length) * kernel[:, None], axis=1)


def gaussian_blur(image: jax.Array, sigma: jax.Array) -> jax.Array:
    """Separable Gaussian blur, kernel radius 2, edges mirrored without repeating the edge voxel.

    As products with banded matrices: 19 ms at 4x96^3 on two cores, five shifted copies per axis 68.

    Args:
        image: (M, D, H, W) float32, at least 3 voxels along each axis.
        sigma: (M, 3) float32, voxels, per modality and axis; 0 leaves that axis as it is.

    Returns:
        (M, D, H, W) float32; ``scipy.ndimage.gaussian_filter(radius=2, mode="mirror")``.
    """
    matrices = tuple(
        jax.vmap(lambda s, n=length: _blur_matrix(s, n))(sigma[:, axis])
        for axis, length in enumerate(image.shape[1:])
    )
    return _along_axes(image, matrices)


def _low_resolution_matrix(zoom: jax.Array, length: int) -> jax.Array:
    """Nearest down to ``round(zoom * length)`` samples and linear up again, (length, length)."""
    coarse = jnp.maximum(jnp.round(zoom * length), 1.0)
    # Where the voxel centres of the full grid lie on the coarse one.
    position = jnp.clip((jnp.arange(length) + 0.5) * (coarse / length) - 0.5, 0.0, coarse - 1)
    low = jnp.floor(position)
    matrix = jnp.zeros((length, length), jnp.float32)
    for step in (0, 1):
        sample = jnp.minimum(low + step, coarse - 1)
        read = jnp.floor((sample + 0.5) * (length / coarse)).astype(jnp.int32)
        # Clipped at the end: both samples are the last one, position is whole, the second weighs 0.
        weight = jnp.maximum(0.0, 1 - jnp.abs(position - (low + step)))
        matrix += weight[:, None] * jax.nn.one_hot(jnp.minimum(read, length - 1), length)
    return matrix


def low_resolution(image: jax.Array, zoom: jax.Array) -> jax.Array:
    """Simulate a coarser acquisition: nearest-neighbour downsampling, trilinear upsampling.

    The coarse grid has another size at every draw, which ``jit`` cannot have; both steps are linear
    and separable, so their product is one static (n, n) matrix per axis with two entries a row.

    Args:
        image: (M, D, H, W) float32.
        zoom: (M,) float32 in (0, 1], coarse size over full size; 1 leaves the modality as it is.

    Returns:
        (M, D, H, W) float32; torch's ``interpolate`` "nearest-exact" then "trilinear", as nnU-Net.
    """
    matrices = tuple(
        jax.vmap(lambda z, n=length: _low_resolution_matrix(z, n))(zoom)
        for length in image.shape[1:]
    )
    return _along_axes(image, matrices)


def brightness(image: jax.Array, factor: jax.Array) -> jax.Array:
    """Multiply each modality with its ``factor`` (M,)."""
    return image * factor[:, None, None, None]


def contrast(image: jax.Array, factor: jax.Array) -> jax.Array:
    """Stretch each modality about its mean by ``factor`` (M,), clipped to its range before."""
    mean = jnp.mean(image, axis=_SPATIAL, keepdims=True)
    low = jnp.min(image, axis=_SPATIAL, keepdims=True)
    high = jnp.max(image, axis=_SPATIAL, keepdims=True)
    return jnp.clip((image - mean) * factor[:, None, None, None] + mean, low, high)


def bias_field(image: jax.Array, field: jax.Array) -> jax.Array:
    """Shade each modality as a receive coil does: its raw intensity times ``1 + field``.

    A z-scored voxel x stands for the raw intensity ``std * (x + mean / std)``, so the product is
    x + field * (x + mean / std); ``MEAN_OVER_STD`` stands for that ratio.

    Args:
        image: (M, D, H, W) float32, z-scored.
        field: (M, a, b, c) float32 on a coarse grid, cubically interpolated to the full one.

    Returns:
        (M, D, H, W) float32.
    """
    return image + jax.image.resize(field, image.shape, "cubic") * (image + MEAN_OVER_STD)


def gamma(image: jax.Array, exponent: jax.Array) -> jax.Array:
    """Gamma curve over the range of each modality; its mean and standard deviation are kept.

    Args:
        image: (M, D, H, W) float32.
        exponent: (M,) float32.

    Returns:
        (M, D, H, W) float32.
    """
    mean, std = jnp.mean(image, _SPATIAL, keepdims=True), jnp.std(image, _SPATIAL, keepdims=True)
    low = jnp.min(image, axis=_SPATIAL, keepdims=True)
    extent = jnp.max(image, axis=_SPATIAL, keepdims=True) - low
    unit = (image - low) / jnp.maximum(extent, 1e-7)
    curved = unit ** exponent[:, None, None, None] * extent + low
    # A constant modality (one that is missing: all 0) has no spread; it comes back as it was.
    spread = jnp.maximum(jnp.std(curved, _SPATIAL, keepdims=True), 1e-7)
    return (curved - jnp.mean(curved, _SPATIAL, keepdims=True)) * (std / spread) + mean


def gamma_inverted(image: jax.Array, exponent: jax.Array) -> jax.Array:
    """``gamma`` of the negated image, negated back: bends the bright end, not the dark."""
    return -gamma(-image, exponent)
