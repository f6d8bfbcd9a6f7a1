"""Each transform of augmentation against scipy, torch or values worked out by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import ndimage

from masm_jax.data import transforms

SHAPE = (4, 20, 22, 24)


@pytest.fixture(scope="module")
def image():
    return np.random.default_rng(1).normal(size=SHAPE).astype(np.float32)


def _rotation(degrees, axes):
    """Rotation by way of scipy's own convention, for one axis."""
    angle = np.radians(degrees)
    matrix = np.eye(3)
    i, j = axes
    matrix[[i, i, j, j], [i, j, i, j]] = np.cos(angle), -np.sin(angle), np.sin(angle), np.cos(angle)
    return matrix


def test_rotation_scale_is_the_product_of_the_three_rotations():
    matrix = transforms.rotation_scale(jnp.radians(jnp.array([10.0, -20.0, 30.0])), jnp.array(1.3))
    expected = 1.3 * _rotation(30, (0, 1)) @ _rotation(20, (0, 2)) @ _rotation(10, (1, 2))
    np.testing.assert_allclose(matrix, expected, atol=1e-6)


@pytest.mark.parametrize("scale", [0.7, 1.0, 1.4])
def test_affine_equals_scipy_everywhere(image, scale):
    angles = jnp.radians(jnp.array([-30.0, 12.0, 25.0]))
    matrix = transforms.rotation_scale(angles, jnp.array(scale))
    label = np.random.default_rng(2).integers(0, 4, SHAPE[1:]).astype(np.uint8)
    out, target = jax.jit(transforms.affine)(image, label, matrix)
    centre = (np.array(SHAPE[1:]) - 1) / 2
    offset = centre - np.asarray(matrix) @ centre
    options = {"matrix": np.asarray(matrix, np.float64), "offset": offset}
    expected = [
        ndimage.affine_transform(x, order=1, mode="grid-constant", **options) for x in image
    ]
    np.testing.assert_allclose(out, expected, atol=1e-4)
    nearest = ndimage.affine_transform(label, order=0, mode="grid-constant", **options)
    assert np.mean(np.asarray(target) == nearest) > 0.9995  # but for ties of rounding
    assert target.dtype == np.uint8


def test_affine_at_whole_coordinates_reads_the_right_voxel():
    """A quarter turn puts every sample on a voxel up to rounding, where floor is not stable."""
    image = np.random.default_rng(3).normal(size=(1, 96, 8, 96)).astype(np.float32)
    matrix = transforms.rotation_scale(jnp.array([0.0, jnp.pi / 2, 0.0]), jnp.array(1.0))
    label = np.random.default_rng(4).integers(0, 4, (96, 8, 96)).astype(np.uint8)
    out, target = jax.jit(transforms.affine)(image, label, matrix)
    np.testing.assert_allclose(out[0], np.rot90(image[0], axes=(0, 2)), atol=1e-3)
    np.testing.assert_array_equal(target, np.rot90(label, axes=(0, 2)))


def test_affine_identity_is_exact_and_outside_is_zero(image):
    label = np.ones(SHAPE[1:], np.uint8)
    affine = jax.jit(transforms.affine)
    out, target = affine(image, label, jnp.eye(3))
    np.testing.assert_array_equal(out, image)
    out, target = affine(image, label, 1.4 * jnp.eye(3))  # above 1: content shrinks
    assert np.all(out[:, :2] == 0) and np.all(target[:2] == 0) and np.all(target[6:14, 6:14, 6:14])


def test_mirror(image):
    out = transforms.mirror(jnp.asarray(image), jnp.array([True, False, True]))
    np.testing.assert_array_equal(out, image[:, ::-1, :, ::-1])


def test_noise_has_the_standard_deviation_asked_for_and_is_one_field(image):
    change = transforms.gaussian_noise(image, jax.random.key(0), jnp.array(0.08)) - image
    assert abs(float(jnp.std(change)) / 0.08 - 1) < 0.02
    assert abs(float(jnp.mean(change))) < 4 * 0.08 / np.sqrt(np.prod(SHAPE[1:]))
    np.testing.assert_allclose(change[0], change[3], atol=1e-6)
    lag = np.asarray(change[0])
    assert abs(np.corrcoef(lag[1:].ravel(), lag[:-1].ravel())[0, 1]) < 0.05


def test_blur_equals_scipy_per_modality_and_axis(image):
    sigma = np.array(
        [[0.5, 0.7, 1.0], [1.0, 0.6, 0.5], [0.0, 0.0, 0.0], [0.8, 0.8, 0.8]], np.float32
    )
    out = jax.jit(transforms.gaussian_blur)(image, sigma)
    for m in (0, 1, 3):
        expected = ndimage.gaussian_filter(image[m], sigma[m], radius=2, mode="mirror")
        np.testing.assert_allclose(out[m], expected, atol=1e-5)
    np.testing.assert_array_equal(out[2], image[2])


