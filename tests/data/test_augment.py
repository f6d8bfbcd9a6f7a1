"""The recipes: what is drawn how often, in which order it acts, and that devices do not matter."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from masm_jax.data import augment as recipes
from masm_jax.data import transforms
from masm_jax.data.augment import augment

KEYS = 6000
BATCH, MODALITIES, EDGE = 8, 4, 16


# Compiled in seconds, not to be fast.
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
jitted_apply = jax.jit(recipes.apply_nnunet, compiler_options=QUICK)
jitted_draw = jax.jit(
    jax.vmap(functools.partial(recipes.draw_nnunet, modalities=MODALITIES)), compiler_options=QUICK
)


@functools.cache
def jitted(recipe):
    return jax.jit(functools.partial(augment, recipe=recipe), compiler_options=QUICK)


@pytest.fixture(scope="module")
def batch():
    """A ball of tissue in an empty volume, nested labels inside it."""
    rng = np.random.default_rng(0)
    centre = np.array([6.0, 7.0, 9.0]).reshape(3, 1, 1, 1)  # aside, so that flips show
    distance = np.linalg.norm(np.indices((EDGE,) * 3) - centre, axis=0)
    image = rng.normal(size=(BATCH, MODALITIES, EDGE, EDGE, EDGE)).astype(np.float32)
    image *= distance < 5.4
    label = np.select([distance < 2, distance < 3.5, distance < 5], [1, 3, 2], 0).astype(np.uint8)
    return jnp.asarray(image), jnp.asarray(np.repeat(label[None], BATCH, 0))


@pytest.fixture(scope="module")
def drawn():
    keys = jax.random.split(jax.random.key(7), KEYS)
    return jax.tree.map(np.asarray, _without_key(jitted_draw(keys)))


def _without_key(drawn):
    return {name: value for name, value in drawn.items() if name != "noise_key"}


def _quiet(drawn, **on):
    """The same draw with every transform switched off but those named."""
    off = {k: jnp.zeros_like(v) for k, v in drawn.items() if v.dtype == bool}
    return drawn | off | on


@pytest.mark.parametrize(
    "name, probability",
    [
        ("affine", 1 - 0.8 * 0.8),
        ("noise", 0.1),
        ("blur", 0.2),
        ("brightness", 0.15),
        ("contrast", 0.15),
        ("low_resolution", 0.25),
        ("gamma_inverted", 0.1),
        ("gamma", 0.3),
    ],
)
def test_transforms_are_drawn_as_often_as_nnunet_draws_them(drawn, name, probability):
    deviation = np.sqrt(probability * (1 - probability) / KEYS)
    assert abs(drawn[name].mean() - probability) < 4 * deviation


def test_flips_and_modalities_are_drawn_independently_with_one_half(drawn):
    for flags in (drawn["flips"], drawn["blur_sigma"][..., 0] > 0, drawn["zoom"] < 1):
        assert np.abs(flags.mean(axis=0) - 0.5).max() < 4 * 0.5 / np.sqrt(KEYS)
        assert np.abs(np.corrcoef(flags.T) - np.eye(flags.shape[1])).max() < 0.06


def test_draws_of_different_transforms_are_independent(drawn):
    names = [name for name, value in drawn.items() if value.ndim == 1 and value.dtype == bool]
    assert len(names) == 8
    correlation = np.corrcoef(np.stack([drawn[name] for name in names]).astype(float))
    assert np.abs(correlation - np.eye(8)).max() < 0.06


@pytest.mark.parametrize(
    "name, low, high, middle",
    [
        ("noise_sigma", 0.0, 0.1, 0.05),
        ("brightness_factor", 0.75, 1.25, 1.0),
        ("contrast_factor", 0.75, 1.25, 1.0),
        ("gamma_exponent", 0.7, 1.5, 1.0),  # half of the draws on either side of 1
        ("gamma_inverted_exponent", 0.7, 1.5, 1.0),
    ],
)
def test_parameters_fill_their_range(drawn, name, low, high, middle):
    values = drawn[name]
    assert low <= values.min() < low + 0.02 * (high - low)
    assert high - 0.02 * (high - low) < values.max() <= high
    assert abs(np.mean(values < middle) - 0.5) < 4 * 0.5 / np.sqrt(values.size)


def test_zoom_and_blur_ranges(drawn):
    zoom, sigma = drawn["zoom"], drawn["blur_sigma"]
    assert 0.5 <= zoom.min() < 0.51 and zoom.max() == 1
    assert 0.5 <= sigma[sigma > 0].min() < 0.51 and 0.99 < sigma.max() <= 1
    assert len(np.unique(sigma[0][sigma[0] > 0])) == np.sum(sigma[0] > 0)  # one for each axis


def test_geometry_ranges(drawn):
    matrices = drawn["matrix"]
    scale = np.cbrt(np.linalg.det(matrices))
    assert 0.7 <= scale.min() < 0.72 and 1.38 < scale.max() <= 1.4001
    assert abs(np.mean(np.abs(scale - 1) > 1e-5) - 0.2) < 4 * 0.4 / np.sqrt(KEYS)
    rotation = matrices / scale[:, None, None]
    turned = np.abs(rotation - np.eye(3)).max(axis=(1, 2)) > 1e-5
    assert abs(turned.mean() - 0.2) < 4 * 0.4 / np.sqrt(KEYS)
    about_h = np.degrees(np.arcsin(-rotation[turned, 2, 0]))  # R_w R_h R_d: entry (2, 0) is -sin h
    assert 29 < np.abs(about_h).max() <= 30.001 and abs(about_h.mean()) < 2
    np.testing.assert_array_equal(drawn["affine"], turned | (np.abs(scale - 1) > 1e-5))


def test_nothing_drawn_leaves_the_batch_bit_by_bit(batch):
    keys = jax.random.split(jax.random.key(0), BATCH)
    drawn = _quiet(jitted_draw(keys))
    image, label = jitted_apply(drawn, *batch)
    np.testing.assert_array_equal(image, batch[0])
    np.testing.assert_array_equal(label, batch[1])


def test_transforms_act_on_the_examples_that_drew_them_in_the_order_of_the_list(batch):
    keys = jax.random.split(jax.random.key(1), BATCH)
    drawn = jitted_draw(keys)
    only = jnp.arange(BATCH) == 2
    flips = drawn["flips"]
    drawn = _quiet(drawn, affine=only, blur=only, contrast=only, gamma=only, flips=flips)
    image, label = jitted_apply(drawn, *batch)
    for i in range(BATCH):
        x, y, one = batch[0][i], batch[1][i], jax.tree.map(lambda v, i=i: v[i], drawn)
        empty = jnp.all(x == 0, axis=0).astype(jnp.uint8)
        if i == 2:
            empty = transforms.affine(x, empty, one["matrix"])[1]
            x, y = transforms.affine(x, y, one["matrix"])
            x = transforms.gaussian_blur(x, one["blur_sigma"])
            x = transforms.contrast(x, one["contrast_factor"])
            x = transforms.gamma(x, one["gamma_exponent"])
        axes = [axis - 3 for axis in range(3) if one["flips"][axis]]
        x = jnp.flip(jnp.where(empty == 1, 0.0, x), axes)
        np.testing.assert_allclose(image[i], x, atol=1e-5)
        np.testing.assert_array_equal(label[i], jnp.flip(y, axes))


def test_labels_move_with_the_image(batch):
    label = batch[1]
    regions = {"WT": (1, 2, 3), "TC": (1, 3)}
    image = jnp.stack([jnp.isin(label, jnp.array(values)) for values in regions.values()] * 2, 1)
    keys = jax.random.split(jax.random.key(2), BATCH)
    drawn = jitted_draw(keys)
    angles = jnp.radians(jnp.linspace(-30, 30, 3 * BATCH).reshape(BATCH, 3))
    matrix = jax.vmap(transforms.rotation_scale)(angles, jnp.linspace(0.7, 1.4, BATCH))
    drawn = _quiet(drawn, affine=jnp.ones(BATCH, bool), flips=drawn["flips"]) | {"matrix": matrix}
    moved, target = jitted_apply(drawn, image.astype(jnp.float32), label)
    assert target.dtype == jnp.uint8 and set(np.unique(target)) == {0, 1, 2, 3}
    for channel, values in enumerate(regions.values()):
        resampled, expected = np.asarray(moved[:, channel]) >= 0.5, np.isin(target, values)
        assert np.all(_dice(resampled, expected) > 0.9)  # balls of 60 to 500 voxels: mostly edge
        aside = np.roll(expected, 1, axis=0)
        assert np.mean(_dice(resampled, aside) < 0.8) > 0.8  # each moved its own way: no accident


def _dice(a, b):
    return 2 * np.sum(a & b, axis=(1, 2, 3)) / (a.sum((1, 2, 3)) + b.sum((1, 2, 3)))


@pytest.mark.parametrize("recipe", list(recipes.RECIPES))
def test_background_stays_zero_and_tissue_does_not_become_background(batch, recipe):
    image, label = jitted(recipe)(jax.random.key(3), *batch)
    image = np.asarray(image)
    empty = np.all(image == 0, axis=1)
    assert np.all(np.isfinite(image)) and empty[:, 0, 0, 0].all()
    assert not empty[np.asarray(label) > 0].any()
    volume = np.sum(~empty, axis=(1, 2, 3)) / np.sum(~np.all(batch[0] == 0, axis=1), axis=(1, 2, 3))
    assert np.all((volume > 1.4**-3 * 0.8) & (volume < 0.7**-3 * 1.2))


def test_swin_scales_and_shifts_within_a_tenth(batch):
    image = jnp.ones_like(batch[0]).at[:, :, ::2].set(3.0)
    seen = []
    for seed in range(20):
        out = np.asarray(jitted("swin")(jax.random.key(seed), image, batch[1])[0])
        low, high = out.min(axis=(1, 2, 3, 4)), out.max(axis=(1, 2, 3, 4))
        scale = (high - low) / 2
        seen.append(np.stack([scale, low - scale]))
    scale, shift = np.concatenate(seen, axis=1)
    assert 0.9 <= scale.min() < 0.92 and 1.08 < scale.max() <= 1.1001
    assert -0.1001 <= shift.min() < -0.08 and 0.08 < shift.max() <= 0.1001


def test_scanner_draws_each_modality_apart_and_within_its_ranges():
    keys = jax.random.split(jax.random.key(1), 500)
    drawn = jax.vmap(functools.partial(recipes.draw_scanner, modalities=MODALITIES))(keys)
    drawn = jax.tree.map(np.asarray, drawn)
    assert 0.75 <= drawn["scale"].min() < 0.76 and 1.24 < drawn["scale"].max() <= 1.25
    assert -0.3 <= drawn["shift"].min() < -0.29 and 0.29 < drawn["shift"].max() <= 0.3
    spread = drawn["field"].std(axis=(2, 3, 4))
    assert np.mean(spread == 0) == pytest.approx(1 / 3, abs=0.05)
    # 27 normal numbers of sigma uniform up to 0.15.
    assert spread[spread > 0].mean() == pytest.approx(0.075, abs=0.01) and spread.max() < 0.3
    for name in ("scale", "shift"):
        across = np.corrcoef(drawn[name].T) - np.eye(MODALITIES)
        assert np.abs(across).max() < 0.15


def test_none_only_converts():
    image, label = jnp.ones((2, 4, 3, 3, 3), jnp.float16), jnp.ones((2, 3, 3, 3), jnp.uint8)
    out, target = augment(jax.random.key(0), image, label, recipe="none")
    assert out.dtype == jnp.float32 and np.all(out == 1)
    np.testing.assert_array_equal(target, label)


def test_unknown_recipe_names_the_choice():
    choice = "'nnUNet' is unknown; choose one of: nnunet, swin, scanner, none"
    with pytest.raises(ValueError, match=choice):
        augment(
            jax.random.key(0), jnp.ones((1, 1, 3, 3, 3)), jnp.ones((1, 3, 3, 3)), recipe="nnUNet"
        )


def test_a_missing_modality_stays_zero_and_finite(batch):
    image = batch[0].at[:, 1].set(0.0)
    for seed in range(3):
        out = np.asarray(jitted("nnunet")(jax.random.key(seed), image, batch[1])[0])
        assert np.all(np.isfinite(out)) and np.abs(out[:, 1]).max() < 1  # noise at most


@pytest.mark.parametrize("recipe", list(recipes.RECIPES))
def test_the_key_and_the_place_in_the_batch_decide(batch, recipe):
    image = jnp.repeat(batch[0][:1], BATCH, axis=0)
    first = jitted(recipe)(jax.random.key(5), image, batch[1])[0]
    np.testing.assert_array_equal(first, jitted(recipe)(jax.random.key(5), image, batch[1])[0])
    other = jitted(recipe)(jax.random.key(6), image, batch[1])[0]
    assert all(np.abs(a - b).max() > 1e-3 for a, b in zip(first, other))
    assert len(np.unique(np.asarray(first).reshape(BATCH, -1), axis=0)) > BATCH // 2


@pytest.mark.parametrize("recipe", list(recipes.RECIPES))
def test_a_sharded_batch_stays_sharded_and_equals_one_device(batch, recipe):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    key = jax.device_put(jax.random.key(3), NamedSharding(mesh, PartitionSpec()))
    compiled = jitted(recipe).lower(key, *jax.device_put(batch, sharding)).compile()
    image, label = compiled(key, *jax.device_put(batch, sharding))
    single = jitted(recipe)(jax.random.key(3), *batch)
    assert image.sharding.is_equivalent_to(sharding, 5)
    assert label.sharding.is_equivalent_to(sharding, 4)
    assert image.addressable_shards[0].data.shape[0] == 1
    np.testing.assert_allclose(image, single[0], atol=2e-5)
    np.testing.assert_array_equal(label, single[1])
    program = compiled.as_text()
    for collective in ("all-gather", "all-to-all", "collective-permute"):
        assert collective not in program  # the batch never leaves its device
