"""Keep decisions, and attention with and without a policy, as pure functions.

Source: DynamicViT (Rao et al., NeurIPS 2021), sections 3.2-3.3, which MASM's adaptive token pruning
builds on. Here a pruned token is not dropped but replaced by the aligned modality's
(models/aware.py).
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax

from masm_jax.models import spatial
from masm_jax.models.conv import platform_of_trace
from masm_jax.models.conv_parts import CACHE, equal_parts

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


def attention(q, k, v):
    """Self-attention without a policy: softmax(q k^T) v.

    Args:
      q: (B, heads, Q, C), already scaled.
      k, v: (B, heads, K, C).

    Returns:
      (B, heads, Q, C) in the dtype of ``v``.
    """

    def some(queries, keys):
        (q,), (k, v) = queries, keys
        return (soft_average(attention_scores(q, k), v),), ()

    turns = _turns(q, k)
    (y,), _ = _in_turns(some if turns == 1 else jax.checkpoint(some), turns, (q,), (k, v))
    return y


def policy_attention(q, k, v, keep, first=None):
    """Self-attention in which pruned tokens are no keys, except each for itself.

    DynamicViT's softmax_with_policy: with s = q k^T, P = keep + (1 - keep) I, eps = 1e-6 and N keys
    a = exp(s - max s) P, and the weights of v are (a + eps / N) / (sum a + eps). With every token
    pruned each attends to itself alone, and the gradient reaches ``keep``.

    The same numbers and gradients as written out, with a leaner way back: it keeps one (Q, K)
    array, makes another, turns neither, and holds the policy in none (docs/decisions.md). A CPU
    makes no (Q, K) array that is larger than its cache, as FlashAttention (Dao et al. 2022).

    Args:
      q: (B, heads, Q, C), already scaled.
      k, v: (B, heads, K, C).
      keep: (B, K) float32 of 0 and 1.
      first: () int, place of the first query among the keys; None: the queries are all the keys.

    Returns:
      (B, heads, Q, C) in the dtype of ``v``.
    """
    return _policy(q, k, v, keep, first, _turns(q, k))


# The turns are given: where the way back is traced the platform may be forgotten.
@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _policy(q, k, v, keep, first, turns):
    return _policy_forward(q, k, v, keep, first, turns)[0]


# A query sees the keys that are kept, and its own. A sum over what it sees is therefore one over
# all keys with zeros for the pruned ones, and one more term where its own is pruned. The zeros are
# put into k, v and a column that counts, and no mask into (Q, K) arrays.
def _policy_forward(q, k, v, keep, first, turns):
    counted = _counted(v)
    seen = (keep[:, None, :, None] * counted).astype(v.dtype)
    least = _EPS * counted.mean(2, keepdims=True, dtype=jnp.float32)

    def some(queries, keys):
        (q, own_k, own_v, own_kept), (k, seen, least) = queries, keys
        scores = _product("...qc,...kc->...qk", q, k)
        peak = scores.max(-1, keepdims=True)
        weights, own_weight = jnp.exp(scores - peak).astype(v.dtype), jnp.exp(_dot(q, own_k) - peak)
        sums = _product("...qk,...kc->...qc", weights, seen) + least
        extra = (1 - own_kept) * own_weight
        y = (sums[..., :-1] + extra * own_v) / (sums[..., -1:] + extra)
        return (y.astype(v.dtype), own_weight, sums, weights if turns == 1 else peak), ()

    queries = (q, *_own(q, k, v, keep, first))
    (y, *saved), _ = _in_turns(some, turns, queries, (k, seen, least))
    return y, (q, k, v, keep, first, *saved)


def _policy_backward(turns, saved, gradient):
    q, k, v, keep, first, *by_query = saved
    kept = keep[:, None, :, None]

    def some(queries, keys):
        q, own_weight, sums, weights, gradient, own_k, own_v, own_kept = queries
        k, v, kept_k = keys
        if turns > 1:
            peak = weights
            weights = jnp.exp(_product("...qc,...kc->...qk", q, k) - peak).astype(v.dtype)
        by_kept, count = sums[..., :-1], sums[..., -1:]
        extra = (1 - own_kept) * own_weight
        total = count + extra
        gradient = gradient.astype(jnp.float32) / total
        inner, lean = _dot(gradient, by_kept + extra * own_v) / total, gradient.astype(v.dtype)
        # By the policy; times the policy it is by the scores. For its own key what cancels is left
        # out.
        d = (weights * (_product("...qc,...kc->...qk", lean, v) - inner)).astype(v.dtype)
        own_d = own_weight * _dot(gradient, own_v * count - by_kept) / total
        own_pruned = (1 - own_kept) * own_d
        d_q = _product("...qk,...kc->...qc", d, kept_k) + own_pruned * own_k
        of_own = own_pruned * q, -own_d, extra * gradient
        return (d_q, gradient, *of_own), (_turned(_counted(q), d), _turned(lean, weights))

    queries = (q, *by_query, gradient, *_own(q, k, v, keep, first))
    of_queries, of_keys = _in_turns(some, turns, queries, (k, v, (kept * k).astype(k.dtype)))
    (d_q, gradient, *of_own), (by_key, d_v) = of_queries, of_keys
    own_k, own_keep, own_v = of_own
    d_k = _added(kept * by_key[..., :-1], own_k, first)
    d_v = kept * d_v + _EPS / k.shape[2] * gradient.sum(2, keepdims=True)
    d_v = _added(d_v, own_v, first)
    d_keep = _added(by_key[..., -1:], own_keep, first).sum((1, 3))
    return d_q.astype(q.dtype), d_k.astype(k.dtype), d_v.astype(v.dtype), d_keep, None


_policy.defvjp(_policy_forward, _policy_backward)


def _turns(q, k):
    """In how many turns the queries are taken, so that on a CPU their scores stay in its cache."""
    most = max(1, CACHE // (4 * k.shape[2]))
    return equal_parts(q.shape[2], most) if platform_of_trace() == "cpu" else 1


def _in_turns(some, turns, queries, keys):
    """``some`` queries after the other, head by head.

    Args:
      some: arrays by query and by key -> the same, and of those by key what it adds to them.
      turns: in how many; 1: all at once.
      queries, keys: arrays (B, heads or 1, Q or K, ...).

    Returns:
      (B, heads, Q, ...) and (B, heads, K, ...).
    """
    if turns == 1:
        return some(queries, keys)
    shape = queries[0].shape[:2]

    def each_head(x):
        return jnp.broadcast_to(x, (*shape, *x.shape[2:])).reshape(-1, *x.shape[2:])

    def head(arrays):
        queries, keys = arrays
        queries = [x.reshape(turns, -1, *x.shape[1:]) for x in queries]
        # Of the arrays, since it may be another number on each device.
        zero = 0 * queries[0].reshape(-1)[0].astype(jnp.float32)
        sums = jax.eval_shape(some, [x[0] for x in queries], keys)[1]

        def turn(total, queries):
            by_query, by_key = some(queries, keys)
            return [x + y for x, y in zip(total, by_key)], by_query

        by_key, by_query = lax.scan(turn, [zero + jnp.zeros(x.shape) for x in sums], queries)
        return [x.reshape(-1, *x.shape[2:]) for x in by_query], by_key

    done = lax.map(head, jax.tree.map(each_head, (list(queries), list(keys))))
    return jax.tree.map(lambda x: x.reshape(*shape, *x.shape[1:]), done)


def _product(subscripts, x, y):
    return jnp.einsum(subscripts, x, y, preferred_element_type=jnp.float32)


def _dot(x, y):
    return (x.astype(jnp.float32) * y.astype(jnp.float32)).sum(-1, keepdims=True)


def _counted(x):
    """With a column of ones: a product with it has the sum of the weights too."""
    return jnp.concatenate([x, jnp.ones((*x.shape[:-1], 1), x.dtype)], axis=-1)


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
