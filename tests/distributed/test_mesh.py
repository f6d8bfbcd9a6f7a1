"""The same step, however batch and volumes are cut over devices, and in however many parts."""

import functools
import threading
import weakref

import jax
import numpy as np
import optax
import pytest
from flax import nnx

from masm_jax import sharding
from masm_jax.models import conv as conv_lib
from masm_jax.models import layers, resample, residual, spatial
from masm_jax.models.attention import SelfAttention
from masm_jax.models.init import Initialiser
from tests.test_steps import MIXED, batch, by_path, prepare

DEPTH = 128  # the lowest level then has 8 planes, one for each device


@pytest.fixture(scope="module", autouse=True)
def smooth():
    """A network whose gradient can be compared to five digits.

    Its own has jumps (the kink of the leaky ReLU: one voxel more or less shows at levels of eight,
    and on some machines with a slope of 0.9 still, by 4e-5) and divides by the spread of those
    eight, which multiplies rounding a thousandfold.
    """
    with pytest.MonkeyPatch.context() as patch:
        for module in (layers, residual):
            patch.setattr(module, "LEAKY_SLOPE", 0.99)
        patch.setattr(layers.instance_norm, "__defaults__", (1.0,))  # eps
        yield


def settings(make_config, **changes):
    mixed = {"augment": "swin", "model.mixers": MIXED, "model.keep_bias": 0.0, "model.detail": 4}
    return make_config(**mixed | {"patch": (DEPTH, 16, 16)} | changes)


def stepped(config, jit, **mesh):
    """Losses, and the gradient (AdamW's first moment after a step)."""
    mesh, state, step = prepare(config, jit=jit, **mesh)
    state, metrics = step(state, sharding.global_batch(mesh, batch(depth=DEPTH)))
    moments = by_path(optax.tree.get(state["opt_state"], "mu"))
    return jax.device_get(metrics), jax.device_get(moments)


SLOW = pytest.mark.slow


@pytest.fixture(scope="module")
def alone(make_config, quick_jit):
    """One device, the whole batch at once."""
    return stepped(settings(make_config), quick_jit, devices=1)


def assert_same(one, other):
    for name, value in one[0].items():
        assert float(other[0][name]) == pytest.approx(float(value), rel=1e-5), name
    assert 0.2 < float(one[0]["train/keep/level1"]) < 0.8
    largest = max(np.linalg.norm(moment) for moment in one[1].values())
    for name, moment in one[1].items():
        error = np.linalg.norm(other[1][name] - moment)
        assert error < 1e-5 * max(np.linalg.norm(moment), 1e-3 * largest), name


# Each way to compute again on the way back is taken along with one of the meshes.
@pytest.mark.parametrize(
    ("data", "cut", "remat"),
    [(8, 1, "none"), (4, 2, "blocks"), (1, 8, "full"), pytest.param(2, 4, "none", marks=SLOW)],
)
def test_a_mesh_takes_the_step_of_one_device(alone, make_config, quick_jit, data, cut, remat):
    config = settings(make_config, **{"model.remat": remat})
    assert_same(alone, stepped(config, quick_jit, devices=data * cut, spatial=cut))


def test_a_decoder_that_looks_at_every_modality_takes_the_step_of_one_device(
    make_config, quick_jit
):
    config = settings(make_config, **{"model.fused_levels": 0})
    one, other = (stepped(config, quick_jit, devices=n, spatial=m) for n, m in ((1, 1), (8, 2)))
    assert_same(one, other)


def test_parts_take_the_step_of_the_whole_batch(alone, make_config, quick_jit):
    """Dice is summed over the batch: its loss is no mean of those of the parts."""
    assert_same(alone, stepped(settings(make_config, accumulate=4), quick_jit, devices=2))


def test_every_device_holds_its_part():
    mesh = sharding.make_mesh(spatial=4)
    data = sharding.global_batch(mesh, batch(size=4, depth=DEPTH))
    assert {part.data.shape for part in data["image"].addressable_shards} == {
        (2, 4, DEPTH // 4, 16, 16)
    }
    np.testing.assert_array_equal(data["image"], batch(size=4, depth=DEPTH)["image"])
    np.testing.assert_array_equal(data["label"], batch(size=4, depth=DEPTH)["label"])


def test_a_mesh_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="config.mesh: data any x spatial 3 does not fit 8"):
        sharding.make_mesh(spatial=3)
    with pytest.raises(ValueError, match="data 4 x spatial 4 does not fit 8 devices"):
        sharding.make_mesh(data=4, spatial=4)
    mesh = sharding.make_mesh(spatial=2)
    sharding.check_batch(mesh, 8, 2)
    with pytest.raises(ValueError, match="batch_size = 6: expected a multiple of 4"):
        sharding.check_batch(mesh, 6)
    with pytest.raises(ValueError, match=r"in 3 parts \(config.accumulate\): expected .* 12"):
        sharding.check_batch(mesh, 8, 3)


