"""Keep decisions, and attention with and without a policy, as pure functions.

Source: DynamicViT (Rao et al., NeurIPS 2021), sections 3.2-3.3, which MASM's adaptive token pruning
builds on. Here a pruned token is not dropped but replaced by the aligned modality's
(models/aware.py).
"""

import math

import jax
import jax.numpy as jnp
from jax import lax

from masm_jax.models import spatial

_EPS = 1e-6  # of DynamicViT's softmax_with_policy


def sample_keep(logits, key, temperature, noise=1.0):
    """Keep or prune every token.

    With a key: a hard Gumbel-Softmax sample whose gradient is that of the soft one
    (straight-through). Without: the arg-max, no noise, no gradient. Ties keep.

    Args:
      logits: (B, N, 2), [..., 0] for keep and [..., 1] for prune.
      key: a JAX PRNG key, or None outside training; or several, (K,), each for B / K rows, so that
        what an example draws does not depend on the batch it is in.
      temperature: of the Gumbel-Softmax, > 0.
      noise: scale of the Gumbel noise; 0 decides as without a key, but has the gradient.

    Returns:
      (B, N) float32 of 0 and 1.
    """
    # Two classes: the softmax is a sigmoid of the difference, and the difference of two Gumbel
    # variables is one logistic variable.
    margin = (logits[..., 0] - logits[..., 1]).astype(jnp.float32)
    if key is None:
        return (margin >= 0).astype(jnp.float32)
    keys = jnp.atleast_1d(key)
    rows = (margin.shape[0] // len(keys), margin.shape[1] * spatial.count())
    drawn = jax.vmap(lambda one: jax.random.logistic(one, rows))(keys)
    noisy = margin + noise * spatial.own(drawn, 2).reshape(margin.shape)
    soft = jax.nn.sigmoid(noisy / temperature)
    hard = (noisy >= 0).astype(jnp.float32)
    return hard + soft - jax.lax.stop_gradient(soft)


def highest(scores, share):
    """Places of the highest scores, as many as ``share`` of all, at least one; a static shape.

    Args:
      scores: (B, N).
      share: in (0, 1].

    Returns:
      (B, ceil(share N)) ints, ascending. Of equal scores the first count.
    """
    count = max(1, math.ceil(share * scores.shape[1] - 1e-9))
    return jnp.sort(jax.lax.top_k(scores, count)[1], axis=-1)


@jax.custom_vjp
def attention_scores(q, k):
    """q k^T, (..., Q, C) and (..., K, C) -> (..., Q, K) float32.

    The way back multiplies in the dtype of ``q``: left to itself JAX would do it in float32.
    """
    return _product("...qc,...kc->...qk", q, k)


def _scores_backward(saved, gradient):
    q, k = saved
    gradient = gradient.astype(q.dtype)
    d_q = _product("...qk,...kc->...qc", gradient, k)
    return d_q.astype(q.dtype), _turned(q, gradient).astype(k.dtype)


attention_scores.defvjp(lambda q, k: (attention_scores(q, k), (q, k)), _scores_backward)


@jax.custom_vjp
def soft_average(scores, v):
    """softmax(scores) v, (..., Q, K) float32 and (..., K, C) -> (..., Q, C) in the dtype of ``v``.

    As lean on its way back as ``policy_attention``. Without one it is left to XLA, which on a CPU
    makes one loop of all of it.
    """
    return jax.nn.softmax(scores).astype(v.dtype) @ v


def _average_forward(scores, v):
    weights = jnp.exp(scores - scores.max(-1, keepdims=True)).astype(v.dtype)
    total = weights.sum(-1, keepdims=True, dtype=jnp.float32)
    y = _product("...qk,...kc->...qc", weights, v) / total
    return y.astype(v.dtype), (v, weights, y, total)


def _average_backward(saved, gradient):
    v, weights, y, total = saved
    gradient = gradient.astype(jnp.float32) / total
    lean = gradient.astype(v.dtype)
    d = weights * (_product("...qc,...kc->...qk", lean, v) - _dot(gradient, y))
    return d, _turned(lean, weights).astype(v.dtype)


soft_average.defvjp(_average_forward, _average_backward)


@jax.custom_vjp
def policy_attention(q, k, v, keep, first=None):
    """Self-attention in which pruned tokens are no keys, except each for itself.

    DynamicViT's softmax_with_policy: with s = q k^T, P = keep + (1 - keep) I, eps = 1e-6 and N keys
    a = exp(s - max s) P, and the weights of v are (a + eps / N) / (sum a + eps). With every token
    pruned each attends to itself alone, and the gradient reaches ``keep``.

    The same numbers and gradients as written out, with a leaner way back: it keeps one (Q, K)
    array, makes another, turns neither, and holds the policy in none (docs/decisions.md).

    Args:
      q: (B, heads, Q, C), already scaled.
      k, v: (B, heads, K, C).
      keep: (B, K) float32 of 0 and 1.
      first: () int, place of the first query among the keys; None: the queries are all the keys.

    Returns:
      (B, heads, Q, C) in the dtype of ``v``.
    """
    return _policy_forward(q, k, v, keep, first)[0]


# A query sees the keys that are kept, and its own. A sum over what it sees is therefore one over
# all keys with zeros for the pruned ones, and one more term where its own is pruned. The zeros are
# put into k, v and a column that counts, and no mask into (Q, K) arrays.
def _policy_forward(q, k, v, keep, first):
    kept, (own_k, own_v, own_kept) = keep[:, None, :, None], _own(q, k, v, keep, first)
    scores = _product("bhqc,bhkc->bhqk", q, k)
    peak = scores.max(-1, keepdims=True)
    weights, own_weight = jnp.exp(scores - peak).astype(v.dtype), jnp.exp(_dot(q, own_k) - peak)
    counted = _counted(v)
    sums = _product("bhqk,bhkc->bhqc", weights, (kept * counted).astype(v.dtype))
    sums = sums + _EPS * counted.mean(2, keepdims=True, dtype=jnp.float32)
    extra = (1 - own_kept) * own_weight
    y = (sums[..., :-1] + extra * own_v) / (sums[..., -1:] + extra)
    return y.astype(v.dtype), (q, k, v, keep, first, weights, own_weight, sums)


def _policy_backward(saved, gradient):
    q, k, v, keep, first, weights, own_weight, sums = saved
    kept, (own_k, own_v, own_kept) = keep[:, None, :, None], _own(q, k, v, keep, first)
    by_kept, count = sums[..., :-1], sums[..., -1:]
    extra = (1 - own_kept) * own_weight
    total = count + extra
    gradient = gradient.astype(jnp.float32) / total
    inner, lean = _dot(gradient, by_kept + extra * own_v) / total, gradient.astype(v.dtype)
    # By the policy; times the policy it is by the scores. For its own key what cancels is left out.
    d = (weights * (_product("bhqc,bhkc->bhqk", lean, v) - inner)).astype(v.dtype)
    own_d = own_weight * _dot(gradient, own_v * count - by_kept) / total
    own_pruned = (1 - own_kept) * own_d

    d_q = _product("bhqk,bhkc->bhqc", d, (kept * k).astype(k.dtype)) + own_pruned * own_k
    by_key = _turned(_counted(q), d)
    d_k = _added(kept * by_key[..., :-1], own_pruned * q, first)
    d_v = _turned(lean, weights)
    d_v = kept * d_v + _EPS / k.shape[2] * gradient.sum(2, keepdims=True)
    d_v = _added(d_v, extra * gradient, first)
    d_keep = _added(by_key[..., -1:], -own_d, first).sum((1, 3))
    return d_q.astype(q.dtype), d_k.astype(k.dtype), d_v.astype(v.dtype), d_keep, None


policy_attention.defvjp(_policy_forward, _policy_backward)


def _product(subscripts, x, y):
    return jnp.einsum(subscripts, x, y, preferred_element_type=jnp.float32)


def _dot(x, y):
    return (x.astype(jnp.float32) * y.astype(jnp.float32)).sum(-1, keepdims=True)


def _counted(x):
    """With a column of ones: a product with it has the sum of the weights too."""
    return jnp.concatenate([x, jnp.ones((*x.shape[:3], 1), x.dtype)], axis=-1)


def _turned(x, weights):
    """weights^T x as (x^T weights)^T, and not the other way round: x is the small one."""
    product = _product("...cq,...qk->...ck", x.swapaxes(-1, -2), weights)
    return lax.optimization_barrier(product).swapaxes(-1, -2)


def _own(q, k, v, keep, first):
    """Of the key that each query is itself: (B, heads, Q, C) of k and v, (B, 1, Q, 1) of keep."""
    keep = keep[:, None, :, None]
    if first is None:
        return k, v, keep
    return [lax.dynamic_slice_in_dim(x, first, q.shape[2], axis=2) for x in (k, v, keep)]


def _added(x, own, first):
    """x (B, heads, K, C) with what comes by the queries' own keys, (B, heads, Q, C)."""
    if first is None:
        return x + own
    own = own + lax.dynamic_slice_in_dim(x, first, own.shape[2], axis=2)
    return lax.dynamic_update_slice_in_dim(x, own, first, axis=2)
