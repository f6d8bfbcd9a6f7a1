"""Multiply-accumulates, against values by hand and PyTorch's counter."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from masm_jax import sharding
from masm_jax.benchmark import counting
from masm_jax.models import conv as conv_lib
from masm_jax.models import layers, resample, spatial


def shape(*sizes):
    return jax.ShapeDtypeStruct(sizes, jnp.float32)


def of(function, *arguments):
    return counting.total(counting.macs(function, *arguments))


PRODUCT = (shape(3, 5), shape(5, 7))  # 105
VOXELS = 2 * 6 * 8 * 10


def matmul(x, y):
    return x @ y


def squashed(x, y):
    return jnp.tanh(x @ y)


def in_scan(x, y):
    return jax.lax.scan(lambda carry, _: (carry + (x @ y).sum(), None), 0.0, None, length=4)[0]


def in_cond(x, y):
    return jax.lax.cond(x[0, 0] > 0, lambda: ((x @ y) @ y.T).sum(), lambda: (x @ y).sum())


@jax.custom_vjp
def by_rule(x, y):
    return x @ y


by_rule.defvjp(lambda x, y: (x @ y, (x, y)), lambda saved, g: (g @ saved[1].T, saved[0].T @ g))


@pytest.mark.parametrize(
    "function, products",
    [
        (matmul, 1),
        (jax.jit(matmul), 1),
        (in_scan, 4),
        (in_cond, 2),
        (by_rule, 1),
        (jax.grad(lambda x, y: (x @ y).sum()), 2),
        (jax.grad(lambda x, y: ((x @ y) ** 2).sum(), (0, 1)), 3),
        (jax.grad(lambda x, y: (by_rule(x, y) ** 2).sum(), (0, 1)), 3),
        (jax.grad(lambda x, y: (jax.checkpoint(squashed)(x, y) ** 2).sum(), (0, 1)), 4),
    ],
    ids=["plain", "jit", "scan", "cond", "rule", "one side", "both", "rule back", "remat"],
)
def test_products_by_hand(function, products):
    assert of(function, *PRODUCT) == products * 3 * 5 * 7


def test_a_loop_of_unknown_length_is_refused():
    def loop(x, y):
        return jax.lax.while_loop(lambda c: c < x[0, 0], lambda c: c + (x @ y).sum(), 0.0)

    with pytest.raises(ValueError, match="how often it runs is not known"):
        of(loop, *PRODUCT)


def test_devices_count_together():
    mesh = sharding.make_mesh(spatial=4)

    def local(weights, x):
        return x @ weights

    planes = jax.P("data", "spatial")
    cut = spatial.over(mesh, local, (planes,), planes)
    weights, x = shape(5, 7), shape(2, 8, 5)
    assert of(cut, weights, x) == of(local, weights, x) == 2 * 8 * 5 * 7


@pytest.mark.parametrize("lowering", conv_lib.LOWERINGS)
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("channels, out", [(12, 24), (3, 4)])
def test_a_convolution_costs_the_same_in_every_form(lowering, stride, channels, out):
    """Forward; then also backward, where each of the two gradients costs as much as it.

    The planes are too small for the CPU's form to work in parts (below).
    """
    arrays = shape(2 * 6, 8, 10, channels), shape(3, 3, 3, channels, out)
    forward = functools.partial(conv_lib.conv, depth=6, stride=stride, lowering=lowering)
    once = VOXELS // stride**3 * 27 * channels * out
    assert of(forward, *arrays) == once

    def loss(x, kernel):
        return (forward(x, kernel) ** 2).sum()

    assert of(jax.grad(loss, (0, 1)), *arrays) == 3 * once


def test_few_channels_cost_more_on_large_planes_of_a_cpu():
    """Two places as one: four of them are seen where three are needed, and what lies past the
    border. What is counted of a network is the form for CUDA."""
    large = shape(4, 32, 34, 8), shape(3, 3, 3, 8, 16)
    pairs = 4 * (32 + 2) * (34 // 2 + 1) * 3 * 16 * 3 * 2 * 32
    assert of(functools.partial(conv_lib.conv, depth=2, lowering="stacked"), *large) == pairs
    assert of(functools.partial(conv_lib.conv, depth=2), *large) == 4 * 32 * 34 * 27 * 8 * 16


@pytest.mark.parametrize("planes", [4, 256], ids=["one-at-a-time", "eight-at-once"])
def test_the_gradient_of_a_kernel_costs_as_much_as_the_convolution(planes):
    """In parts on a CPU. ``once`` is what the form for CUDA costs forward; that for CPUs counts
    what lies past the border too, and the gradient by x, with as many channels, the same."""
    large = shape(planes, 64, 64, 24), shape(3, 3, 3, 24, 24)
    forward = functools.partial(conv_lib.conv, depth=planes // 2, lowering="stacked")

    def loss(x, kernel):
        return (forward(x, kernel) ** 2).sum()

    once = of(functools.partial(conv_lib.conv, depth=planes // 2), *large)
    assert of(jax.grad(loss, (0, 1)), *large) == 2 * of(forward, *large) + once


def test_moving_voxels_is_counted_apart():
    counts = counting.macs(lambda x: resample.upsample(x, 2, 4), shape(4, 4, 4, 3))
    by_hand = 4**3 * 3 * 8 + 8 * 4 * 4 * 3 * 8 + 8 * 8 * 4 * 3 * 8  # a 4 x 8 matrix, axis by axis
    assert counts == {"resample": by_hand}
    back = jax.grad(lambda x: (layers.stem(x, 2) ** 2).sum())
    assert counting.total(counting.macs(back, shape(4, 4, 4))) == 0


def test_scopes_share_the_whole():
    def named(x, y):
        with jax.named_scope("one"):
            z = x @ y
        with jax.named_scope("two"):
            return z @ y.T

    assert counting.by_scope(named, *PRODUCT) == {"one": 105, "two": 105}


@pytest.mark.parametrize(
    "edge, size, stride, padding, dilation, groups, transposed",
    [
        (9, 3, 1, 1, 1, 1, False),
        (9, 3, 2, 1, 1, 1, False),
        (9, 3, 2, 1, 1, 2, False),
        (9, 3, 1, 0, 1, 1, False),
        (2, 3, 2, 1, 1, 1, False),
        (1, 3, 1, 1, 1, 1, False),
        (9, 3, 1, 2, 2, 1, False),
        (8, 4, 4, 0, 1, 1, False),
        (4, 2, 2, 0, 1, 1, True),
        (5, 3, 2, 1, 1, 1, True),
        (1, 2, 2, 0, 1, 1, True),
    ],
)
def test_convolutions_and_their_gradients_as_pytorch_counts_them(
    edge, size, stride, padding, dilation, groups, transposed
):
    """Odd edges, no padding, dilation, groups, transposed; each gradient costs the forward once.

    PyTorch's own formula has too much, times the number of groups, for the gradient of a grouped
    kernel; ``torch_side`` mends it.
    """
    torch = pytest.importorskip("torch", reason="the other counter: requirements-test.txt")
    from masm_jax.benchmark import torch_side

    x = np.zeros((2, 6, edge, edge), np.float32)
    kernel = np.zeros((6, 4, size, size) if transposed else (4, 6 // groups, size, size))

    def ours(x, kernel):
        before = after = dilation * (size - 1) - padding if transposed else padding
        return jax.lax.conv_general_dilated(
            x, kernel.swapaxes(0, 1) if transposed else kernel,
            (1, 1) if transposed else (stride,) * 2,
            [(before, after)] * 2,
            lhs_dilation=(stride if transposed else 1,) * 2,
            rhs_dilation=(dilation,) * 2,
            dimension_numbers=("NCHW", "OIHW", "NCHW"),
            feature_group_count=groups,
        )  # fmt: skip

    function = torch.nn.functional.conv_transpose2d if transposed else torch.nn.functional.conv2d
    options = dict(stride=stride, padding=padding, dilation=dilation, groups=groups)
    leaves = [torch.zeros(array.shape, requires_grad=True) for array in (x, kernel)]
    forward = torch_side.macs(lambda: function(*leaves, **options))
    assert of(ours, shape(*x.shape), shape(*kernel.shape)) == forward
    both = torch_side.macs(lambda: (function(*leaves, **options) ** 2).sum().backward())
    back = jax.grad(lambda x, kernel: (ours(x, kernel) ** 2).sum(), (0, 1))
    assert of(back, shape(*x.shape), shape(*kernel.shape)) == both == 3 * forward
