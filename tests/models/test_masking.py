"""Keep decisions and the policy softmax."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from masm_jax.models import masking
from masm_jax.models.conv import traced_for
from masm_jax.models.masking import (
    attention,
    attention_scores,
    policy_attention,
    sample_keep,
    soft_average,
)


def logits(seed=0, shape=(2, 500)):
    return jax.random.normal(jax.random.key(seed), (*shape, 2))


def test_without_a_key_it_is_the_argmax():
    x = logits()
    np.testing.assert_array_equal(sample_keep(x, None, 1.0), np.argmax(x, -1) == 0)


def test_with_a_key_it_is_hard_and_follows_the_softmax():
    x = jnp.broadcast_to(jnp.array([1.0, 0.0]), (1, 40_000, 2))
    keep = sample_keep(x, jax.random.key(0), 0.5)
    assert set(np.unique(keep.round(5))) == {0.0, 1.0}
    # P(keep) = softmax at temperature 1, whatever the temperature: that only shapes the gradient.
    assert float(keep.mean()) == pytest.approx(1 / (1 + np.exp(-1)), abs=0.01)


def test_without_noise_it_is_the_argmax_with_a_gradient():
    x, key = logits(), jax.random.key(0)
    keep = sample_keep(x, key, 0.5, 0.0)
    np.testing.assert_allclose(keep, sample_keep(x, None, 1.0), atol=1e-6)
    gradient = jax.grad(lambda x: sample_keep(x, key, 0.5, 0.0).sum())(x)
    soft = jax.nn.sigmoid((x[..., 0] - x[..., 1]) / 0.5)
    np.testing.assert_allclose(gradient[..., 0], soft * (1 - soft) / 0.5, rtol=1e-4, atol=1e-6)
    half = sample_keep(jnp.broadcast_to(jnp.array([0.5, 0.0]), (1, 40_000, 2)), key, 0.5, 0.5)
    assert float(half.mean()) == pytest.approx(1 / (1 + np.exp(-1)), abs=0.01)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_gradient_is_that_of_the_soft_sample(temperature):
    x, key = logits(), jax.random.key(3)
    weight = jax.random.normal(jax.random.key(4), x.shape[:2])
    gradient = jax.grad(lambda x: (sample_keep(x, key, temperature) * weight).sum())(x)
    noise = np.asarray(jax.random.logistic(key, x.shape[:2]), np.float64)
    margin = np.asarray(x[..., 0] - x[..., 1], np.float64)
    soft = 1 / (1 + np.exp(-(margin + noise) / temperature))
    expected = np.asarray(weight) * soft * (1 - soft) / temperature
    np.testing.assert_allclose(gradient[..., 0], expected, rtol=2e-4, atol=1e-6)
    np.testing.assert_allclose(gradient[..., 1], -expected, rtol=2e-4, atol=1e-6)


def test_an_example_draws_the_same_whatever_batch_it_is_in():
    """A key per example of two rows; gradients too."""
    x = logits(shape=(6, 50))
    keys = jax.random.split(jax.random.key(1), 3)
    weight = jax.random.normal(jax.random.key(4), x.shape[:2])

    def value_and_gradient(x, keys, weight):
        gradient = jax.grad(lambda x: (sample_keep(x, keys, 0.7) * weight).sum())(x)
        return sample_keep(x, keys, 0.7), gradient

    whole = value_and_gradient(x, keys, weight)
    for examples in ([0], [1], [2], [2, 0], [1, 2, 0]):
        rows = np.concatenate([[2 * i, 2 * i + 1] for i in examples])
        part = value_and_gradient(x[rows], keys[np.array(examples)], weight[rows])
        for one, other in zip(part, whole):
            np.testing.assert_array_equal(one, other[rows])
    alone = sample_keep(x[2:4], keys[1], 0.7)  # one key for a batch is as it was
    np.testing.assert_array_equal(alone, whole[0][2:4])
    same = sample_keep(x[:2] * 0, keys[0], 1.0)
    assert not np.array_equal(same[0], same[1])  # the rows of an example draw apart


def test_noise_differs_per_step_under_jit():
    @jax.jit
    def at(step):
        return sample_keep(logits() * 0, jax.random.fold_in(jax.random.key(0), step), 1.0)

    assert not np.array_equal(at(0), at(1))
    np.testing.assert_array_equal(at(1), at(1))


def written_out(scores, keep, eps):
    """The formula in loops, float64."""
    batch, heads, queries, keys = scores.shape
    out = np.empty(scores.shape)
    for b in range(batch):
        for h in range(heads):
            for q in range(queries):
                peak = scores[b, h, q].max()
                allowed = [keep[b, k] + (1 - keep[b, k]) * (q == k) for k in range(keys)]
                a = [np.exp(scores[b, h, q, k] - peak) * allowed[k] for k in range(keys)]
                for k in range(keys):
                    out[b, h, q, k] = (a[k] + eps / keys) / (sum(a) + eps)
    return out


def weights_of(scores, keep):
    """What ``policy_attention`` weighs the values with: as many channels as tokens."""
    one = jnp.broadcast_to(jnp.eye(scores.shape[-1], dtype=scores.dtype), scores.shape)
    return policy_attention(scores, one, one, keep)


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_policy_attention_against_loops(share):
    rng = np.random.default_rng(1)
    scores = rng.normal(size=(2, 3, 7, 7)).astype(np.float32) * 3
    keep = (rng.random((2, 7)) < share).astype(np.float32)
    weights = weights_of(jnp.asarray(scores), jnp.asarray(keep))
    np.testing.assert_allclose(weights, written_out(scores, keep, 1e-6), atol=2e-6)
    np.testing.assert_allclose(weights.sum(-1), 1, atol=1e-5)
    if share == 0:  # all pruned: each token sees itself
        assert (np.argmax(weights, -1) == np.arange(7)).all()
    if share == 1:
        np.testing.assert_allclose(weights, jax.nn.softmax(scores), atol=1e-5)


def test_policy_attention_in_bfloat16_and_with_huge_scores_is_finite():
    scores = jnp.full((1, 1, 4, 4), 3e38, jnp.bfloat16)
    weights = weights_of(scores, jnp.array([[1.0, 0, 0, 1]]))
    assert weights.dtype == jnp.bfloat16
    np.testing.assert_allclose(weights.astype(jnp.float32).sum(-1), 1, atol=0.01)


def same_in_float64(ours, defined, arguments, weight, error):
    """Values, values while training, and gradients of both; ``defined`` has them from autodiff."""

    def value_and_gradients(fn, *arguments):
        y, back = jax.vjp(fn, *arguments)  # y as it is while training
        return [fn(*arguments), y, *back(weight.astype(y.dtype))]

    found = value_and_gradients(ours, *arguments)
    with jax.enable_x64(True):
        double = [jnp.asarray(array, jnp.float64) for array in arguments]
        expected = value_and_gradients(defined, *double)
    for one, other in zip(found, expected, strict=True):
        assert one.shape == other.shape and other.dtype == jnp.float64
        one, other = np.asarray(one, np.float64), np.asarray(other)
        np.testing.assert_allclose(one, other, rtol=error, atol=error * np.abs(other).max())


@pytest.mark.parametrize(
    "dtype, error, at_once",
    [(jnp.float32, 1e-5, 9), (jnp.float32, 1e-5, 3), (jnp.bfloat16, 4e-2, 9)],
)
@pytest.mark.parametrize("queries", [slice(None), slice(2, 6)])
@pytest.mark.parametrize("share", [0.0, 0.6, 1.0])
def test_policy_attention_has_the_gradients_of_its_definition(
    share, queries, dtype, error, at_once, monkeypatch
):
    """In float64: in float32 autodiff loses three digits where all is pruned. Also for some of the
    queries, as where devices share a volume, and in turns."""
    monkeypatch.setattr(masking, "CACHE", at_once * 9 * 4)
    q, k, v = (jax.random.normal(jax.random.key(i), (2, 3, 9, 4)) for i in range(3))
    keep = (jax.random.uniform(jax.random.key(5), (2, 9)) < share).astype(jnp.float32)
    weight, places = jax.random.normal(jax.random.key(6), v.shape), np.arange(9)[queries]
    q, weight = q[:, :, queries], weight[:, :, queries]

    def defined(q, k, v, keep):
        scores, own = q @ k.swapaxes(-1, -2), np.eye(9)[places]
        raw = jnp.exp(scores - jax.lax.stop_gradient(scores.max(-1, keepdims=True)))
        raw = raw * (keep[:, None, None] + (1 - keep[:, None, None]) * own)
        return (raw + 1e-6 / 9) / (raw.sum(-1, keepdims=True) + 1e-6) @ v

    def ours(q, k, v, keep):
        first = None if len(places) == 9 else places[0]
        y = policy_attention(q.astype(dtype), k.astype(dtype), v.astype(dtype), keep, first)
        assert y.dtype == dtype
        return y

    same_in_float64(ours, defined, (q, k, v, keep), weight, error)


@pytest.mark.parametrize("function, masks", [(policy_attention, 1), (attention, 0)])
def test_attention_of_many_tokens_holds_no_array_of_all_their_pairs(function, masks):
    """On a CPU; 4096 tokens have 4096^2 pairs, 67 MB."""
    arguments = [jax.ShapeDtypeStruct((1, 1, 4096, 8), jnp.float32)] * 3
    arguments += [jax.ShapeDtypeStruct((1, 4096), jnp.float32)] * masks
    gradients = jax.grad(lambda *a: function(*a).sum(), range(len(arguments)))
    for program in (function, gradients):
        planned = jax.jit(program).lower(*arguments).compile().memory_analysis()
        assert planned.temp_size_in_bytes < 4096**2 * 4 / 2


def test_the_way_back_takes_the_turns_of_the_way_there(monkeypatch):
    """Where it is traced the platform may be another one."""
    monkeypatch.setattr(masking, "CACHE", 4 * 9 * 3)
    q, k, v, weight = (jax.random.normal(jax.random.key(i), (1, 2, 9, 4)) for i in range(4))
    gradients = []
    for there, back in (("cpu", "cpu"), ("cpu", "tpu"), ("tpu", "cpu")):
        with traced_for(there):
            pull = jax.vjp(lambda *a: policy_attention(*a, jnp.ones((1, 9))), q, k, v)[1]
        with traced_for(back):
            gradients.append(pull(weight))
    for other in gradients[1:]:
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), gradients[0], other)


@pytest.mark.parametrize("at_once", [9, 3])
def test_attention_in_turns_has_the_gradients_of_its_definition(at_once, monkeypatch):
    monkeypatch.setattr(masking, "CACHE", at_once * 9 * 4)
    q, k, v, weight = (jax.random.normal(jax.random.key(i), (2, 3, 9, 4)) for i in range(4))

    def defined(q, k, v):
        return jax.nn.softmax(q @ k.swapaxes(-1, -2)) @ v

    same_in_float64(attention, defined, (q, k, v), weight, 1e-5)


@pytest.mark.parametrize("dtype, error", [(jnp.float32, 1e-5), (jnp.bfloat16, 4e-2)])
def test_attention_with_a_bias_has_the_gradients_of_its_definition(dtype, error):
    """In windows, with a bias that all of them share, as in Swin UNETR; scores far below others."""
    shape = (2, 3, 2, 7, 4)  # examples, windows, heads, tokens, channels
    q, k, v, weight = (jax.random.normal(jax.random.key(i), shape) for i in range(4))
    bias = jax.random.normal(jax.random.key(5), (2, 7, 7)).at[0, 2, 3].set(-100.0)

    def defined(q, k, v, bias):
        return jax.nn.softmax(q @ k.swapaxes(-1, -2) + bias) @ v

    def ours(q, k, v, bias):
        q, k, v = (array.astype(dtype) for array in (q, k, v))
        y = soft_average(attention_scores(q, k) + bias, v)
        assert y.dtype == dtype
        return y

    same_in_float64(ours, defined, (q, k, v, bias), weight, error)


def test_soft_average_of_huge_scores_is_finite():
    y = soft_average(jnp.full((1, 4, 4), 3e38), jnp.arange(8.0).reshape(1, 4, 2))
    np.testing.assert_allclose(y, jnp.broadcast_to(jnp.array([3.0, 4.0]), (1, 4, 2)), atol=1e-6)
