"""The mosaic against a slow NumPy loop: every pattern, one to six modalities."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from masm_jax.models import mosaic

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


@pytest.mark.parametrize("pattern", ["bayer2", [1, 2], [[0.5]]])
def test_a_wrong_pattern_is_named(pattern):
    with pytest.raises(ValueError, match="mosaic="):
        mosaic.offsets(pattern, GRID, 4)


def test_gradient_goes_back_the_same_way():
    table = mosaic.offsets("tps", GRID, 4)
    x = jax.random.normal(jax.random.key(0), (1, 4, *GRID, 2))
    weight = jax.random.normal(jax.random.key(1), x.shape)
    gradient = jax.grad(lambda x: (mosaic.shift(x, table) * weight).sum())(x)
    np.testing.assert_array_equal(gradient, mosaic.unshift(weight, table))
