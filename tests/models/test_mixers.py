"""The two mixers against their definition."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from scipy import ndimage

from masm_jax.models.aware import AwareMixer, exchanged
from masm_jax.models.decoder import Decoder
from masm_jax.models.detail import Detail
from masm_jax.models.init import Initialiser
from masm_jax.models.layers import Fuse, depth_to_space, planes, volumes
from masm_jax.models.masm import MASM, together
from masm_jax.models.shift import ShiftMixer
from masm_jax.models.tokens import Tokens

GRID = (2, 3, 2)
SHAPE = (2, 4, 8, 12, 8, 6)  # patches of 4


def fold(x):
    """(B, M, D, H, W, C) -> planes (M B D, H, W, C), modality slowest."""
    b, m, d, h, w, c = x.shape
    return jnp.asarray(x).transpose(1, 0, 2, 3, 4, 5).reshape(m * b * d, h, w, c)


def unfold(x, modalities, depth):
    """The inverse of ``fold``."""
    return x.reshape(modalities, -1, depth, *x.shape[1:]).swapaxes(0, 1)


def mix(mixer, x, *gumbel):
    """A mixer on (B, M, D, H, W, C): the same of what it returns, and keep where it has it."""
    result = mixer(fold(x), x.shape[2], *gumbel)
    if isinstance(result, tuple):
        return unfold(result[0], *x.shape[1:3]), result[1]
    return unfold(result, *x.shape[1:3])


def test_modalities_are_exchanged_and_put_together_as_by_index():
    x = np.random.default_rng(0).normal(size=(2, 3, 4, 5, 6, 7)).astype(np.float32)
    for source in ([0, 1, 2], [2, 1, 0], [1, 2, 0], [1, 1, 0]):
        found = unfold(exchanged(fold(x), np.array(source)), 3, 4)
        np.testing.assert_array_equal(found, x[:, source])
    beside = np.moveaxis(x, 1, -2).reshape(2 * 4, 5, 6, 3 * 7)  # in the channels, M slower than C
    np.testing.assert_array_equal(together(fold(x), 3), beside)


def aware(pairs=((0, 1), (2, 3)), keep_bias=3.0):
    return AwareMixer(
        6, 4, GRID, pairs=pairs, modalities=4, width=16, heads=2, depth=1, keep_bias=keep_bias,
        init=Initialiser(0),
    )  # fmt: skip


def test_starts_as_nothing():
    x = jax.random.normal(jax.random.key(0), SHAPE)
    mixed, keep = mix(aware(keep_bias=20.0), x)
    assert keep.shape == (2, 4, *GRID) and float(keep.min()) == 1
    np.testing.assert_array_equal(mixed, x)
    shift = ShiftMixer(
        6, 4, GRID, mosaic="bayer3d", modalities=4, width=16, heads=2, depth=2, init=Initialiser(0)
    )
    np.testing.assert_array_equal(mix(shift, x), x)


def test_pruned_patches_become_the_partners():
    """Everything pruned: the members of each pair trade places, voxel for voxel."""
    x = jax.random.normal(jax.random.key(0), SHAPE)
    mixed, keep = mix(aware(keep_bias=-20.0), x)
    assert float(keep.max()) == 0
    np.testing.assert_array_equal(mixed, x[:, np.array([1, 0, 3, 2])])


def test_the_border_of_a_pruned_patch_is_blended(monkeypatch):
    """As SciPy's linear zoom of the mask; the mixer starts as nothing else."""
    keep = np.ones((SHAPE[0], 4, *GRID), np.float32)
    keep[:, 0, 1, 0, 1] = 0  # of t1 one patch, whose partner is t1ce
    flat = jnp.asarray(keep.reshape(SHAPE[0] * 4, -1))
    monkeypatch.setattr("masm_jax.models.aware.sample_keep", lambda *_: flat)
    x = jax.random.normal(jax.random.key(0), SHAPE)
    mixed, _ = mix(aware(), x)
    factor = SHAPE[2] // GRID[0]
    mask = ndimage.zoom(keep[0, 0], factor, order=1, mode="nearest", grid_mode=True)[..., None]
    np.testing.assert_allclose(mixed[:, 0], mask * x[:, 0] + (1 - mask) * x[:, 1], atol=1e-5)
    assert len(np.unique(mask)) > 2
    np.testing.assert_allclose(mixed[:, 1:], x[:, 1:], atol=1e-5)


