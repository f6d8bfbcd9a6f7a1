"""Multi-head self-attention, the pre-norm MLP, and gates: the blocks of both mixers."""

import jax
import jax.numpy as jnp
from flax import nnx

from masm_jax.models import spatial
from masm_jax.models.layers import Dense, LayerNorm
from masm_jax.models.masking import attention, policy_attention


class SelfAttention(nnx.Module):
    """Pre-norm multi-head self-attention with a residual; the softmax is in float32."""

    def __init__(self, width, heads, *, init, qkv_bias=True):
        self.norm = LayerNorm(width)
        self.qkv = Dense(width, 3 * width, init=init, bias=qkv_bias)
        self.out = Dense(width, width, init=init)
        self.heads = heads

    def __call__(self, x, keep=None, *, cut=False):
        """Every token of an example attends to all of them.

        Args:
          x: (B, N, width).
          keep: (B, N) of 0 and 1; None where no token is pruned.
          cut: N is this device's part of the tokens, where devices share a volume (spatial.py).
        """
        batch, tokens, width = x.shape
        head = width // self.heads
        qkv = self.qkv(self.norm(x)).reshape(batch, tokens, 3, self.heads, head)
        q, k, v = qkv.transpose(2, 0, 3, 1, 4)  # each (B, heads, N, C)
        q = q * head**-0.5
        if cut:  # own queries; keys and values of all
            k, v = spatial.whole(k, 2), spatial.whole(v, 2)
        if keep is None:
            y = attention(q, k, v)
        else:
            first = None
            if cut and spatial.count() > 1:
                first = jax.lax.axis_index(spatial.AXIS) * tokens
                keep = spatial.whole(keep, 1)
            y = policy_attention(q, k, v, keep, first)
        return x + self.out(y.swapaxes(1, 2).reshape(batch, tokens, width))


class MLP(nnx.Module):
    """Pre-norm two-layer perceptron with a residual; exact (erf) GELU, as PyTorch."""

    def __init__(self, width, *, init, ratio=2):
        self.norm = LayerNorm(width)
        self.up = Dense(width, ratio * width, init=init)
        self.down = Dense(ratio * width, width, init=init)

    def __call__(self, x):
        return x + self.down(jax.nn.gelu(self.up(self.norm(x)), approximate=False))


class ChannelGate(nnx.Module):
    """Squeeze and excitation (Hu et al., CVPR 2018): the mean over the tokens gates every channel.

    Starts as the identity: twice a sigmoid of zero.
    """

    def __init__(self, width, *, init, ratio=4):
        self.squeeze = Dense(width, width // ratio, init=init)
        self.excite = Dense(width // ratio, width, init=init, gain=0.0)

    def __call__(self, x):
        """x: (B, N, width) -> the same."""
        mean = x.mean(1, keepdims=True, dtype=jnp.float32).astype(x.dtype)
        return x * 2 * jax.nn.sigmoid(self.excite(jax.nn.relu(self.squeeze(mean))))


class SpatialGate(nnx.Module):
    """A gate for every token, from the token itself (Oktay et al., 2018); starts as identity."""

    def __init__(self, width, *, init):
        self.norm = LayerNorm(width)
        self.hidden = Dense(width, width // 4, init=init)
        self.gate = Dense(width // 4, 1, init=init, gain=0.0)

    def __call__(self, x):
        """x: (B, N, width) -> the same."""
        return x * 2 * jax.nn.sigmoid(self.gate(jax.nn.relu(self.hidden(self.norm(x)))))
