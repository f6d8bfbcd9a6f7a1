"""Multi-head self-attention and the pre-norm MLP, shared by both mixers."""

import jax
import jax.numpy as jnp
from flax import nnx

from masm_jax.models import spatial
from masm_jax.models.layers import Dense, LayerNorm
from masm_jax.models.masking import policy_attention


class SelfAttention(nnx.Module):
    """Pre-norm multi-head self-attention with a residual; the softmax is in float32."""

    def __init__(self, width, heads, *, init):
        self.norm = LayerNorm(width)
        self.qkv = Dense(width, 3 * width, init=init)
        self.out = Dense(width, width, init=init)
        self.heads = heads

    def __call__(self, x, keep=None):
        """Every token of an example attends to all of them.

        Args:
          x: (B, N, width).
          keep: (B, N) of 0 and 1; then N may be this device's part of the tokens (spatial.py). None
            where no token is pruned, and x has them all.
        """
        batch, tokens, width = x.shape
        head = width // self.heads
        qkv = self.qkv(self.norm(x)).reshape(batch, tokens, 3, self.heads, head)
        q, k, v = qkv.transpose(2, 0, 3, 1, 4)  # each (B, heads, N, C)
        q = q * head**-0.5
        if keep is None:
            scores = jnp.einsum("bhqc,bhkc->bhqk", q, k, preferred_element_type=jnp.float32)
            y = jax.nn.softmax(scores).astype(x.dtype) @ v
        else:
            # Keys and values of all devices that share the volume, in any order; own queries.
            rank = jax.lax.axis_index(spatial.AXIS) if spatial.count() > 1 else 0
            k, v, keep = spatial.whole(k, 2), spatial.whole(v, 2), spatial.whole(keep, 1)
            y = policy_attention(q, k, v, keep, jnp.arange(tokens) + rank * tokens)
        return x + self.out(y.swapaxes(1, 2).reshape(batch, tokens, width))


class MLP(nnx.Module):
    """Pre-norm two-layer perceptron with a residual; exact (erf) GELU, as PyTorch."""

    def __init__(self, width, *, init, ratio=2):
        self.norm = LayerNorm(width)
        self.up = Dense(width, ratio * width, init=init)
        self.down = Dense(ratio * width, width, init=init)

    def __call__(self, x):
        return x + self.down(jax.nn.gelu(self.up(self.norm(x)), approximate=False))
