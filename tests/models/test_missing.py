"""Missing modalities: what they hold is no matter, wherever they are."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from masm_jax.state import Network
from masm_jax.steps import deciding, drawn_modalities, keep_names, segment_step

MODALITIES = ("t1", "t1ce", "t2", "flair")
SUBSETS = [s for n in range(1, 5) for s in itertools.combinations(range(4), n)]
VARIANTS = {
    "masm": {},
    "late": {"mixers": ("concat",) * 6},
    "unet": {"mixers": ()},
    "mask": {"pruning": "mask"},
    "no pruning": {"pruning": "none"},
    "extras": {
        "shift_extras": ("channel", "gate", "window"),
        "mosaic": "learnt",
        "detail": 4,
    },  # fmt: skip
    "all pairs": {"pairs": tuple(itertools.combinations(MODALITIES, 2))},
}


@pytest.fixture(scope="module")
def built(make_config, quick_jit):
    """Name of a variant -> its network with parameters that are no zeros, jitted."""
    made = {}

    def build(name):
        if name not in made:
            config = make_config(**{f"model.{key}": value for key, value in VARIANTS[name].items()})
            network = Network(config, modalities=MODALITIES, regions={"WT": (1, 2, 3)})
            random = np.random.default_rng(1)
            params = jax.tree.map(
                lambda leaf: leaf + 0.2 * random.normal(size=leaf.shape).astype(np.float32),
                network.init(0),
            )
            apply = quick_jit(lambda x, present: network.apply(params, x, present=present)[0][0])
            made[name] = apply, config.patch
        return made[name]

    return build


@pytest.mark.parametrize("name", VARIANTS)
def test_what_a_missing_modality_holds_is_no_matter(built, name):
    apply, patch = built(name)
    x = np.random.default_rng(0).normal(size=(len(SUBSETS), 4, patch, patch, patch))
    x = x.astype(np.float32)
    present = np.zeros((len(SUBSETS), 4), np.float32)
    for row, subset in enumerate(SUBSETS):
        present[row, list(subset)] = 1
    other = np.where(present[:, :, None, None, None] > 0, x, np.nan)
    found = np.asarray(apply(x, present))
    np.testing.assert_array_equal(found, apply(other, present))
    assert np.isfinite(found).all()
    # All there is the same as nothing said.
    np.testing.assert_allclose(found[-1:], apply(x[-1:], None), rtol=1e-3, atol=1e-3)
    # And what is there does matter.
    moved = np.asarray(apply(x + 0.5 * np.random.default_rng(2).normal(size=x.shape), present))
    assert (np.abs(moved - found).max((1, 2, 3, 4)) > 1e-3).all()


def test_the_partner_of_a_missing_modality_keeps_all(make_config, quick_jit):
    """keep_bias -20: all would be pruned, but there is nothing to replace it by."""
    config = make_config(**{"model.keep_bias": -20.0})
    network = Network(config, modalities=MODALITIES, regions={"WT": (1, 2, 3)})
    x = jax.random.normal(jax.random.key(0), (2, 4, *(config.patch,) * 3))
    present = jnp.array([[1, 0, 1, 1], [1, 1, 1, 1]], jnp.float32)
    _, keep = quick_jit(network.apply)(network.init(0), x, present=present)
    for mask in keep.values():  # a0 b0 a1 b1: t1, t1ce, t2, flair
        assert mask[0, 0].min() == 1 and mask[0, 2:].max() == 0 and mask[1].max() == 0


def test_the_decoder_weighs_what_is_there(make_config, quick_jit):
    """Four times the same scan: with any of them missing the result is the same (no mixers)."""
    changes = {"model.mixers": ("concat",) * 6, "model.detail": 6, "model.fused_levels": 3}
    config = make_config(**changes)
    network = Network(config, modalities=MODALITIES, regions={"WT": (1, 2, 3)})
    params = jax.tree.map(lambda leaf: leaf + 0.01, network.init(0))  # the head of detail is 0
    decoder = params["decoder"]  # looks at every modality by the same weights
    for fuse in params["fuse"].values():
        fuse["kernel"] = _alike(fuse["kernel"], 0)
    for level in (3, 4):
        block = decoder["blocks"][level][0]
        block["kernel"] = _alike(block["kernel"], block["kernel"].shape[-1])
    decoder["ups"][4]["kernel"] = _alike(decoder["ups"][4]["kernel"], 0)
    scans = params["decoder"]["detail"]["scans"]
    scans["kernel"] = np.repeat(scans["kernel"][..., :1, :], 4, axis=-2)
    apply = quick_jit(lambda x, present: network.apply(params, x, present=present)[0][0])
    one = jax.random.normal(jax.random.key(0), (1, 1, *(config.patch,) * 3))
    four = jnp.tile(one, (1, 4, 1, 1, 1))
    whole = apply(four, jnp.ones((1, 4)))
    for subset in SUBSETS[:5]:
        present = np.zeros((1, 4), np.float32)
        present[0, list(subset)] = 1
        np.testing.assert_allclose(apply(four, present), whole, rtol=1e-4, atol=1e-4)


def _alike(kernel, start):
    """(..., start + 4 C, C_out) with the rows of the first of four modalities for all of them."""
    kernel = np.array(kernel)
    kernel[..., start:, :] = np.tile(
        kernel[..., start : start + (kernel.shape[-2] - start) // 4, :],
        (*(1,) * (kernel.ndim - 2), 4, 1),
    )
    return kernel


def test_every_subset_is_drawn_as_often():
    image = jnp.zeros((4096, 3, 1, 1, 1))
    drawn = np.asarray(drawn_modalities(jax.random.key(0), image, 1.0))
    codes, counts = np.unique(drawn @ [1, 2, 4], return_counts=True)
    assert codes.tolist() == [1, 2, 3, 4, 5, 6, 7]  # never none
    assert (abs(counts - 4096 / 7) < 5 * np.sqrt(4096 / 7)).all()
    half = np.asarray(drawn_modalities(jax.random.key(0), image, 0.5))
    assert abs((half.min(1) == 0).mean() - 0.5 * 6 / 7) < 0.05
    assert drawn_modalities(jax.random.key(0), image, 0.0) is None


def test_pairs_that_decide(make_config):
    network = Network(make_config(), modalities=MODALITIES, regions={"WT": (1, 2, 3)})
    present = jnp.array([[1, 1, 1, 0], [0, 1, 1, 1]], jnp.float32)
    np.testing.assert_array_equal(deciding(network, present), [[1, 1, 0, 0], [0, 0, 1, 1]])
    assert deciding(network, None) is None


def test_segmenting_with_some_modalities(make_config, quick_jit):
    config = make_config()
    network = Network(config, modalities=MODALITIES, regions={"WT": (1, 2, 3)})
    params = network.init(0)
    x = jax.random.normal(jax.random.key(0), (2, 4, *(config.patch,) * 3))
    step = quick_jit(segment_step(network))
    present = np.array([0, 1, 0, 1], np.float32)
    expected = quick_jit(network.apply)(params, x, present=jnp.tile(present, (2, 1)))[0][0]
    np.testing.assert_allclose(step(params, x, present), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mixers", [(), ("concat",) * 5 + ("shift",)])
def test_pairs_of_the_config_are_no_matter_where_nothing_is_paired(make_config, mixers):
    """Training with missing modalities on any records: those of the default pairs are not there."""
    network = Network(
        make_config(**{"model.mixers": mixers}), modalities=("t2", "adc"), regions={"lesion": (1,)}
    )
    assert deciding(network, jnp.ones((3, 2))) is None and keep_names(network) == []
