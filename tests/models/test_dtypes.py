"""Of a network in bfloat16 the products are in bfloat16, but for what is meant to be float32."""

import collections

import jax
import jax.numpy as jnp
import pytest

from masm_jax import steps
from masm_jax.benchmark import counting
from masm_jax.data.conventions import MODALITIES, REGIONS
from masm_jax.models.conv import traced_for
from masm_jax.models.layers import RESAMPLE
from masm_jax.state import Network, abstract_state


def products(jaxpr, outer=""):
    """(scope, dtypes of the two sides, product) of every one, of loops once."""
    for eqn in jaxpr.eqns:
        scope = f"{outer}/{eqn.source_info.name_stack}"
        if eqn.primitive.name in ("dot_general", "conv_general_dilated"):
            yield scope, {var.aval.dtype.name for var in eqn.invars}, eqn
        for inner in counting._jaxprs(eqn.params):
            yield from products(inner, scope)


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
@pytest.mark.parametrize(
    "changes",
    [
        {"model.detail": 8},
        {"model.mosaic": "learnt", "model.shift_extras": ("channel", "gate", "window")},
        {"model.backbone": "unetr", "model.mixers": (), "patch": 32},
        {"model.backbone": "swin_unetr", "model.mixers": (), "patch": 32},
    ],
    ids=["masm", "extras", "unetr", "swin_unetr"],
)
def test_no_product_of_the_network_is_in_float32(changes, platform, make_config):
    """Neither forward nor back: a matrix unit for bfloat16 would lie idle."""
    config = make_config(**{"model.dtype": "bfloat16", **changes})
    network = Network(config, modalities=MODALITIES, regions=REGIONS)
    image = jax.ShapeDtypeStruct((1, len(MODALITIES), *network.patch), jnp.float16)
    label = jax.ShapeDtypeStruct((1, *network.patch), jnp.uint8)
    key = jax.eval_shape(lambda: jax.random.key(0))
    arguments = abstract_state(network), {"image": image, "label": label}, key
    with traced_for(platform):
        jaxpr = jax.make_jaxpr(steps.train_step(network))(*arguments).jaxpr
    kinds = collections.Counter()
    for scope, dtypes, eqn in products(jaxpr):
        moved = RESAMPLE in scope
        kinds["moved" if moved else "product"] += 1
        assert moved or dtypes == {"bfloat16"}, (scope, str(eqn))
    assert kinds["product"] > 100