def test_a_modality_in_no_pair_passes_through():
    x = jax.random.normal(jax.random.key(0), SHAPE)
    mixed, keep = mix(aware(pairs=((0, 3),), keep_bias=-20.0), x)
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
        keys = jax.random.split(jax.random.key(1), len(x))
        mixed, _ = mix(nnx.merge(graph, params), x, keys, 1.0)
        return (mixed**3).sum()

    gradient = nnx.to_pure_dict(jax.jit(jax.grad(loss))(params))
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradient):
        assert float(jnp.abs(leaf).max()) > 0, jax.tree_util.keystr(path)


def test_an_example_is_mixed_the_same_whatever_batch_it_is_in():
    mixer = aware(keep_bias=0.0)
    kernel = mixer.tokens.restore.kernel
    kernel[...] = jax.random.normal(jax.random.key(2), kernel.shape)
    keys = jax.random.split(jax.random.key(1), 3)
    x = jax.random.normal(jax.random.key(0), (3, *SHAPE[1:]))
    mixed, keep = mix(mixer, x, keys, 0.7)
    assert 0 < float(keep.mean()) < 1
    for rows in ([0], [2], [2, 1], [1, 0, 2]):
        rows = np.array(rows)
        other, kept = mix(mixer, x[rows], keys[rows], 0.7)
        np.testing.assert_array_equal(kept, keep[rows])
        np.testing.assert_allclose(other, mixed[rows], rtol=1e-5, atol=1e-5)


def test_pairs_do_not_see_each_other():
    mixer = aware(keep_bias=20.0)
    kernel = mixer.tokens.restore.kernel
    kernel[...] = jax.random.normal(jax.random.key(2), kernel.shape)
    x = jax.random.normal(jax.random.key(0), SHAPE)
    changed = x.at[:, 1].add(1.0)
    difference = np.abs(np.asarray(mix(mixer, changed)[0] - mix(mixer, x)[0]))
    difference = difference.max((0, 2, 3, 4, 5))
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
    difference = np.abs(np.asarray(mix(mixer, changed) - mix(mixer, x)))
    assert (difference.max((0, 2, 3, 4, 5)) > 0).all()


def test_what_mixers_write_is_bounded_however_large_their_tokens_grow():
    tokens = Tokens(3, 8, 4, GRID, 2, init=Initialiser(0))
    tokens.restore.kernel[...] = jax.random.normal(jax.random.key(1), tokens.restore.kernel.shape)
    x = jax.random.normal(jax.random.key(0), (1, 2, *GRID, 8))
    np.testing.assert_allclose(
        tokens.cells_of(1000 * x), tokens.cells_of(x), rtol=1e-3, atol=1e-3
    )  # fmt: skip


def test_a_skip_is_as_large_whatever_was_fused():
    """By hand: product, (x - mean) / std over the voxels of a volume, leaky ReLU."""
    depth, fuse = 4, Fuse(6, 5, init=Initialiser(0))
    parts = [
        np.random.default_rng(i).normal(i, 1 + 9 * i, (2 * depth, 6, 3, 3)).astype(np.float32)
        for i in range(2)
    ]
    y = np.concatenate(parts, -1).astype(np.float64) @ np.asarray(fuse.kernel[...], np.float64)
    y = y.reshape(2, depth, 6, 3, 5)
    y = (y - y.mean((1, 2, 3), keepdims=True)) / y.std((1, 2, 3), keepdims=True)
    wanted = np.where(y > 0, y, 0.01 * y).reshape(2 * depth, 6, 3, 5)
    for factor in (1.0, 1000.0):
        found = fuse(*(factor * part for part in parts), depth=depth)
        np.testing.assert_allclose(found, wanted, atol=2e-4)


