"""The training step: one device against eight, every variant, determinism, precision."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from masm_jax import sharding
from masm_jax.data.conventions import MODALITIES, REGIONS
from masm_jax.evaluation import validation
from masm_jax.models.sizes import SIZES
from masm_jax.state import Network, init_state
from masm_jax.steps import eval_step, keep_names, keep_step, segment_step, train_step

MIXED = ("aware", "concat", "concat", "concat", "concat", "shift")


def batch(size=8, patch=16, seed=0, depth=None):
    """Noise with a box of every label in it; the image is brighter there."""
    random = np.random.default_rng(seed)
    label = np.zeros((size, depth or patch, patch, patch), np.uint8)
    low, high = patch // 4, 3 * patch // 4
    for index in range(size):
        for value in (2, 1, 3):
            corner = random.integers(low, high, 3)
            label[index][tuple(slice(c, c + patch // 4) for c in corner)] = value
    image = random.normal(size=(size, len(MODALITIES), *label.shape[1:]))
    return {"image": (image + label[:, None]).astype(np.float16), "label": label}


def prepare(config, *, devices, jit, spatial=1):
    """Network, state and the compiled step on some devices."""
    mesh = sharding.make_mesh(jax.devices()[:devices], spatial=spatial)
    network = Network(config, modalities=MODALITIES, regions=REGIONS, mesh=mesh)
    everywhere = sharding.replicated(mesh)
    params = jax.device_put(broken_zero(network.init(config.seed)), everywhere)
    state = jax.jit(functools.partial(init_state, network), out_shardings=everywhere)(params)
    compiled = jit(train_step(network), out_shardings=(everywhere, everywhere))
    key = jax.device_put(jax.random.key(config.seed), everywhere)
    step = functools.partial(_with_key, compiled, key)
    return mesh, state, step


def _with_key(compiled, key, state, data):
    return compiled(state, data, key)


def broken_zero(params):
    """Projections that start at zero hide what is behind them; give them small numbers."""
    random = np.random.default_rng(7)

    def fill(path, leaf):
        leaf = np.asarray(leaf)
        if path[-1].key != "kernel" or leaf.any():
            return leaf
        return (0.05 * random.standard_normal(leaf.shape)).astype(np.float32)

    return jax.tree_util.tree_map_with_path(fill, params)


def by_path(tree):
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


@pytest.fixture(scope="module")
def mixed(make_config, quick_jit):
    """Half of the tokens pruned from the start, augmented; on one device."""
    return prepare(mixed_config(make_config), devices=1, jit=quick_jit)


def mixed_config(make_config, **changes):
    mixed = {"augment": "swin", "model.mixers": MIXED, "model.keep_bias": 0.0}
    return make_config(**mixed | changes)


# ---------------------------------------------------------------- determinism


def test_the_same_step_twice_gives_the_same_bits(mixed):
    mesh, state, step = mixed
    data = sharding.global_batch(mesh, batch())
    for one, other in zip(jax.tree.leaves(step(state, data)), jax.tree.leaves(step(state, data))):
        assert np.asarray(one).tobytes() == np.asarray(other).tobytes()


def test_noise_differs_between_steps(mixed):
    """Same weights, same batch, another step: other tokens are kept."""
    mesh, state, step = mixed
    image = np.zeros_like(batch()["image"])  # nothing for the augmentation to change
    data = sharding.global_batch(mesh, {"image": image, "label": batch()["label"]})
    kept = set()
    for number in range(3):
        _, metrics = step(state | {"step": state["step"] * 0 + number}, data)
        kept.add(float(metrics["train/keep/level1"]))
    assert len(kept) == 3


def test_a_step_moves_everything_on(mixed, make_config):
    mesh, state, step = mixed
    after, metrics = step(state, sharding.global_batch(mesh, batch()))
    assert int(after["step"]) == int(state["step"]) + 1
    config = mixed_config(make_config)
    assert float(metrics["train/learning_rate"]) == pytest.approx(config.optim.learning_rate / 2)
    assert float(metrics["train/temperature"]) == pytest.approx(config.gumbel.start)
    for value in metrics.values():
        assert value.dtype == jnp.float32 and value.shape == ()
    # The average: one tenth old, nine tenths new (optim.average at step 0).
    for name, new in by_path(after["params"]).items():
        expected = 0.1 * by_path(state["params"])[name] + 0.9 * new
        np.testing.assert_allclose(by_path(after["ema"])[name], expected, rtol=1e-5, atol=1e-7)


def test_crops_of_air_and_without_tumour_train(mixed):
    """Zeros, constants, the largest numbers of float16; no tumour in any of them."""
    mesh, state, step = mixed
    data = batch()
    data["label"][:] = 0
    image = data["image"]
    image[0], image[1], image[2], image[3] = 0, 5, 65504, -65504
    image[4, 1], image[5, :, ::2], image[5, :, 1::2] = 0, 65504, -65504
    state, metrics = step(state, sharding.global_batch(mesh, data))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((metrics, state["params"])))
    assert metrics["train/grad_norm"] > 0


def test_a_few_steps_lower_the_loss(mixed):
    mesh, state, step = mixed
    data = sharding.global_batch(mesh, batch())
    losses = []
    for _ in range(6):
        state, metrics = step(state, data)
        losses.append(float(metrics["train/dice_loss"] + metrics["train/cross_entropy"]))
    assert losses[-1] < losses[0] - 0.05


# ---------------------------------------------------------------- every variant


ALL_PAIRS = tuple(itertools.combinations(("t1", "t1ce", "t2", "flair"), 2))
EVERYTHING = {"mosaic": "learnt", "shift_extras": ("channel", "gate", "window"), "detail": 4}


@pytest.mark.parametrize(
    ("mixers", "changes"),
    [
        ((), {}),
        (("concat",) * 6, {}),
        (("aware",) * 4 + ("shift",) * 2, {}),
        (("shift",) * 4 + ("aware",) * 2, {}),
        (("aware",) + ("concat",) * 3 + ("shift",) * 2, EVERYTHING | {"pairs": ALL_PAIRS}),
    ],
    ids=["unet", "late", "aware low", "shift low", "extras"],
)
def test_every_variant_trains_every_parameter(mixers, changes, make_config, quick_jit):
    """Patch 32: at 16 the deepest levels are one voxel, which an instance norm makes zero."""
    config = make_config(**{"model.mixers": mixers, "patch": 32, "batch_size": 1})
    config.model.keep_bias = 1.0
    config.model.modality_affine = bool(mixers)
    config.model.update(changes)
    if changes:
        config.data.modality_dropout = 0.5
    mesh, state, step = prepare(config, devices=1, jit=quick_jit)
    after, metrics = step(state, sharding.global_batch(mesh, batch(1, 32)))
    for name, value in metrics.items():
        assert np.isfinite(float(value)), name
    ratios = [name for name in metrics if name.startswith("train/keep/")]
    assert len(ratios) == mixers.count("aware")
    lowest = f"decoder.heads.{SIZES[config.model.size].deep_heads - 1}."  # its weight is 0
    gradients = by_path(optax.tree.get(after["opt_state"], "mu"))  # (1 - b1) times the gradient
    for name, gradient in gradients.items():
        if not name.startswith(lowest):
            assert float(jnp.abs(gradient).max()) > 0, name
    mixing = {name.split(".")[1] for name in gradients if name.startswith("mixers.")}
    assert len(mixing) == sum(mixer != "concat" for mixer in mixers)


# ---------------------------------------------------------------- precision


def test_bfloat16_is_close_to_float32(mixed, make_config, quick_jit):
    mesh, state, step = mixed
    data = sharding.global_batch(mesh, batch())
    after, metrics = step(state, data)
    _, half_state, half_step = prepare(
        mixed_config(make_config, **{"model.dtype": "bfloat16"}), devices=1, jit=quick_jit
    )
    half_after, half_metrics = half_step(half_state, data)
    for name in ("train/loss", "train/dice_loss", "train/cross_entropy"):
        assert float(half_metrics[name]) == pytest.approx(float(metrics[name]), rel=0.03), name
    for leaf in jax.tree.leaves((half_after["params"], half_after["ema"])):
        assert leaf.dtype == jnp.float32 and bool(jnp.isfinite(leaf).all())
    gradients, half = (
        np.concatenate([np.ravel(g) for g in jax.tree.leaves(optax.tree.get(s["opt_state"], "mu"))])
        for s in (after, half_after)
    )
    cosine = gradients @ half / np.linalg.norm(gradients) / np.linalg.norm(half)
    assert cosine > 0.9


# ---------------------------------------------------------------- evaluation


def test_evaluation_on_packed_logits_counts_the_voxels(make_config, quick_jit):
    """The sums of ``eval_step`` against masks of what ``segment_step`` gives, by NumPy."""
    network = Network(
        mixed_config(make_config, patch=(32, 16, 16)), modalities=MODALITIES, regions=REGIONS
    )
    params = broken_zero(network.init(0))
    for head in params["decoder"]["heads"].values():
        head["bias"] = np.zeros_like(head["bias"])  # of either mind
    data = batch(2, depth=32)
    predicted = np.asarray(quick_jit(segment_step(network))(params, data["image"])) > 0
    reference = np.stack([np.isin(data["label"], values) for values in REGIONS.values()], -1)
    sums = quick_jit(eval_step(network))(params, data)
    overlap = (predicted & reference).sum((0, 1, 2, 3))
    assert (overlap > 0).all()
    total = predicted.sum((0, 1, 2, 3)) + reference.sum((0, 1, 2, 3))
    # A logit of two compilations may lie on either side of zero.
    np.testing.assert_allclose(sums["overlap"], overlap, rtol=1e-3)
    np.testing.assert_allclose(sums["total"], total, rtol=1e-3)


class Fixed:
    """A network whose logits are the first two modalities."""

    regions = {"outer": (1, 2), "inner": (2,)}
    mesh, stem = None, 1

    def apply(self, params, x, **_):
        return [jnp.moveaxis(x[:, :2], 1, -1).astype(jnp.float32) * params], {}


def test_pseudo_dice_by_hand():
    mesh = sharding.make_mesh(jax.devices()[:1])
    step = jax.jit(eval_step(Fixed()))
    params = jax.device_put(jnp.float32(1.0), sharding.replicated(mesh))
    # A line of four voxels, twice: labels 1 2 0 0 and 1 0 0 0.
    label = np.array([[1, 2, 0, 0], [1, 0, 0, 0]], np.uint8).reshape(2, 1, 1, 4)
    outer = np.array([[1, 1, 1, 0], [0, 0, 0, 0]], np.float16)  # 2 of 3 hit, 1 missed
    inner = np.array([[0, -1, 0, 0], [0, 0, 1, 1]], np.float16)  # 0 hit
    image = np.stack([outer, inner], 1).reshape(2, 2, 1, 1, 4)
    crop = {"image": image, "label": label, "case": np.arange(2, dtype=np.int32)}
    sums = step(params, sharding.global_batch(mesh, crop))
    np.testing.assert_array_equal(sums["overlap"], [2, 0])
    np.testing.assert_array_equal(sums["total"], [3 + 3, 2 + 1])
    scores = validation.pseudo_dice(step, params, [crop, crop], mesh, Fixed.regions)
    assert scores == {
        "val/dice/outer": pytest.approx(4 / 6),
        "val/dice/inner": 0.0,
        "val/dice": pytest.approx(2 / 6),
    }


def test_validation_says_what_is_kept_without_noise():
    class Pruning(Fixed):
        def apply(self, params, x, **_):
            keep = {"level1": x[:, :2], "level2": 1 - x[:, :1]}
            return super().apply(params, x)[0], keep

    mesh = sharding.make_mesh(jax.devices()[:1])
    params = jax.device_put(jnp.float32(1.0), sharding.replicated(mesh))
    image = np.zeros((1, 2, 1, 1, 4), np.float16)
    image[0, 0, 0, 0, 0] = 1  # one of eight tokens of level 1 kept, three of four of level 2
    crop = {"image": image, "label": np.zeros((1, 1, 1, 4), np.uint8)}
    scores = validation.pseudo_dice(
        jax.jit(eval_step(Pruning())), params, [crop], mesh, Fixed.regions
    )
    assert scores["val/keep/level1"] == 1 / 8 and scores["val/keep/level2"] == 3 / 4


def test_a_region_neither_there_nor_predicted_counts_as_one():
    mesh = sharding.make_mesh(jax.devices()[:1])
    params = jax.device_put(jnp.float32(1.0), sharding.replicated(mesh))
    crop = {
        "image": np.zeros((1, 2, 1, 1, 4), np.float16),
        "label": np.zeros((1, 1, 1, 4), np.uint8),
    }
    step = jax.jit(eval_step(Fixed()))
    scores = validation.pseudo_dice(step, params, [crop], mesh, Fixed.regions)
    assert scores == {"val/dice/outer": 1.0, "val/dice/inner": 1.0, "val/dice": 1.0}


def test_segmenting_is_the_training_network_without_noise(make_config, quick_jit):
    config = mixed_config(make_config, patch=(32, 16, 16))
    network = Network(config, modalities=MODALITIES, regions=REGIONS)
    params = broken_zero(network.init(0))
    image = batch(2, depth=32)["image"]
    segment = quick_jit(segment_step(network))
    logits = segment(params, image)
    assert logits.shape == (2, 32, 16, 16, 3) and logits.dtype == jnp.float32
    # Examples do not see each other.
    alone = segment(params, np.stack([image[1], image[1]]))
    np.testing.assert_allclose(alone[0], logits[1], rtol=1e-4, atol=1e-5)


def test_what_the_mixers_keep_voxel_by_voxel(make_config, quick_jit):
    """Decisions per token, spread over the voxels of the token, by the names of their channels."""
    config = make_config(**{"model.mixers": MIXED, "patch": (32, 16, 16)})
    network = Network(config, modalities=MODALITIES, regions=REGIONS)
    params = network.init(0)
    last = params["mixers"]["level1"]["predictor"]["logits"]
    shape = last["kernel"].shape
    last["bias"] = np.zeros(2, np.float32)  # of either mind
    last["kernel"] = np.random.default_rng(3).normal(size=shape).astype(np.float32)
    tiles = batch(2, depth=32)["image"].astype(np.float32)
    _, keep = quick_jit(network.apply)(params, tiles)
    voxels = np.asarray(quick_jit(keep_step(network))(params, tiles))
    names = keep_names(network)
    assert names == [("level1", name) for name in MODALITIES]
    assert voxels.shape == (2, 32, 16, 16, 4) and set(np.unique(voxels)) == {-20, 20}
    size = 32 // keep["level1"].shape[2]
    block = np.ones((size, size, size))
    for channel in range(4):
        expected = np.kron(np.asarray(keep["level1"])[0, channel], block)
        np.testing.assert_array_equal(voxels[0, ..., channel] > 0, expected > 0)


def test_what_is_kept_of_a_modality_in_several_pairs(make_config, quick_jit):
    """The mean of its decisions, once under its name: of t1 here half is kept."""
    pairs = (("t1", "t1ce"), ("t2", "flair"), ("flair", "t1"))
    config = make_config(**{"model.mixers": MIXED, "model.pairs": pairs})
    network = Network(config, modalities=MODALITIES, regions=REGIONS)
    assert [name for _, name in keep_names(network)] == ["t1", "t1ce", "t2", "flair"]
    decisions = np.array([1, 1, 0, 1, 0, 0], np.float32)  # t1 t1ce t2 flair flair t1
    keep = np.broadcast_to(decisions[:, None, None, None], (2, 6, 2, 2, 2))
    network.apply = lambda params, image, present: (None, {"level1": jnp.asarray(keep)})
    voxels = np.asarray(keep_step(network)({}, batch(2)["image"].astype(np.float32)))
    assert voxels.shape == (2, 16, 16, 16, 4)
    share = 1 / (1 + np.exp(-voxels.astype(float)))
    np.testing.assert_allclose(share[0, 0, 0, 0], [0.5, 1, 0, 0.5], atol=1e-6)


def test_what_is_kept_where_a_modality_is_missing(make_config, quick_jit):
    """keep_bias -20: all is pruned, but of t1, for which there is no t1ce."""
    config = make_config(**{"model.mixers": MIXED, "model.keep_bias": -20.0})
    mesh = sharding.make_mesh(jax.devices()[:2])
    network = Network(config, modalities=MODALITIES, regions=REGIONS, mesh=mesh)
    tiles = batch(2)["image"].astype(np.float32)
    present = np.array([1, 0, 1, 1], np.float32)
    voxels = np.asarray(quick_jit(keep_step(network))(network.init(0), tiles, present))
    assert voxels[..., 0].min() == 20 and voxels[..., 2:].max() == -20
