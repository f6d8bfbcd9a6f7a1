"""Keep decisions and attention under a policy, as pure functions.

Source: DynamicViT (Rao et al., NeurIPS 2021), sections 3.2-3.3, which MASM's adaptive token pruning
builds on. Here a pruned token is not dropped but replaced by the aligned modality's
(models/aware.py).
"""

import math

import jax
import jax.numpy as jnp

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


def policy_softmax(scores, keep, eps=_EPS, own=None):
    """Softmax in which pruned tokens are no keys, except each for itself.

    P = keep + (1 - keep) * I; a = exp(s - max s) * P; (a + eps / N) / (sum a + eps): with every
    token pruned each attends to itself alone, and the gradient reaches ``keep``.

    Args:
      scores: (B, heads, Q, K) attention logits.
      keep: (B, K) of 0 and 1 (or relaxed).
      eps: of DynamicViT.
      own: (Q,) place of each query among the keys; None: its place among the queries.

    Returns:
      (B, heads, Q, K) float32 weights; every row sums to 1.
    """
    queries, keys = scores.shape[-2:]
    keep = keep.astype(jnp.float32)[:, None, None, :]
    policy = keep + (1 - keep) * _itself(queries, keys, own)
    scores = scores.astype(jnp.float32)
    peak = jax.lax.stop_gradient(scores.max(-1, keepdims=True))
    weights = jnp.exp(scores - peak) * policy
    return (weights + eps / keys) / (weights.sum(-1, keepdims=True) + eps)


def _itself(queries, keys, own):
    """(Q, K) float32: 1 where the key is the query's own token."""
    own = jnp.arange(queries) if own is None else own
    return (own[:, None] == jnp.arange(keys)).astype(jnp.float32)


@jax.custom_vjp
def policy_attention(q, k, v, keep, own=None):
    """Self-attention under a policy: ``policy_softmax(q k^T, keep) v``.

    The same numbers and gradients as written out, with a leaner way back: it keeps q, k and v and
    computes the weights again, so that no (N, N) array outlives the forward pass, and no large
    array is transposed (1.7 times faster on CPU at N = 1024, docs/decisions.md).

    Args:
      q: (B, heads, Q, C), already scaled.
      k, v: (B, heads, K, C).
      keep: (B, K) float32 of 0 and 1.
      own: (Q,) ints, as in ``policy_softmax``.

    Returns:
      (B, heads, Q, C) in the dtype of ``v``.
    """
    return _policy_forward(q, k, v, keep, own)[0]


def _policy_forward(q, k, v, keep, own):
    scores = jnp.einsum("bhqc,bhkc->bhqk", q, k, preferred_element_type=jnp.float32)
    weights = policy_softmax(scores, keep, _EPS, own)
    return weights.astype(v.dtype) @ v, (q, k, v, keep, own)


def _policy_backward(saved, gradient):
    q, k, v, keep, own = saved
    tokens, dtype = k.shape[2], v.dtype
    scores = jnp.einsum("bhqc,bhkc->bhqk", q, k, preferred_element_type=jnp.float32)
    others = 1 - _itself(q.shape[2], tokens, own)
    policy = 1 - (1 - keep[:, None, None, :]) * others
    raw = jnp.exp(scores - scores.max(-1, keepdims=True))
    total = (raw * policy).sum(-1, keepdims=True) + _EPS
    weights = (raw * policy + _EPS / tokens) / total

    d_weights = jnp.einsum("bhqc,bhkc->bhqk", gradient, v, preferred_element_type=jnp.float32)
    inner = (d_weights * weights).sum(-1, keepdims=True)
    d_policy = (d_weights - inner) / total * raw
    d_scores = (d_policy * policy).astype(dtype)
    d_keep = (d_policy * others).sum((1, 2))
    # x^T y as (y^T x)^T: the small side is transposed, not the (N, N) one.
    d_v = _transpose(_transpose(gradient) @ weights.astype(dtype))
    d_k = _transpose(_transpose(q) @ d_scores)
    return d_scores @ k, d_k, d_v, d_keep, None


def _transpose(x):
    return x.swapaxes(-1, -2)


policy_attention.defvjp(_policy_forward, _policy_backward)
