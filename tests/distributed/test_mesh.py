"""The same step, however batch and volumes are cut over devices, and in however many parts."""

import jax
import numpy as np
import optax
import pytest

from masm_jax import sharding
from masm_jax.models import conv as conv_lib
from masm_jax.models import spatial
from tests.test_steps import MIXED, batch, by_path, prepare

DEPTH = 64  # levels 1 to 3 are cut by 8 devices, 4 to 6 are whole on each


def settings(make_config, **changes):
    mixed = {"augment": "swin", "model.mixers": MIXED, "model.keep_bias": 0.0}
    return make_config(**mixed | {"patch": (DEPTH, 16, 16)} | changes)


def stepped(config, jit, **mesh):
    """Losses, and the gradient (AdamW's first moment after a step)."""
    mesh, state, step = prepare(config, jit=jit, **mesh)
    state, metrics = step(state, sharding.global_batch(mesh, batch(depth=DEPTH)))
    moments = by_path(optax.tree.get(state["opt_state"], "mu"))
    return jax.device_get(metrics), jax.device_get(moments)


@pytest.fixture(scope="module")
def alone(make_config, quick_jit):
    """One device, the whole batch at once."""
    return stepped(settings(make_config), quick_jit, devices=1)


def assert_same(one, other):
    for name, value in one[0].items():
        assert float(other[0][name]) == pytest.approx(float(value), rel=1e-5), name
    for name, moment in one[1].items():
        error = np.linalg.norm(other[1][name] - moment) / max(np.linalg.norm(moment), 1e-12)
        assert error < 1e-5 or np.abs(moment).max() < 1e-7, (name, error)


@pytest.mark.parametrize(("data", "cut"), [(8, 1), (4, 2), (2, 4), (1, 8)])
def test_a_mesh_takes_the_step_of_one_device(alone, make_config, quick_jit, data, cut):
    assert_same(alone, stepped(settings(make_config), quick_jit, devices=8, spatial=cut))


@pytest.mark.parametrize("changes", [{"accumulate": 4}, {"loss.batch_dice": False}])
def test_parts_take_the_step_of_the_whole_batch(make_config, quick_jit, changes):
    whole = {key: value for key, value in changes.items() if key != "accumulate"}
    one = stepped(settings(make_config, **whole), quick_jit, devices=1)
    parts = settings(make_config, **changes | {"accumulate": 4})
    assert_same(one, stepped(parts, quick_jit, devices=2))


@pytest.mark.parametrize("remat", ["blocks", "full"])
def test_what_is_computed_again_is_the_same(alone, make_config, quick_jit, remat):
    config = settings(make_config, **{"model.remat": remat})
    assert_same(alone, stepped(config, quick_jit, devices=2, spatial=2))


@pytest.mark.parametrize("lowering", conv_lib.LOWERINGS)
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("depth", [8, 16, 12])  # 1 and 2 planes a device, and a depth left whole
def test_convolution_across_the_cut(lowering, stride, depth):
    """Values and both gradients against the convolution of one device."""
    mesh = sharding.make_mesh(spatial=4)
    x = jax.random.normal(jax.random.key(0), (2, depth, 6, 4, 3))
    kernel = jax.random.normal(jax.random.key(1), (3, 3, 3, 3, 5))

    def value(x, kernel):
        y = conv_lib.conv(x, kernel, stride=stride, lowering=lowering)
        return (y * jax.numpy.cos(y)).sum(), y

    whole = jax.jit(jax.value_and_grad(value, (0, 1), has_aux=True))

    def cut_value(x, kernel):
        with spatial.cut_over(mesh):
            return value(x, kernel)

    planes = jax.NamedSharding(mesh, jax.P("data", "spatial"))
    cut = jax.jit(jax.value_and_grad(cut_value, (0, 1), has_aux=True), in_shardings=(planes, None))
    for one, other in zip(jax.tree.leaves(whole(x, kernel)), jax.tree.leaves(cut(x, kernel))):
        np.testing.assert_allclose(other, one, rtol=1e-4, atol=1e-4)
