"""Blocks against PyTorch with the same weights, at 1e-5."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from masm_jax.models import layers, resample
from masm_jax.models.attention import MLP, SelfAttention
from masm_jax.models.conv import LOWERINGS, conv, traced_for
from masm_jax.models.init import Initialiser
from masm_jax.models.masking import policy_attention

torch = pytest.importorskip("torch", reason="parity needs torch: requirements-test.txt")
TOLERANCE = dict(rtol=1e-5, atol=1e-5)


def normal(seed, *shape, scale=1.0):
    return (np.random.default_rng(seed).normal(size=shape) * scale).astype(np.float32)


def to_torch(x):
    """(B, D, H, W, C) -> (B, C, D, H, W)."""
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(x, -1, 1)))


def from_torch(x):
    return np.moveaxis(x.detach().numpy(), 1, -1)


def fold(x):
    """(B, D, H, W, C) -> planes (B D, H, W, C)."""
    return jnp.asarray(x).reshape(-1, *x.shape[2:])


def unfold(x, batch):
    """The inverse of ``fold``."""
    return x.reshape(batch, -1, *x.shape[1:])


@pytest.mark.parametrize("lowering", LOWERINGS)
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("size", [3, 1])
@pytest.mark.parametrize("shape", [(6, 7, 8), (5, 4, 9), (1, 6, 4)])
def test_convolution_and_its_gradients(lowering, stride, size, shape):
    x, kernel = normal(0, 2, *shape, 3), normal(1, size, size, size, 3, 5, scale=0.2)
    tx = to_torch(x).requires_grad_()
    tk = torch.from_numpy(kernel.transpose(4, 3, 0, 1, 2).copy()).requires_grad_()
    ty = torch.nn.functional.conv3d(tx, tk, stride=stride, padding=size // 2)
    weight = normal(2, *from_torch(ty).shape)
    (ty * to_torch(weight)).sum().backward()

    def loss(x, kernel):
        y = conv(fold(x), kernel, depth=shape[0], stride=stride, lowering=lowering)
        y = unfold(y, 2)
        return (y * weight).sum(), y

    (_, y), (gx, gk) = jax.value_and_grad(loss, (0, 1), has_aux=True)(x, kernel)
    np.testing.assert_allclose(y, from_torch(ty), **TOLERANCE)
    np.testing.assert_allclose(gx, from_torch(tx.grad), **TOLERANCE)
    scale = float(tk.grad.abs().max())
    np.testing.assert_allclose(
        gk / scale, tk.grad.numpy().transpose(2, 3, 4, 1, 0) / scale, **TOLERANCE
    )


@pytest.mark.parametrize("offset", [0.0, 300.0])
def test_conv_norm_block(offset):
    """Convolution, instance norm and leaky ReLU; also where the mean dwarfs the spread."""
    block = layers.ConvNorm(3, 4, init=Initialiser(0), stride=2)
    block.scale[...], block.shift[...] = jnp.asarray(normal(5, 1, 4)), jnp.asarray(normal(6, 1, 4))
    x = normal(7, 2, 7, 6, 10, 3) + offset
    norm = torch.nn.InstanceNorm3d(4, affine=True)
    norm.weight.data = torch.from_numpy(np.array(block.scale[...][0]))
    norm.bias.data = torch.from_numpy(np.array(block.shift[...][0]))
    kernel = torch.from_numpy(np.array(block.kernel[...]).transpose(4, 3, 0, 1, 2).copy())
    y = torch.nn.functional.conv3d(to_torch(x), kernel, stride=2, padding=1)
    expected = torch.nn.functional.leaky_relu(norm(y), 0.01)
    tolerance = TOLERANCE if offset == 0 else dict(rtol=1e-3, atol=1e-3)  # float32 of the sums
    ours = unfold(block(fold(x), 7), 2)
    np.testing.assert_allclose(ours, from_torch(expected), **tolerance)


def test_instance_norm_does_not_cancel():
    """Mean 1000, spread 0.1: E[x^2] - E[x]^2 in float32 would leave noise."""
    x = 1000 * np.array([1, -3]).reshape(2, 1, 1, 1, 1) + normal(0, 2, 10, 12, 14, 2, scale=0.1)
    x = x.astype(np.float32)
    y = layers.instance_norm(fold(x), jnp.ones((1, 2)), jnp.zeros((1, 2)), 10)
    y = unfold(y, 2)
    wide = x.astype(np.float64)
    mean, var = wide.mean((1, 2, 3), keepdims=True), wide.var((1, 2, 3), keepdims=True)
    np.testing.assert_allclose(y, (wide - mean) / np.sqrt(var + 1e-5), atol=5e-3)


@pytest.mark.parametrize("rows, outputs", [(3, 4), (6, 3), (6, 9)])  # 12 by 3: four rows as one
@pytest.mark.parametrize("platform", ["cpu", "tpu"])
def test_dense_takes_parts_side_by_side(platform, rows, outputs):
    dense = layers.Dense(5, outputs, init=Initialiser(0))
    dense.bias[...] = np.arange(float(outputs))
    x, dy = normal(0, 2, rows, 5), normal(1, 2, rows, outputs)
    kernel = np.asarray(dense.kernel[...])
    expected = x @ kernel + np.arange(outputs)
    with traced_for(platform):  # a CPU does not put them so
        np.testing.assert_allclose(dense(x[..., :2], x[..., 2:3], x[..., 3:]), expected, atol=1e-5)
        y, back = jax.vjp(dense, x)
        _, by_kernel = jax.vjp(lambda kernel: layers.product(x.reshape(-1, 5), kernel), kernel)
    np.testing.assert_allclose(y, expected, atol=1e-5)
    np.testing.assert_allclose(back(dy)[0], dy @ kernel.T, atol=1e-5)
    dy = dy.reshape(-1, outputs)
    np.testing.assert_allclose(by_kernel(dy)[0], x.reshape(-1, 5).T @ dy, atol=1e-5)


def test_norm_per_modality():
    block = layers.ConvNorm(2, 3, init=Initialiser(0), groups=2)
    x = fold(normal(1, 4, 3, 4, 5, 2))  # B = 2, M = 2, modality slowest
    before = unfold(block(x, 3), 4)
    block.shift[...] = jnp.asarray(block.shift[...]).at[1].set(5.0)
    after = unfold(block(x, 3), 4)
    np.testing.assert_array_equal(before[:2], after[:2])
    assert (np.asarray(after[2:]) > np.asarray(before[2:])).all()


def test_depth_to_space_is_a_transposed_convolution():
    """dense + depth-to-space against ConvTranspose3d of kernel 2 and stride 2, bias included."""
    x, kernel, bias = normal(0, 2, 3, 4, 5, 6), normal(1, 6, 2, 2, 2, 3), normal(2, 3)
    up = torch.nn.ConvTranspose3d(6, 3, 2, stride=2)
    up.weight.data = torch.from_numpy(kernel.transpose(0, 4, 1, 2, 3).copy())
    up.bias.data = torch.from_numpy(bias)
    y = layers.depth_to_space(fold(x) @ kernel.reshape(6, 24) + np.tile(bias, 8), 2)
    np.testing.assert_allclose(unfold(y, 2), from_torch(up(to_torch(x))), **TOLERANCE)


def test_space_to_depth_is_the_inverse():
    x = fold(normal(0, 2, 4, 6, 8, 3))
    np.testing.assert_array_equal(layers.depth_to_space(layers.space_to_depth(x, 2), 2), x)


@pytest.mark.parametrize("factor", [1, 2, 3])
def test_the_moves_of_a_tpu_are_the_same_to_the_bit(factor):
    x = np.random.default_rng(1).standard_normal((4, 3, 5, factor**3 * 2), np.float32)
    y = layers.depth_to_space(x, factor)
    with traced_for("tpu"):
        np.testing.assert_array_equal(layers.depth_to_space(x, factor), y)
        np.testing.assert_array_equal(layers.space_to_depth(y, factor), x)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("factor", [1, 2, 4])
def test_the_stem_is_space_to_depth_to_the_bit(factor, dtype):
    x = normal(0, 2, 4, 8, 12, 1) * np.logspace(-30, 30, 12, dtype=np.float32)[:, None]
    x = fold(x).astype(dtype)
    expected = layers.space_to_depth(x, factor)
    y = jax.jit(layers.stem, static_argnums=1)(x[..., 0], factor)
    assert y.dtype == x.dtype and y.shape == expected.shape
    assert np.asarray(y).tobytes() == np.asarray(expected).tobytes()
    back = np.asarray(x[..., 0]).reshape(8 // factor, factor, 8 // factor, factor, -1, factor)
    back = back.transpose(0, 2, 4, 1, 3, 5).reshape(expected.shape)  # by NumPy: (fd, fh, fw)
    assert np.asarray(y).tobytes() == back.tobytes()


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
@pytest.mark.parametrize("factor", [1, 2, 4])
def test_pooling_and_upsampling(factor, platform):
    x = normal(0, 2, 8, 4, 12, 3)
    with traced_for(platform):  # a CPU has a form of its own
        pooled = unfold(resample.average_pool(fold(x), factor), 2)
        low = resample.average_pool(fold(x).astype(jnp.bfloat16), factor)
    expected = from_torch(torch.nn.functional.avg_pool3d(to_torch(x), factor))
    np.testing.assert_allclose(pooled, expected, **TOLERANCE)
    assert low.dtype == jnp.bfloat16  # and summed in float32: what is in it is rounded twice
    np.testing.assert_allclose(unfold(low.astype(jnp.float32), 2), expected, rtol=0.01, atol=0.01)
    smooth = torch.nn.functional.interpolate(
        to_torch(x), scale_factor=factor, mode="trilinear", align_corners=False
    )
    upsampled = resample.upsample(fold(x), factor, 8)
    np.testing.assert_allclose(unfold(upsampled, 2), from_torch(smooth), **TOLERANCE)


def test_layer_norm():
    layer = layers.LayerNorm(8)
    layer.scale[...], layer.shift[...] = jnp.asarray(normal(1, 8)), jnp.asarray(normal(2, 8))
    x = normal(0, 3, 5, 8)
    expected = torch.nn.functional.layer_norm(
        torch.from_numpy(x),
        (8,),
        torch.from_numpy(np.array(layer.scale[...])),
        torch.from_numpy(np.array(layer.shift[...])),
    )
    np.testing.assert_allclose(layer(jnp.asarray(x)), expected.numpy(), **TOLERANCE)


@pytest.mark.parametrize("masked", [False, True])
def test_attention(masked):
    """Against torch.nn.MultiheadAttention; masked with keys barred except for the token itself."""
    block = SelfAttention(16, 4, init=Initialiser(0))
    x = normal(3, 2, 9, 16)
    keep = (np.random.default_rng(0).random((2, 9)) < 0.5).astype(np.float32)
    reference = torch.nn.MultiheadAttention(16, 4, batch_first=True)
    reference.in_proj_weight.data = torch.from_numpy(np.array(block.qkv.kernel[...]).T.copy())
    reference.in_proj_bias.data = torch.from_numpy(np.array(block.qkv.bias[...]))
    reference.out_proj.weight.data = torch.from_numpy(np.array(block.out.kernel[...]).T.copy())
    reference.out_proj.bias.data = torch.from_numpy(np.array(block.out.bias[...]))
    tx = torch.from_numpy(x)
    normed = torch.nn.functional.layer_norm(tx, (16,))
    barred = None
    if masked:
        allowed = keep[:, None, :] + (1 - keep[:, None, :]) * np.eye(9)
        barred = torch.from_numpy(np.repeat(allowed == 0, 4, axis=0))
    y, _ = reference(normed, normed, normed, attn_mask=barred, need_weights=False)
    ours = block(jnp.asarray(x), jnp.asarray(keep) if masked else None)
    np.testing.assert_allclose(ours, (tx + y).detach().numpy(), rtol=1e-5, atol=2e-5)


def test_mlp():
    block = MLP(8, init=Initialiser(0))
    x = normal(0, 2, 5, 8)
    up = [torch.from_numpy(np.array(p[...])) for p in (block.up.kernel, block.up.bias)]
    down = torch.from_numpy(np.array(block.down.kernel[...]))
    hidden = torch.nn.functional.layer_norm(torch.from_numpy(x), (8,)) @ up[0] + up[1]
    expected = torch.from_numpy(x) + torch.nn.functional.gelu(hidden) @ down
    np.testing.assert_allclose(block(jnp.asarray(x)), expected.numpy(), **TOLERANCE)


def test_policy_attention_equals_dynamicvits():
    """The same numbers as the published formula in torch (DynamicViT, softmax_with_policy)."""
    scores, keep = normal(0, 2, 3, 6, 6), (normal(1, 2, 6) > 0).astype(np.float32)
    ts, tk = torch.from_numpy(scores), torch.from_numpy(keep)
    policy = tk.reshape(2, 1, 1, 6)
    policy = policy + (1 - policy) * torch.eye(6).reshape(1, 1, 6, 6)
    a = (ts - ts.max(-1, keepdim=True)[0]).exp() * policy
    expected = (a + 1e-6 / 6) / (a.sum(-1, keepdim=True) + 1e-6)
    one = jnp.broadcast_to(jnp.eye(6), scores.shape)  # as many channels as tokens: the weights
    ours = policy_attention(jnp.asarray(scores), one, one, jnp.asarray(keep))
    np.testing.assert_allclose(ours, expected.numpy(), **TOLERANCE)