def test_what_goes_wrong_with_reading_is_said_by_the_stream():
    def stream():
        yield batch()
        raise ValueError("case is broken")

    got = sharding.transferred(stream(), sharding.make_mesh(), 8)
    with pytest.raises(ValueError, match="case is broken"):
        list(got)


def test_transfers_run_ahead():
    """One batch is on its way to the devices while the one before it is worked on, and no other."""
    mesh, read, second = sharding.make_mesh(), [], threading.Event()

    def stream():
        for number in range(4):
            read.append(number)
            if number:
                second.set()
            yield batch(seed=number)

    got = sharding.transferred(stream(), mesh, 8)
    np.testing.assert_array_equal(next(got)["label"], batch(seed=0)["label"])
    assert second.wait(60) and read == [0, 1]
    rest = [np.asarray(one["label"]) for one in got]
    np.testing.assert_array_equal(rest, [batch(seed=number)["label"] for number in (1, 2, 3)])


def test_a_batch_that_the_loop_drops_is_gone():
    """While the next one is asked for, nobody frees 100 MB and more."""
    got = sharding.transferred(iter([batch(), batch(seed=1)]), sharding.make_mesh(), 8)
    handed = next(got)
    image = weakref.ref(handed["image"])
    assert image() is not None
    del handed
    assert image() is None


@pytest.mark.parametrize("lowering", conv_lib.LOWERINGS)
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("depth, plane", [(8, (6, 4)), (16, (6, 4)), (8, (32, 32))])
def test_convolution_across_the_cut(lowering, stride, depth, plane):
    """Values and both gradients against the convolution of one device; 2 or 4 planes on each."""
    mesh = sharding.make_mesh(spatial=4)
    x = jax.random.normal(jax.random.key(0), (2, depth, *plane, 3))
    kernel = jax.random.normal(jax.random.key(1), (3, 3, 3, 3, 5))

    def convolved(kernel, x):
        y = conv_lib.conv(
            layers.planes(x), kernel, depth=x.shape[1], stride=stride, lowering=lowering
        )
        return layers.volumes(y, x.shape[1] // stride)

    def loss(convolve, kernel, x):
        y = convolve(kernel, x)
        return (y * jax.numpy.cos(y)).sum(), y

    planes = jax.P("data", "spatial")
    cut = spatial.over(mesh, convolved, (planes,), planes)
    results = []
    for convolve in (convolved, cut):
        both = jax.value_and_grad(functools.partial(loss, convolve), (0, 1), has_aux=True)
        results.append(jax.jit(both)(kernel, x))
    for one, other in zip(*map(jax.tree.leaves, results)):
        np.testing.assert_allclose(other, one, rtol=0, atol=1e-5 * abs(one).max())


@pytest.mark.parametrize("factor", [2, 4])
def test_upsampling_and_norm_across_the_cut(factor):
    mesh = sharding.make_mesh(spatial=4)
    x = jax.random.normal(jax.random.key(0), (2, 8, 3, 4, 2)) + 3

    def smoothed(_, x):
        y = resample.upsample(layers.planes(x), factor, x.shape[1])
        return layers.volumes(y, factor * x.shape[1])

    def normed(scale, x):
        y = layers.instance_norm(layers.planes(x), scale, scale * 0, x.shape[1], 1e-5)
        return layers.volumes(y, x.shape[1])

    def plain(_, x):
        return layers.volumes(residual._norm(layers.planes(x), x.shape[1]), x.shape[1])

    def results(function, mesh):
        cut = spatial.over(mesh, function, (planes,), planes)
        back = jax.grad(lambda scale, x: (cut(scale, x) ** 3).sum(), (0, 1))
        return jax.jit(lambda *given: (cut(*given), back(*given)))(ones, x)

    planes, ones = jax.P("data", "spatial"), np.ones((1, 2), np.float32)
    for function in (smoothed, normed, plain):
        (whole, *back), (cut, *cut_back) = results(function, None), results(function, mesh)
        np.testing.assert_allclose(cut, whole, rtol=1e-5, atol=1e-5)
        for one, other in zip(jax.tree.leaves(back), jax.tree.leaves(cut_back)):
            np.testing.assert_allclose(other, one, rtol=0, atol=1e-5 * max(1, abs(one).max()))


@pytest.mark.parametrize("masked", [True, False])
def test_attention_across_the_cut(masked):
    """Own queries, keys of all devices; a pruned token is a key to itself alone."""
    mesh = sharding.make_mesh(spatial=4)
    graph, params = nnx.split(SelfAttention(16, 4, init=Initialiser(0)))
    x = jax.random.normal(jax.random.key(0), (2, 24, 16))
    keep = np.float32(np.random.default_rng(0).random((2, 24)) > 0.5)

    def attended(params, x, keep):
        return nnx.merge(graph, params)(x, keep if masked else None, cut=True)

    planes = jax.P("data", "spatial")
    cut = jax.jit(spatial.over(mesh, attended, (planes, planes), planes))(params, x, keep)
    np.testing.assert_allclose(cut, attended(params, x, keep), rtol=1e-5, atol=1e-5)
