"""What a run is told of before it starts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from masm_jax import sharding
from masm_jax.data.conventions import MODALITIES, REGIONS
from masm_jax.plan import Plan
from masm_jax.state import Network


@pytest.mark.parametrize(("patch", "idle"), [(16, (4, 5, 6)), (32, ())])
def test_levels_of_one_voxel_are_told_of_and_do_learn_nothing(patch, idle, make_config):
    config = make_config(**{"patch": patch, "model.mixers": ()})
    network = Network(config, modalities=MODALITIES, regions=REGIONS)
    params = network.init(0)
    rng = np.random.default_rng(0)
    image = jnp.asarray(rng.standard_normal((1, 4, patch, patch, patch)), jnp.float32)

    def loss(params):
        logits, _ = network.apply(params, image, deep=True)
        return sum(jnp.sum(jnp.sin(part * 10)) for part in logits)

    levels = jax.jit(jax.grad(loss))(params)["encoder"]["levels"]
    still = {
        number + 1
        for number, level in levels.items()
        if all(np.abs(conv["kernel"]).max() < 1e-6 for conv in level.values())
    }
    assert still == set(idle)
    said = Plan(config, network, sharding.make_mesh(jax.devices()[:1]), cases=3).warning()
    if idle:
        assert "config.patch = 16 leaves one voxel at level(s) 4, 5, 6" in said
        assert "expected 32 or more" in said
    else:
        assert said is None
