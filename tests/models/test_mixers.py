"""The two mixers against their definition."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from scipy import ndimage

from masm_jax.models.aware import AwareMixer
from masm_jax.models.decoder import Decoder
from masm_jax.models.init import Initialiser
from masm_jax.models.shift import ShiftMixer
from masm_jax.models.tokens import Tokens

GRID = (2, 2, 2)
SHAPE = (2, 4, 8, 8, 8, 6)  # patches of 4


def aware(pairs=((0, 1), (2, 3)), keep_bias=3.0):
    return AwareMixer(
        6, 4, GRID, pairs=pairs, modalities=4, width=16, heads=2, depth=1, keep_bias=keep_bias,
        init=Initialiser(0),
    )  # fmt: skip


def test_starts_as_nothing():
    x = jax.random.normal(jax.random.key(0), SHAPE)
    mixed, keep = aware(keep_bias=20.0)(x)
    assert keep.shape == (2, 4, *GRID) and float(keep.min()) == 1
    np.testing.assert_array_equal(mixed, x)
    shift = ShiftMixer(
        6, 4, GRID, mosaic="bayer3d", modalities=4, width=16, heads=2, depth=2, init=Initialiser(0)
    )
    np.testing.assert_array_equal(shift(x), x)


def test_pruned_patches_become_the_partners():
    """Everything pruned: the members of each pair trade places, voxel for voxel."""
    x = jax.random.normal(jax.random.key(0), SHAPE)
    mixed, keep = aware(keep_bias=-20.0)(x)
    assert float(keep.max()) == 0
    np.testing.assert_array_equal(mixed, x[:, np.array([1, 0, 3, 2])])


def test_the_border_of_a_pruned_patch_is_blended(monkeypatch):
    """As SciPy's linear zoom of the mask; the mixer starts as nothing else."""
    keep = np.ones((SHAPE[0], 4, *GRID), np.float32)
    keep[:, 0, 1, 0, 1] = 0  # of t1 one patch, whose partner is t1ce
    flat = jnp.asarray(keep.reshape(SHAPE[0] * 4, -1))
    monkeypatch.setattr("masm_jax.models.aware.sample_keep", lambda *_: flat)
    x = jax.random.normal(jax.random.key(0), SHAPE)
    mixed, _ = aware()(x)
    factor = SHAPE[2] // GRID[0]
    mask = ndimage.zoom(keep[0, 0], factor, order=1, mode="nearest", grid_mode=True)[..., None]
    np.testing.assert_allclose(mixed[:, 0], mask * x[:, 0] + (1 - mask) * x[:, 1], atol=1e-5)
    assert len(np.unique(mask)) > 2
    np.testing.assert_allclose(mixed[:, 1:], x[:, 1:], atol=1e-5)


def test_a_modality_in_no_pair_passes_through():
    x = jax.random.normal(jax.random.key(0), SHAPE)
    mixed, keep = aware(pairs=((0, 3),), keep_bias=-20.0)(x)
    assert keep.shape == (2, 2, *GRID)
    np.testing.assert_array_equal(mixed, x[:, np.array([3, 1, 2, 0])])


def test_gradient_reaches_every_parameter_of_the_mixer():
    mixer = aware(keep_bias=0.0)
    mixer.tokens.restore.kernel[...] = 0.1 * jax.random.normal(
        jax.random.key(5), mixer.tokens.restore.kernel[...].shape
    )
    graph, params = nnx.split(mixer)
    x = jax.random.normal(jax.random.key(0), SHAPE)

    def loss(params):
        mixed, _ = nnx.merge(graph, params)(x, jax.random.key(1), 1.0)
        return (mixed**3).sum()

    gradient = nnx.to_pure_dict(jax.grad(loss)(params))
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradient):
        assert float(jnp.abs(leaf).max()) > 0, jax.tree_util.keystr(path)


def test_pairs_do_not_see_each_other():
    mixer = aware(keep_bias=20.0)
    mixer.tokens.restore.kernel[...] = jnp.ones_like(mixer.tokens.restore.kernel[...])
    x = jax.random.normal(jax.random.key(0), SHAPE)
    changed = x.at[:, 1].add(1.0)
    difference = np.abs(np.asarray(mixer(changed)[0] - mixer(x)[0])).max((0, 2, 3, 4, 5))
    assert difference[0] > 0 and difference[1] > 0
    np.testing.assert_array_equal(difference[2:], 0)


def test_the_shift_lets_every_modality_see_every_other():
    mixer = ShiftMixer(
        6, 4, GRID, mosaic="bayer3d", modalities=4, width=16, heads=2, depth=1, init=Initialiser(0)
    )
    kernel = mixer.tokens.restore.kernel
    kernel[...] = jax.random.normal(jax.random.key(2), kernel.shape)
    x = jax.random.normal(jax.random.key(0), SHAPE)
    changed = x.at[:, 2, :4, :4, :4].add(1.0)  # one patch of one modality
    difference = np.abs(np.asarray(mixer(changed) - mixer(x)))
    assert (difference.max((0, 2, 3, 4, 5)) > 0).all()


@pytest.mark.parametrize("patch", [1, 2, 4])
def test_tokens_keep_places(patch):
    """A change in one patch changes one token, and its way back reaches half a cell beyond."""
    tokens = Tokens(3, 8, patch, (4, 4, 4), 2, init=Initialiser(0))
    tokens.restore.kernel[...] = jax.random.normal(jax.random.key(1), tokens.restore.kernel.shape)
    edge = 4 * patch
    x = jax.random.normal(jax.random.key(0), (1, 2, edge, edge, edge, 3))
    changed = x.at[0, 1, 2 * patch, patch, 3 * patch].add(5.0)
    before, after = tokens.encode(x), tokens.encode(changed)
    moved = np.argwhere(np.asarray(jnp.abs(after - before).max(-1)) > 0)
    assert moved.tolist() == [[0, 1, 2, 1, 3]]
    voxels = np.asarray(jnp.abs(tokens.modulate(x, after) - tokens.modulate(x, before)).max(-1)) > 0
    box = np.zeros_like(voxels)
    reach = patch // tokens.cells // 2
    starts = [slice(max(0, i * patch - reach), (i + 1) * patch + reach) for i in (2, 1, 3)]
    box[0, 1, *starts] = True
    assert voxels.any() and not (voxels & ~box).any()


def test_another_grid_is_refused():
    with pytest.raises(ValueError, match="token grid"):
        aware()(jnp.zeros((1, 4, 16, 16, 16, 6)))


def test_the_decoder_starts_without_a_checkerboard():
    """Equal inputs to every cell of the stem give logits that are constant over its 2^3 voxels."""
    decoder = Decoder(
        (4, 6, 8), (1, 2, 2), stem=2, num_regions=3, heads=2, init=Initialiser(0)
    )
    random = np.random.default_rng(0)
    skips = [random.normal(size=(1, n, n, n, c)) for n, c in ((8, 4), (4, 6), (2, 8))]
    logits = np.asarray(decoder([jnp.asarray(x, jnp.float32) for x in skips])[0])
    cells = logits.reshape(8, 2, 8, 2, 8, 2, 3)
    assert logits.shape == (1, 16, 16, 16, 3) and logits.std() > 0.1
    np.testing.assert_allclose(cells, np.broadcast_to(cells[:, :1, :, :1, :, :1], cells.shape))
