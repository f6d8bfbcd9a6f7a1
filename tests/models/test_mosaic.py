"""The mosaic against a slow NumPy loop: every pattern, one to six modalities."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from masm_jax.models import mosaic
from masm_jax.models.init import Initialiser

GRID = (4, 5, 6)
LITERAL = {
    "none": lambda d, h, w, m: 0,
    "bayer": lambda d, h, w, m: [[0, 1], [3, 2]][h % 2][w % 2],
    "bayer3d": lambda d, h, w, m: ([[0, 1], [3, 2]][h % 2][w % 2] + 2 * (d % 2)) % 4,
    "tps": lambda d, h, w, m: [[-4, 1, 2], [-1, 0, 3], [-2, -3, 4]][h % 3][w % 3],
    "diagonal": lambda d, h, w, m: d + h + w,
}


def slow_shift(x, pattern, sign=1):
    b, m, depth, height, width, c = x.shape
    y = np.empty_like(x)
    for i in range(m):
        for d in range(depth):
            for h in range(height):
                for w in range(width):
                    offset = sign * LITERAL[pattern](d, h, w, m)
                    y[:, i, d, h, w] = x[:, (i + offset) % m, d, h, w]
    return y


@pytest.mark.parametrize("modalities", range(1, 7))
@pytest.mark.parametrize("pattern", sorted(mosaic.PATTERNS))
def test_equals_the_loop_and_inverts(pattern, modalities):
    x = np.random.default_rng(0).normal(size=(2, modalities, *GRID, 3)).astype(np.float32)
    table = mosaic.offsets(pattern, GRID, modalities)
    assert table.shape == GRID and table.min() >= 0 and table.max() < modalities
    shifted = mosaic.shift(jnp.asarray(x), table)
    np.testing.assert_array_equal(shifted, slow_shift(x, pattern))
    np.testing.assert_array_equal(mosaic.unshift(shifted, table), x)


def test_every_cell_of_bayer_holds_every_modality():
    for pattern, cell, times in (("bayer", (1, 2, 2), 1), ("bayer3d", (2, 2, 2), 2)):
        table = mosaic.offsets(pattern, (4, 4, 4), 4)
        for modality in range(4):
            source = (modality + table) % 4
            for d in range(0, 4, cell[0]):
                for h in range(0, 4, 2):
                    for w in range(0, 4, 2):
                        seen = source[d : d + cell[0], h : h + 2, w : w + 2]
                        assert np.bincount(seen.ravel(), minlength=4).tolist() == [times] * 4


def test_a_list_of_integers_is_a_pattern_too():
    np.testing.assert_array_equal(
        mosaic.offsets([[0, 1], [3, 2]], GRID, 4), mosaic.offsets("bayer", GRID, 4)
    )
    deep = mosaic.offsets([[[0, 1]], [[2, 5]]], (2, 1, 2), 4)
    assert deep.tolist() == [[[0, 1]], [[2, 1]]]


def test_a_random_mosaic_is_that_of_its_seed():
    first = mosaic.offsets("random:3", (4, 4, 4), 4)
    np.testing.assert_array_equal(first[:2, :2, :2], first[2:, 2:, 2:])  # a cell of 2
    assert np.bincount(first[:2, :2, :2].ravel()).tolist() == [2, 2, 2, 2]
    np.testing.assert_array_equal(first, mosaic.offsets("random:3:2", (4, 4, 4), 4))
    assert (first != mosaic.offsets("random:4", (4, 4, 4), 4)).any()
    large = mosaic.offsets("random:3:4", (4, 4, 4), 4)
    assert np.bincount(large.ravel()).tolist() == [16] * 4 and (large != first).any()


@pytest.mark.parametrize("modalities", [2, 4])
def test_a_learnt_mosaic_shifts_as_the_table_it_has_drawn(modalities):
    """With noise and without: a permutation at every place, another for every example."""
    learnt = mosaic.LearntMosaic(2, GRID, modalities, init=Initialiser(0))
    x = jax.random.normal(jax.random.key(0), (2, modalities, *GRID, 3))
    for key in (None, jax.random.split(jax.random.key(1), 2)):
        chosen = learnt(2, key)
        np.testing.assert_allclose(chosen.sum(-1), 1, atol=1e-6)
        tables = np.asarray(chosen.argmax(-1))
        assert (tables[0] == tables[1]).all() == (key is None)
        found = mosaic.shift_chosen(x, chosen)
        for row, table in enumerate(tables):
            np.testing.assert_array_equal(table[:2, :2, :2], table[2:, 2:4, 2:4])
            expected = mosaic.shift(x[row : row + 1], table)[0]
            np.testing.assert_allclose(found[row], expected, atol=1e-5)
        np.testing.assert_allclose(mosaic.shift_chosen(found, chosen, back=True), x, atol=1e-5)


def test_a_learnt_mosaic_goes_where_the_loss_wants_it():
    """A target that is shifted by one everywhere: gradient descent finds the offset 1."""
    learnt = mosaic.LearntMosaic(2, (2, 2, 2), 4, init=Initialiser(0))
    x = jax.random.normal(jax.random.key(0), (8, 4, 2, 2, 2, 3))
    wanted = jnp.roll(x, -1, axis=1)

    graph, params = nnx.split(learnt)

    @jax.jit
    def slope(params, key):
        def loss(params):
            chosen = nnx.merge(graph, params)(len(x), jax.random.split(key, len(x)))
            return ((mosaic.shift_chosen(x, chosen) - wanted) ** 2).mean()

        return jax.grad(loss)(params)

    for step in range(60):
        slopes = slope(params, jax.random.key(step))
        params = jax.tree.map(lambda old, slope: old - 3.0 * slope, params, slopes)
    np.testing.assert_array_equal(nnx.merge(graph, params)(1).argmax(-1), 1)


@pytest.mark.parametrize(
    "pattern", ["bayer2", "random", "random:x", "random:1:0", "learnt:0", [1, 2], [[0.5]]]
)
def test_a_wrong_pattern_is_named(pattern):
    with pytest.raises(ValueError, match="mosaic="):
        mosaic.offsets(pattern, GRID, 4)


def test_gradient_goes_back_the_same_way():
    table = mosaic.offsets("tps", GRID, 4)
    x = jax.random.normal(jax.random.key(0), (1, 4, *GRID, 2))
    weight = jax.random.normal(jax.random.key(1), x.shape)
    gradient = jax.grad(lambda x: (mosaic.shift(x, table) * weight).sum())(x)
    np.testing.assert_array_equal(gradient, mosaic.unshift(weight, table))


@pytest.mark.parametrize("pattern", [*mosaic.PATTERNS, "random:3:3", [[0, 5], [-2, 1]]])
def test_every_mosaic_passes_its_self_check(pattern):
    table = mosaic.verify(pattern, (3, 4, 2), 3)
    np.testing.assert_array_equal(table, mosaic.offsets(pattern, (3, 4, 2), 3))


def test_a_shift_that_loses_patches_is_found(monkeypatch):
    """One place borrows the same modality for all planes; one does not go back."""
    shift = mosaic.shift

    def lossy(x, offsets):
        x = np.array(shift(x, offsets))
        x[:, :, 1, 0, 1] = x[:, :1, 1, 0, 1]
        return x

    monkeypatch.setattr(mosaic, "shift", lossy)
    with pytest.raises(ValueError, match=r"place \(1, 0, 1\) of .* has not each modality once"):
        mosaic.verify("bayer", (2, 2, 2), 4)
    monkeypatch.setattr(mosaic, "shift", shift)
    monkeypatch.setattr(mosaic, "unshift", shift)
    with pytest.raises(ValueError, match=r"place \(0, 0, 1\) of .* other patches after the way"):
        mosaic.verify("bayer", (2, 2, 2), 4)