@pytest.mark.parametrize("patch", [1, 2, 4])
def test_tokens_keep_places(patch):
    """A change in one patch changes one token, and its way back reaches half a cell beyond."""
    grid = (3, 2, 4)
    tokens = Tokens(3, 8, patch, grid, 2, init=Initialiser(0))
    tokens.restore.kernel[...] = jax.random.normal(jax.random.key(1), tokens.restore.kernel.shape)
    edges = [n * patch for n in grid]
    x = jax.random.normal(jax.random.key(0), (1, 2, *edges, 3))
    changed = x.at[0, 1, 2 * patch, patch, 3 * patch].add(5.0)
    before, after = (tokens.encode(fold(y), edges[0]) for y in (x, changed))
    moved = np.argwhere(np.asarray(jnp.abs(after - before).max(-1)) > 0)
    assert moved.tolist() == [[0, 1, 2, 1, 3]]
    back = [tokens.modulate(fold(x), tokens.cells_of(y)) for y in (before, after)]
    voxels = np.asarray(jnp.abs(unfold(back[1] - back[0], 2, edges[0])).max(-1)) > 0
    box = np.zeros_like(voxels)
    reach = patch // tokens.cells // 2
    starts = [slice(max(0, i * patch - reach), (i + 1) * patch + reach) for i in (2, 1, 3)]
    box[0, 1, *starts] = True
    assert voxels.any() and not (voxels & ~box).any()


def test_another_grid_is_refused():
    with pytest.raises(ValueError, match="token grid"):
        mix(aware(), jnp.zeros((1, 4, 16, 16, 16, 6)))


def test_detail_starts_as_nothing(make_config):
    sizes = dict(patch=(16, 16, 32), modalities=("t1", "t2"), num_regions=3)
    plain, network = (
        MASM(
            make_config(**{"model.mixers": (), "model.detail": channels}).model,
            init=Initialiser(0),
            **sizes,
        )
        for channels in (0, 5)
    )
    for part in ("encoder", "decoder"):
        nnx.update(getattr(network, part), nnx.state(getattr(plain, part)))
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 2, 16, 16, 32)), jnp.float32)
    np.testing.assert_array_equal(network(x)[0][0], plain(x)[0][0])


@pytest.mark.parametrize("size, backbone", [("full", "unet"), ("tiny", "unetr")])
def test_what_starts_at_full_resolution_has_no_detail(size, backbone, make_config):
    model = make_config(**{"model.size": size, "model.backbone": backbone, "model.detail": 8}).model
    sizes = dict(patch=(32,) * 3, modalities=model.pairs[0] + model.pairs[1], num_regions=3)
    assert MASM(model, init=Initialiser(None), **sizes).decoder.detail is None


def test_detail_sees_every_voxel():
    detail = Detail(4, 5, 2, 2, 3, init=Initialiser(0))
    detail.head.kernel[...] = jax.random.normal(jax.random.key(0), detail.head.kernel.shape)
    random = np.random.default_rng(0)
    x = jnp.asarray(random.normal(size=(8, 8, 16, 4)), jnp.float32)
    scans = jnp.asarray(random.normal(size=(16, 16, 32, 2)), jnp.float32)
    one, other = (detail(x, y, 8) for y in (scans, scans.at[4, 9, 20, 1].add(1.0)))
    assert one.shape == (8, 8, 16, 2**3 * 3)
    # Instance norm moves all a little; what four kernels reach moves far more.
    moved = np.abs(np.asarray(depth_to_space(one - other, 2))).max(-1)
    far = np.ones(moved.shape, bool)
    far[0:9, 5:14, 16:25] = False
    assert moved[3:6, 8:11, 19:22].mean() > 10 * np.median(moved[far]) > 0


def test_the_decoder_starts_without_a_checkerboard():
    """Equal inputs to every cell of the stem give logits that are constant over its 2^3 voxels."""
    shape = dict(skips=(4, 6, 8), stem=2, num_regions=3, heads=2)
    decoder = Decoder((4, 6, 8), (1, 2, 2), init=Initialiser(0), **shape)
    random = np.random.default_rng(0)
    skips = []
    for n, c in ((4, 4), (2, 6), (1, 8)):  # n x 2n x 2n
        x = random.normal(size=(n, 2 * n, 2 * n, c))
        skips.append(([jnp.asarray(x, jnp.float32)], n))
    packed = decoder(skips, None)[0]
    assert packed.shape == (1, 4, 8, 8, 2**3 * 3)
    logits = np.asarray(volumes(depth_to_space(planes(packed), 2), 8))
    cells = logits.reshape(4, 2, 8, 2, 8, 2, 3)
    assert logits.shape == (1, 8, 16, 16, 3) and logits.std() > 0.1
    np.testing.assert_allclose(cells, np.broadcast_to(cells[:, :1, :, :1, :, :1], cells.shape))


