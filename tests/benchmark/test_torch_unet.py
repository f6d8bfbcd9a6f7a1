"""The U-Net written in both frameworks: same parameters, same outputs, same count."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from masm_jax.benchmark import counting, jax_side, peers

torch = pytest.importorskip("torch", reason="one of the two needs torch: requirements-test.txt")
from masm_jax.benchmark import torch_side  # noqa: E402
from masm_jax.benchmark.torch_unet import UNet  # noqa: E402

CONFIG = "configs/masm_brats.py"
# Small, with two voxels an edge at the lowest level: torch has no instance norm of a single one.
PATCHES = {"tiny": 32, "base": 64, "full": 64}


@pytest.fixture(autouse=True)
def full_optimisation():
    """Parity is measured on the programs that users run."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


def ours(size):
    entry = peers.Ours("", {"model.size": size, "model.mixers": (), "model.detail": 0})
    return jax_side.network(entry, patch=PATCHES[size], batch=1, dtype="float32", config=CONFIG)


def params_of(network):
    """Parameters of which none is at its start: biases and norms too."""
    random = np.random.default_rng(0)

    def moved(leaf):
        leaf = np.asarray(leaf)
        small = 0.1 * random.standard_normal(leaf.shape, np.float32) if leaf.ndim < 3 else 0
        return leaf + small

    return jax.tree.map(moved, network.init(0))


@pytest.mark.parametrize("size", PATCHES)
def test_outputs_agree(size):
    network = ours(size)
    params, model = params_of(network), UNet(size)
    model.load(params)
    assert sum(p.numel() for p in model.parameters()) == sum(
        leaf.size for leaf in jax.tree.leaves(params)
    )
    x = np.random.default_rng(1).standard_normal((1, 4, *network.patch), np.float32)
    logits, _ = jax.jit(lambda params, x: network.apply(params, x, deep=True))(params, x)
    with torch.no_grad():
        expected = model(torch.from_numpy(x), deep=True)
    assert len(logits) == len(expected)
    for own, other in zip(logits, expected):
        other = np.moveaxis(other.numpy(), 1, -1)
        assert np.abs(own - other).max() < 1e-4 * np.abs(other).max()


@pytest.mark.parametrize("deep", [False, True])
@pytest.mark.parametrize("size", PATCHES)
def test_both_counters_agree_to_the_last_multiplication(size, deep):
    """Forward and backward. On neither side has the first convolution a gradient of its input, as
    scans have none."""
    network, model = ours(size), UNet(size).to("meta")
    params = jax.eval_shape(lambda: network.init(None))
    image = jax.ShapeDtypeStruct((1, 4, *network.patch), jnp.float32)
    x = torch.empty(image.shape, device="meta")

    def total(params, image):
        logits, _ = network.apply(params, image, deep=deep)
        return sum(head.sum() for head in logits)

    def both():
        logits = model(x, deep=deep)
        sum(head.sum() for head in (logits if deep else [logits])).backward()

    def count(function):
        return counting.macs(function, params, image)

    forward, train = count(total), count(jax.grad(total))
    assert counting.total(forward) == torch_side.macs(lambda: model(x, deep=deep))
    assert counting.total(train) == torch_side.macs(both)


def test_the_loss_is_that_of_our_training():
    from masm_jax import losses

    random = np.random.default_rng(0)
    logits = random.standard_normal((2, 4, 5, 6, 3), np.float32)
    targets = (random.random(logits.shape) < 0.3).astype(np.float32)
    terms = losses.segmentation_terms([jnp.asarray(logits)], jnp.asarray(targets), 3)
    expected, _ = losses.segmentation_loss(terms, batch_dice=True)
    first = (torch.from_numpy(np.moveaxis(x, -1, 1).copy()) for x in (logits, targets))
    np.testing.assert_allclose(torch_side.loss(*first), expected, rtol=1e-5)
