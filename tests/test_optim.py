"""Schedules at steps worked out by hand; optimisers step by step against torch.optim."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs import masm_brats
from masm_jax import optim
from masm_jax.data.conventions import MODALITIES, REGIONS
from masm_jax.state import Network, abstract_state


def settings(**changes):
    section = masm_brats.get_config().optim
    section.update(changes)
    return section


# ---------------------------------------------------------------- schedules


def test_warm_up_then_cosine():
    schedule = optim.learning_rate(
        settings(schedule="cosine", learning_rate=0.4, warmup_steps=4), total_steps=12
    )
    # Counted from one: 1/4, 2/4, 3/4, then cos from the peak to 0 over the eight that are left.
    expected = [0.1, 0.2, 0.3] + [0.2 * (1 + np.cos(np.pi * i / 8)) for i in range(9)]
    np.testing.assert_allclose([schedule(step) for step in range(12)], expected, atol=1e-7)
    assert float(schedule(7)) == pytest.approx(0.2)  # half way down
    assert float(schedule(11)) == pytest.approx(0, abs=1e-7)
    assert float(schedule(50)) == pytest.approx(0, abs=1e-7)


def test_polynomial():
    schedule = optim.learning_rate(
        settings(schedule="poly", learning_rate=0.1, warmup_steps=0), total_steps=10
    )
    for step in (0, 4, 8):
        assert float(schedule(step)) == pytest.approx(0.1 * (1 - (step + 1) / 10) ** 0.9, rel=1e-5)
    assert float(schedule(9)) == pytest.approx(0, abs=1e-7)


def test_constant():
    schedule = optim.learning_rate(
        settings(schedule="constant", learning_rate=0.1, warmup_steps=2), total_steps=10
    )
    np.testing.assert_allclose([schedule(s) for s in (0, 1, 2, 9, 99)], [0.05] + [0.1] * 4)


def test_schedules_are_functions_of_the_step_under_jit():
    schedule = optim.learning_rate(settings(warmup_steps=4), total_steps=12)
    traced = jax.jit(schedule)
    for step in range(12):
        assert float(traced(step)) == pytest.approx(float(schedule(step)), rel=1e-6, abs=1e-12)


def test_temperature_falls_exponentially():
    gumbel = masm_brats.get_config().gumbel
    gumbel.start, gumbel.end = 2.0, 0.5
    temperature = optim.temperature(gumbel, 100)
    expected = [2.0, 1.0, 0.5, 0.5]
    np.testing.assert_allclose([temperature(s) for s in (0, 50, 100, 200)], expected, rtol=1e-6)


def test_the_noise_dies_away():
    gumbel = masm_brats.get_config().gumbel
    gumbel.quiet = 0.5
    noise = optim.gumbel_noise(gumbel, 100)
    np.testing.assert_allclose([noise(s) for s in (0, 25, 50, 100)], [1, 0.5, 0, 0], atol=1e-6)


def test_keep_target_falls_over_the_first_half():
    loss = masm_brats.get_config().loss
    loss.keep_target = 0.6
    target = optim.keep_target(loss, 100)
    np.testing.assert_allclose(
        [target(s) for s in (0, 25, 50, 99)], [1.0, 0.8, 0.6, 0.6], rtol=1e-6
    )


# ---------------------------------------------------------------- optimisers


def tree(seed=0, scale=1.0):
    """Two kernels, one of them in a mixer, and what is not decayed."""
    random = np.random.default_rng(seed)

    def draw(*shape):
        return jnp.asarray(random.normal(size=shape) * scale, jnp.float32)

    return {
        "encoder": {"kernel": draw(3, 4), "scale": draw(1, 4)},
        "mixers": {"level1": {"kernel": draw(4, 4), "bias": draw(4), "position": draw(2, 4)}},
    }


def flat(params):
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def ours(section, gradients, total_steps=100):
    params = tree()
    tx = optim.optimiser(section, total_steps)
    state = tx.init(params)
    for gradient in gradients:
        updates, state = tx.update(gradient, state, params)
        params = optax.apply_updates(params, updates)
    return flat(params)


def theirs(section, gradients, make, total_steps=100):
    """The same by torch, one parameter group per weight decay."""
    torch = pytest.importorskip("torch", reason="parity needs torch: requirements-test.txt")
    weights = {n: torch.nn.Parameter(torch.tensor(np.asarray(w))) for n, w in flat(tree()).items()}
    groups = [
        {
            "params": [w for n, w in weights.items() if n.endswith("kernel") == decayed],
            "weight_decay": section.weight_decay * decayed,
        }
        for decayed in (True, False)
    ]
    optimiser = make(torch, groups)
    schedule = optim.learning_rate(section, total_steps)
    for step, gradient in enumerate(gradients):
        for name, leaf in flat(gradient).items():
            weights[name].grad = torch.tensor(np.asarray(leaf))
        torch.nn.utils.clip_grad_norm_(weights.values(), section.clip_norm)
        for group in optimiser.param_groups:
            group["lr"] = float(schedule(step))
        optimiser.step()
    return {name: weight.detach().numpy() for name, weight in weights.items()}


def test_the_global_norm_is_that_of_all_arrays():
    random = np.random.default_rng(0)
    shapes = {
        "long": (130, 127),
        "short": (7,),
        "scalar": (),
        "kernel": (3, 3, 3, 2, 5),
        "none": (0, 3),
    }
    arrays = {name: random.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    expected = np.linalg.norm(
        np.concatenate([x.ravel() for x in arrays.values()], dtype=np.float64)
    )
    np.testing.assert_allclose(optim.global_norm(arrays), expected, rtol=1e-6)
    long = {"long": arrays["long"]}
    np.testing.assert_allclose(optim.global_norm(long), np.linalg.norm(long["long"]), rtol=1e-6)


def test_a_norm_that_is_known_is_taken(make_config):
    optimiser = optim.optimiser(make_config().optim, 100)
    params, gradient = tree(), tree(1, scale=50.0)
    state = optimiser.init(params)
    alone, _ = optimiser.update(gradient, state, params)
    told, _ = optimiser.update(gradient, state, params, norm=optim.global_norm(gradient))
    jax.tree.map(np.testing.assert_array_equal, alone, told)
    state = optimiser.update(gradient, state, params, norm=jnp.float32(np.inf))[1]
    moments = [leaf for leaf in jax.tree.leaves(state) if leaf.ndim]
    assert moments and not any(np.any(leaf) for leaf in moments)  # scaled down to nothing


@pytest.mark.parametrize("clip_norm", [1e6, 0.5])
def test_adamw_against_torch(clip_norm):
    section = settings(
        name="adamw", learning_rate=0.05, warmup_steps=3, weight_decay=0.1, clip_norm=clip_norm
    )
    # Growing gradients: a clipping that came after the moments would show.
    gradients = [tree(seed, scale=0.1 * seed) for seed in range(1, 9)]
    expected = theirs(
        section, gradients, lambda torch, groups: torch.optim.AdamW(groups, betas=(0.9, 0.999))
    )
    for name, value in ours(section, gradients).items():
        np.testing.assert_allclose(value, expected[name], rtol=2e-5, atol=2e-6, err_msg=name)


@pytest.mark.parametrize("clip_norm", [1e6, 0.5])
def test_sgd_against_torch(clip_norm):
    section = settings(
        name="sgd",
        learning_rate=0.02,
        schedule="poly",
        warmup_steps=0,
        weight_decay=0.1,
        momentum=0.9,
        clip_norm=clip_norm,
    )
    gradients = [tree(seed, scale=0.1 * seed) for seed in range(1, 9)]
    expected = theirs(
        section,
        gradients,
        lambda torch, groups: torch.optim.SGD(groups, lr=1.0, momentum=0.9, nesterov=True),
    )
    for name, value in ours(section, gradients).items():
        np.testing.assert_allclose(value, expected[name], rtol=2e-5, atol=2e-6, err_msg=name)


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_decay_shrinks_kernels_alone(name):
    section = settings(name=name, learning_rate=0.1, warmup_steps=0, weight_decay=0.5)
    zero = jax.tree.map(jnp.zeros_like, tree())
    after, before = ours(section, [zero]), flat(tree())
    for key, value in after.items():
        if key.endswith("kernel"):
            assert (jnp.abs(value) < jnp.abs(before[key])).all(), key
        else:
            np.testing.assert_array_equal(value, before[key], err_msg=key)


@pytest.mark.parametrize("backbone", ["unet", "unetr", "swin_unetr"])
def test_every_convolution_is_decayed(make_config, backbone):
    """Whatever its module calls it, as torch's side of the comparison has it."""
    config = make_config(**{"model.backbone": backbone, "model.detail": 4})
    network = Network(config, modalities=MODALITIES, regions=REGIONS)
    params = abstract_state(network)["params"]
    decayed = optim._is_kernel(params)
    assert all(jax.tree.leaves(jax.tree.map(lambda p, is_: is_ or p.ndim < 5, params, decayed)))


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_mixer_rate_scales_the_mixers_alone(name):
    shared = dict(name=name, learning_rate=0.1, warmup_steps=0)
    plain = ours(settings(**shared), [tree(1), tree(2)])
    slow = ours(settings(**shared, mixer_rate=0.0), [tree(1), tree(2)])
    for key, value in flat(tree()).items():
        frozen = key.startswith("mixers")
        np.testing.assert_array_equal(slow[key], value if frozen else plain[key], err_msg=key)
        assert not np.array_equal(plain[key], value)
    half = ours(settings(**shared, mixer_rate=0.5), [tree(1)])["mixers.level1.bias"]
    whole = ours(settings(**shared), [tree(1)])["mixers.level1.bias"]
    start = flat(tree())["mixers.level1.bias"]
    np.testing.assert_allclose(half - start, (whole - start) / 2, rtol=1e-5, atol=1e-7)


# ---------------------------------------------------------------- averaged weights


def test_average_by_hand():
    old, new = {"a": jnp.float32(1.0)}, {"a": jnp.float32(2.0)}

    def after(step, decay):
        return float(optim.average(old, new, jnp.int32(step), decay)["a"])

    assert after(0, 0.999) == pytest.approx(0.1 * 1 + 0.9 * 2)  # (1 + 0) / (10 + 0)
    assert after(8, 0.999) == pytest.approx(0.5 * 1 + 0.5 * 2)  # 9 / 18
    assert after(10**6, 0.75) == pytest.approx(0.75 * 1 + 0.25 * 2)
    assert after(5, 0.0) == 2  # the weights themselves
