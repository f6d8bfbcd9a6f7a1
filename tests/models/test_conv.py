"""What the convolution tells a TPU; its numbers are in tests/parity."""

import jax
import numpy as np
import pytest

from masm_jax.models import conv

SAID = "layout_constraint"


def program(planes, channels, out):
    x, kernel = np.zeros((planes, 4, 4, channels)), np.zeros((3, 3, 3, channels, out))
    return str(jax.make_jaxpr(lambda x, k: conv.conv(x, k, depth=8))(x, kernel))


@pytest.mark.parametrize(
    "planes, channels, out, said",
    [
        (256, 48, 24, True),  # a decoder at level 1: 24 of 128 lanes
        (64, 48, 24, True),  # half of the lanes are better than a fifth
        (32, 48, 24, False),
        (512, 128, 256, False),  # nothing is padded
        (512, 96, 192, False),
    ],
)
def test_planes_go_into_the_lanes_where_channels_would_be_padded(planes, channels, out, said):
    with conv.traced_for("tpu"):
        assert program(planes, channels, out).count(SAID) == (2 if said else 0)
    assert SAID not in program(planes, channels, out)


def test_the_order_of_memory_changes_no_number():
    x = jax.random.normal(jax.random.key(0), (128, 4, 5, 6))

    def loss(x):
        return (conv.planes_in_lanes(x, 6) ** 3).sum()

    np.testing.assert_array_equal(jax.jit(conv.planes_in_lanes, static_argnums=1)(x, 6), x)
    np.testing.assert_allclose(jax.jit(jax.grad(loss))(x), 3 * x**2, rtol=1e-5)


@pytest.mark.parametrize(
    "planes, grid, channels, out, stride",
    [
        (6, (5, 7), 3, 4, 1),
        (64, (32, 32), 6, 24, 1),  # part by part; the gradient of the kernel too
        (176, (45, 40), 2, 24, 1),  # that in 528 parts, eight at once
        (32, (32, 34), 24, 20, 1),  # planes as twelve pieces; too many channels to take two as one
        (4, (128, 96), 4, 8, 1),  # two places as one
        (4, (33, 35), 8, 8, 1),  # a width that is no multiple of two
        (4, (80, 72), 48, 3, 1),  # a plane in two parts
        (4, (2, 2), 5, 6, 1),  # as one matrix product
        (4, (1, 3), 5, 6, 1),
        (4, (4, 5), 12, 96, 1),  # fewer voxels than channels: as one product too
        (8, (8, 6), 12, 64, 2),
        (6, (7, 6), 12, 80, 2),
        (8, (8, 6), 3, 4, 2),
        (8, (32, 34), 3, 4, 2),  # part by part
        (4, (160, 96), 32, 3, 2),  # a plane in two parts
        (6, (33, 32), 3, 4, 2),  # three planes of a volume: not by halves
    ],
)
def test_the_form_for_cpus_is_the_plain_convolution(planes, grid, channels, out, stride):
    """Values and both gradients."""
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (planes, *grid, channels))
    kernel = jax.random.normal(keys[1], (3, 3, 3, channels, out))
    places = (2 * -(-planes // 2 // stride), *(-(-size // stride) for size in grid))
    weight = jax.random.normal(keys[2], (*places, out))

    def by(lowering):
        def loss(x, kernel):
            y = conv.conv(x, kernel, depth=planes // 2, stride=stride, lowering=lowering)
            return (y * weight).sum(), y

        gradients, y = jax.jit(jax.grad(loss, (0, 1), has_aux=True))(x, kernel)
        return y, *gradients

    for found, wanted in zip(by("stacked"), by("direct")):
        np.testing.assert_allclose(found, wanted, rtol=0, atol=2e-6 * abs(wanted).max())