def spread_out(mixer, seed=2):
    """Gates that do something, and scores of both signs that differ from token to token."""
    for place, param in enumerate((mixer.tokens.restore.kernel, mixer.predictor.logits.kernel)):
        param[...] = jax.random.normal(jax.random.key(seed + place), param[...].shape)
    return mixer


def shared(mixer, x, share):
    mixed, keep = mixer(fold(x), x.shape[2], share=share)
    return unfold(mixed, *x.shape[1:3]), keep


def test_a_share_of_all_tokens_is_the_dense_result():
    """By way of the places of all, too: one under the share that leaves one out."""
    mixer = spread_out(aware(keep_bias=0.0))
    x = jax.random.normal(jax.random.key(0), SHAPE)
    dense, keep = mix(mixer, x)
    assert 0.2 < float(keep.mean()) < 0.9
    np.testing.assert_array_equal(shared(mixer, x, 1.0)[0], dense)
    tokens = 2 * np.prod(GRID)
    almost = 1 - 0.5 / tokens  # ceil: all of them, but gathered and scattered
    mixed, same = shared(mixer, x, almost)
    np.testing.assert_allclose(mixed, dense, atol=2e-5)
    np.testing.assert_array_equal(same, keep)


@pytest.mark.parametrize("pruning", ["replace", "mask"])
def test_a_share_of_the_tokens(pruning):
    """By hand, with NumPy's choice: what is left out stays, or is what became of its partner."""
    mixer = AwareMixer(
        6, 4, GRID, pairs=((0, 1),), modalities=2, width=16, heads=2, depth=2, keep_bias=0.0,
        pruning=pruning, init=Initialiser(0),
    )  # fmt: skip
    spread_out(mixer)
    batch, count = 3, int(np.prod(GRID))
    rng = np.random.default_rng(0)
    tokens = rng.normal(size=(batch, 2 * count, 16)).astype(np.float32)
    scores = rng.normal(size=(batch, 2 * count)).astype(np.float32)
    keep = (scores >= 0).astype(np.float32)
    if pruning == "replace":
        other = np.roll(tokens, count, axis=1)
        tokens = np.where(keep[..., None] == 1, tokens, other)
    found = mixer._attend_some(jnp.asarray(tokens), jnp.asarray(keep), jnp.asarray(scores), 0.3)
    number = -(-3 * 2 * count // 10)
    for row in range(batch):
        chosen = np.sort(np.argsort(-scores[row])[:number])
        some = mixer._attend(
            jnp.asarray(tokens[row : row + 1, chosen]), jnp.asarray(keep[row : row + 1, chosen])
        )[0]
        expected = tokens[row].copy()
        expected[chosen] = some
        if pruning == "replace":
            done = expected.copy()
            for place in set(range(2 * count)) - set(chosen):
                partner = (place + count) % (2 * count)
                if keep[row, place] == 0 and partner in chosen:
                    expected[place] = done[partner]
        np.testing.assert_allclose(found[row], expected, atol=1e-5)


def test_masks_alone_leave_the_features():
    """pruning="mask": nothing is replaced, and pruned tokens are no keys."""
    x = jax.random.normal(jax.random.key(0), SHAPE)
    options = dict(pairs=((0, 1), (2, 3)), modalities=4, width=16, heads=2, depth=1)
    masked = AwareMixer(6, 4, GRID, **options, keep_bias=-20.0, pruning="mask", init=Initialiser(0))
    mixed, keep = mix(masked, x)
    assert float(keep.max()) == 0
    np.testing.assert_array_equal(mixed, x)


def test_without_pruning_there_is_no_predictor_and_the_rest_is_the_same():
    """As with a predictor that keeps everything, but for the policy's 1e-6."""
    x = jax.random.normal(jax.random.key(0), SHAPE)
    kept = spread_out(aware(keep_bias=0.0))
    kept.predictor.logits.kernel[...] *= 0
    kept.predictor.logits.bias[...] = jnp.array([20.0, -20.0])
    free = AwareMixer(
        6, 4, GRID, pairs=((0, 1), (2, 3)), modalities=4, width=16, heads=2, depth=1,
        keep_bias=0.0, pruning="none", init=Initialiser(0),
    )  # fmt: skip
    assert not hasattr(free, "predictor")
    nnx.update(free, {k: v for k, v in nnx.state(kept).items() if k != "predictor"})
    mixed, keep = mix(free, x)
    assert keep is None
    np.testing.assert_allclose(mixed, mix(kept, x)[0], atol=1e-4)
