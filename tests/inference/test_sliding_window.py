"""Tiles, their weights, and a whole volume through networks whose answer is known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from masm_jax.inference.sliding_window import SMALLEST_WEIGHT, gaussian, predict, tile_starts


@jax.jit
def first_two(tiles):
    """(b, M, p, p, p) -> (b, p, p, p, 2): the logits are the first two modalities."""
    return jnp.moveaxis(tiles[:, :2], 1, -1)


def _image(shape, *, modalities=3, seed=0, dtype=np.float32):
    image = np.random.default_rng(seed).normal(size=(modalities, *shape)).astype(dtype)
    image[image == 0] = 1
    return image


def _sigmoid(x):
    return 1 / (1 + np.exp(-x.astype(np.float64)))


def test_tile_starts_worked_example():
    assert tile_starts(110, 64, 0.5) == [0, 23, 46]


@pytest.mark.parametrize("overlap", [0.0, 0.25, 0.5, 0.625, 0.9])
@pytest.mark.parametrize("patch", [1, 5, 16])
def test_tiles_reach_both_borders_and_overlap_enough(patch, overlap):
    for size in range(patch, 4 * patch + 3):
        starts = tile_starts(size, patch, overlap)
        assert starts[0] == 0 and starts[-1] == size - patch
        steps = np.diff(starts)
        assert (steps > 0).all()
        if len(steps):
            assert steps.max() <= max(1, np.ceil(patch * (1 - overlap)))
            assert steps.max() - steps.min() <= 1  # evenly


def test_gaussian_is_symmetric_and_nowhere_zero():
    for patch in ((1,) * 3, (8,) * 3, (15,) * 3, (64,) * 3, (5, 8, 12), (1, 30, 2)):
        weights = gaussian(patch)
        assert weights.dtype == np.float32 and weights.shape == patch
        assert weights.max() == 1 and weights.min() >= np.float32(SMALLEST_WEIGHT)
        assert np.array_equal(weights, weights[::-1, ::-1, ::-1])
    weights = gaussian((65, 65, 33))  # sigma = 65 / 8 about voxel 32, 33 / 8 about voxel 16
    assert weights[32 + 8, 32, 16] == pytest.approx(np.exp(-0.5 * (8 * 8 / 65) ** 2), rel=1e-6)
    assert weights[32, 32 - 8, 16] == pytest.approx(np.exp(-0.5 * (8 * 8 / 65) ** 2), rel=1e-6)
    assert weights[32, 32, 16 + 8] == pytest.approx(np.exp(-0.5 * (8 * 8 / 33) ** 2), rel=1e-6)


@pytest.mark.parametrize(
    ("shape", "patch", "overlap"),
    [
        ((8, 8, 8), 8, 0.5),  # one tile
        ((5, 8, 3), 8, 0.5),  # smaller than the patch
        ((16, 12, 20), 8, 0.5),  # divisible
        ((11, 17, 9), 8, 0.5),  # not divisible
        ((4, 19, 9), 8, 0.25),  # smaller along one axis, larger along another
        ((13, 10, 8), 5, 0.0),
        ((11, 17, 9), (8, 5, 12), 0.5),  # no cube: tiled along two axes, padded along the third
        ((16, 3, 9), [4, 6, 9], 0.25),
    ],
)
@pytest.mark.parametrize("flips", [(), (1,), (0, 1, 2)])
def test_a_network_that_returns_its_input_gives_its_sigmoid(shape, patch, overlap, flips):
    image = _image(shape)
    result = predict(
        first_two, image, patch=patch, num_regions=2, overlap=overlap, batch=3, flips=flips
    )
    assert result.dtype == np.float32 and result.shape == (2, *shape)
    np.testing.assert_allclose(result, _sigmoid(image[:2]), atol=1e-6, rtol=0)


def test_half_precision_memory_mapped_image(tmp_path):
    image = _image((9, 10, 11), dtype=np.float16)
    np.save(tmp_path / "image.npy", image)
    mapped = np.load(tmp_path / "image.npy", mmap_mode="r")
    result = predict(first_two, mapped, patch=8, num_regions=2)
    np.testing.assert_allclose(result, _sigmoid(image[:2]), atol=1e-6, rtol=0)


def test_bfloat16_logits_are_averaged_in_float32():
    logits = jax.jit(lambda tiles: first_two(tiles).astype(jnp.bfloat16))
    image = _image((9, 9, 9))
    result = predict(logits, image, patch=8, num_regions=2)
    expected = _sigmoid(np.asarray(jnp.asarray(image[:2]).astype(jnp.bfloat16), np.float32))
    np.testing.assert_allclose(result, expected, atol=1e-6, rtol=0)


def test_flips_average_every_combination():
    # Logits that depend on the place within the tile only: the average is its mirrored mean.
    ramp = np.linspace(-2, 2, 6, dtype=np.float32)

    @jax.jit
    def place(tiles):
        grid = ramp[:, None, None] + 0.5 * ramp[:, None] + 0 * ramp
        return jnp.broadcast_to(grid, (tiles.shape[0], 6, 6, 6))[..., None]

    image = np.ones((1, 6, 6, 6), np.float32)
    plain = predict(place, image, patch=6, num_regions=1)[0]
    assert plain[0, 0, 0] < plain[5, 0, 0]
    for flips in ((0,), (1, 0), (0, 1, 2)):
        expected = np.zeros((6, 6, 6))
        for signs in np.ndindex(*(2 for _ in flips)):
            expected += np.flip(plain, [axis for axis, sign in zip(flips, signs) if sign])
        expected /= 2 ** len(flips)
        result = predict(place, image, patch=6, num_regions=1, flips=flips)[0]
        np.testing.assert_allclose(result, expected, atol=1e-6)


def test_overlapping_tiles_are_averaged_with_gaussian_weights():
    # The logit is the mean of the tile; tiles at 0 (all 1) and at 4 (half 1, half 3: mean 2).
    @jax.jit
    def mean(tiles):
        average = tiles[:, 0].mean(axis=(1, 2, 3), keepdims=True)
        return jnp.broadcast_to(average, (len(tiles), 8, 8, 8))[..., None]

    image = np.ones((1, 12, 8, 8), np.float32)
    image[:, 8:] = 3
    result = predict(mean, image, patch=8, num_regions=1)[0]
    weights = gaussian((8, 8, 8))
    first, second = _sigmoid(np.array(1.0)), _sigmoid(np.array(2.0))
    np.testing.assert_allclose(result[:4], first, atol=1e-6)
    np.testing.assert_allclose(result[8:], second, atol=1e-6)
    a, b = weights[4:], weights[:4]
    np.testing.assert_allclose(result[4:8], (a * first + b * second) / (a + b), atol=1e-6)


def test_tiles_of_three_edges_are_weighted_along_each():
    """The logit is the mean of the tile; along W alone there are two, at 0 and at 2."""

    @jax.jit
    def mean(tiles):
        average = tiles[:, 0].mean(axis=(1, 2, 3), keepdims=True)
        return jnp.broadcast_to(average, (len(tiles), 8, 6, 4))[..., None]

    image = np.ones((1, 8, 6, 6), np.float32)
    image[..., 4:] = 3
    for edges in ((8, 6, 4), np.array([8, 6, 4])):
        result = predict(mean, image, patch=edges, num_regions=1)[0]
        first, second = _sigmoid(np.array(1.0)), _sigmoid(np.array(2.0))
        np.testing.assert_allclose(result[..., :2], first, atol=1e-6)
        np.testing.assert_allclose(result[..., 4:], second, atol=1e-6)
        a, b = gaussian((8, 6, 4))[..., 2:], gaussian((8, 6, 4))[..., :2]
        np.testing.assert_allclose(result[..., 2:4], (a * first + b * second) / (a + b), atol=1e-6)


def test_compiled_once_for_all_volumes_and_flips():
    traces = []

    @jax.jit
    def apply(tiles):
        traces.append(tiles.shape)
        return first_two(tiles)

    for shape in ((8, 8, 8), (11, 9, 20), (3, 8, 8)):
        predict(apply, _image(shape), patch=8, num_regions=2, batch=4, flips=(0, 1))
    assert traces == [(4, 3, 8, 8, 8)]


def test_tiles_without_brain_are_not_computed_and_give_zero():
    calls = []

    def apply(tiles):
        calls.append(np.asarray(tiles))
        return first_two(tiles)

    image = np.zeros((3, 24, 8, 8), np.float32)
    image[1, 20, 4, 4] = 5.0  # seen by the last of the tiles at 0, 4, 8, 12, 16 alone
    result = predict(apply, image, patch=8, num_regions=2, batch=1)
    assert len(calls) == 1
    assert not result[:, :16].any()
    np.testing.assert_allclose(result[:, 16:], _sigmoid(image[:2, 16:]), atol=1e-6)
    calls.clear()
    assert not predict(apply, np.zeros_like(image), patch=8, num_regions=2).any()
    assert not calls


def test_last_batch_is_filled_up_and_progress_counts_tiles():
    shapes, seen = [], []

    def apply(tiles):
        shapes.append(tiles.shape)
        return first_two(tiles)

    image = _image((8, 8, 24))  # 5 tiles
    predict(
        apply, image, patch=8, num_regions=2, batch=3, progress=lambda *count: seen.append(count)
    )
    assert shapes == [(3, 3, 8, 8, 8)] * 2
    assert seen == [(3, 5), (5, 5)]


def test_at_most_two_batches_are_alive_and_the_next_starts_before_the_last_is_fetched():
    before = sum(a.size for a in jax.live_arrays())
    alive, order = [], []

    def apply(tiles):
        order.append("dispatch")
        alive.append(sum(a.size for a in jax.live_arrays()) - before)
        return first_two(tiles)

    image = _image((8, 8, 80), modalities=4)  # 19 tiles
    predict(
        apply, image, patch=8, num_regions=2, batch=1, progress=lambda *_: order.append("fetch")
    )
    tile = 8**3
    # The tiles of this batch (4), the votes of the one before (2), the weights (1); the tiles of
    # the one before may not be collected yet.
    assert max(alive) <= (2 * 4 + 2 * 2 + 1) * tile
    assert order[:5] == ["dispatch", "dispatch", "fetch", "dispatch", "fetch"]
    assert order.count("dispatch") == order.count("fetch") == 19


def test_network_spread_over_devices():
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    over_batch = jax.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    image = _image((9, 8, 16))
    result = predict(
        lambda tiles: first_two(jax.device_put(tiles, over_batch)),
        image, patch=8, num_regions=2, batch=4, flips=(0,),
    )  # fmt: skip
    np.testing.assert_allclose(result, _sigmoid(image[:2]), atol=1e-6, rtol=0)


def test_no_implicit_transfers():
    image = _image((9, 8, 8))
    predict(first_two, image, patch=8, num_regions=2, flips=(0,))  # compiled outside the guard
    with jax.transfer_guard("disallow"):
        predict(first_two, image, patch=8, num_regions=2, flips=(0,))


def test_what_does_not_fit_is_refused():
    image = _image((8, 8, 8))
    with pytest.raises(ValueError, match="num_regions"):
        predict(first_two, image, patch=8, num_regions=3)
    with pytest.raises(ValueError, match="overlap is 1.0"):
        predict(first_two, image, patch=8, num_regions=2, overlap=1.0)
    with pytest.raises(ValueError, match="axes out of 0, 1, 2"):
        predict(first_two, image, patch=8, num_regions=2, flips=(3,))
    with pytest.raises(ValueError, match=r"expected \(M, D, H, W\)"):
        predict(first_two, image[0], patch=8, num_regions=2)
    with pytest.raises(ValueError, match="batch 0"):
        predict(first_two, image, patch=8, num_regions=2, batch=0)
    with pytest.raises(ValueError, match=r"patch is \(8, 0, 8\)"):
        predict(first_two, image, patch=(8, 0, 8), num_regions=2)