@pytest.mark.parametrize("zoom", [0.5, 0.53, 0.7, 0.9, 0.97])
def test_low_resolution_equals_torch(image, zoom):
    torch = pytest.importorskip("torch")
    out = jax.jit(transforms.low_resolution)(image, jnp.array([zoom, 1.0, zoom, 1.0]))
    small = [round(n * zoom) for n in SHAPE[1:]]
    resize = torch.nn.functional.interpolate
    coarse = resize(torch.from_numpy(image)[None], small, mode="nearest-exact")
    expected = resize(coarse, SHAPE[1:], mode="trilinear")[0].numpy()
    np.testing.assert_allclose(out[0::2], expected[0::2], atol=1e-4)
    np.testing.assert_array_equal(out[1::2], image[1::2])


def test_low_resolution_by_hand():
    line = jnp.arange(8.0).reshape(1, 8, 1, 1) * jnp.ones((1, 8, 8, 8))
    out = jax.jit(transforms.low_resolution)(line, jnp.array([0.5]))[0, :, 3, 3]
    # Coarse voxels take 1, 3, 5, 7; the fine centres lie at -0.25, 0.25, 0.75, ... of that grid.
    np.testing.assert_allclose(out, [1, 1.5, 2.5, 3.5, 4.5, 5.5, 6.5, 7], atol=1e-6)


def test_brightness_and_contrast_by_hand():
    image = jnp.array([0.0, 1.0, 2.0, 5.0, -2.0, 0.0, 0.0, 2.0]).reshape(2, 1, 2, 2)
    factor = jnp.array([0.75, 1.25])
    np.testing.assert_allclose(
        transforms.brightness(image, factor).ravel(), [0, 0.75, 1.5, 3.75, -2.5, 0, 0, 2.5]
    )
    # Means 2 and 0; the second is stretched beyond its range and clipped back.
    np.testing.assert_allclose(
        transforms.contrast(image, factor).ravel(), [0.5, 1.25, 2, 4.25, -2, 0, 0, 2], atol=1e-6
    )


def test_gamma_by_hand():
    image = jnp.array([0.0, 0.25, 0.75, 1.0]).reshape(1, 1, 2, 2)
    curved = np.array([0, 0.25**1.5, 0.75**1.5, 1])
    source = np.array([0, 0.25, 0.75, 1])
    expected = (curved - curved.mean()) / curved.std() * source.std() + source.mean()
    out = transforms.gamma(image, jnp.array([1.5]))
    np.testing.assert_allclose(np.ravel(out), expected, atol=1e-6)
    # Inverted: the curve of 1 - x, seen from above, so the result is mirrored about one half.
    inverted = transforms.gamma_inverted(image, jnp.array([1.5]))
    np.testing.assert_allclose(np.ravel(inverted), 1 - expected[::-1], atol=1e-6)


@pytest.mark.parametrize("transform", [transforms.gamma, transforms.gamma_inverted])
def test_gamma_keeps_mean_and_spread_and_order(image, transform):
    exponent = jnp.array([0.7, 1.0, 1.2, 1.5])
    shifted = image + 40.0  # far from 0: the statistics must not cancel
    out = np.asarray(jax.jit(transform)(shifted, exponent))
    np.testing.assert_allclose(out.mean((1, 2, 3)), shifted.mean((1, 2, 3)), rtol=1e-5)
    np.testing.assert_allclose(out.std((1, 2, 3)), shifted.std((1, 2, 3)), rtol=1e-3)
    np.testing.assert_allclose(out[1], shifted[1], atol=1e-4)  # exponent 1
    order = np.argsort(shifted[3], axis=None)
    assert np.all(np.diff(out[3].ravel()[order]) >= 0)


def test_gamma_leaves_an_empty_modality():
    out = transforms.gamma(jnp.zeros((2, 4, 4, 4)), jnp.array([0.7, 1.5]))
    np.testing.assert_array_equal(out, np.zeros((2, 4, 4, 4)))


# ---------------------------------------------------------------- shading


def test_bias_field_multiplies_the_raw_intensity():
    """Shade the raw image with a field that varies along one axis, then z-score it as before."""
    rng = np.random.default_rng(0)
    mean, std = 4.0 * 25.0, 25.0
    raw = rng.normal(mean, std, (2, 5, 6, 9)).astype(np.float32)
    coarse = rng.normal(0, 0.2, (2, 1, 1, 9)).astype(np.float32)  # 9 of 9: nothing to interpolate
    shaded = transforms.bias_field(jnp.asarray((raw - mean) / std), jnp.asarray(coarse))
    np.testing.assert_allclose(shaded, (raw * (1 + coarse) - mean) / std, atol=1e-4)


def test_bias_field_is_smooth_and_stays_near_its_coarse_values():
    coarse = jnp.asarray(np.random.default_rng(1).normal(0, 0.1, (1, 3, 3, 3)), jnp.float32)
    field = transforms.bias_field(jnp.zeros((1, 24, 24, 24)), coarse) / transforms.MEAN_OVER_STD
    steps = max(float(jnp.abs(jnp.diff(field, axis=axis)).max()) for axis in (1, 2, 3))
    extent = float(coarse.max() - coarse.min())
    assert steps < extent / 4  # 8 voxels from one coarse value to the next
    assert float(jnp.abs(field).max()) < 1.5 * float(jnp.abs(coarse).max())
    corners = [field[0, i, j, k] for i in (0, -1) for j in (0, -1) for k in (0, -1)]
    expected = [coarse[0, i, j, k] for i in (0, -1) for j in (0, -1) for k in (0, -1)]
    np.testing.assert_allclose(corners, expected, atol=0.4 * extent)
