"""The encoder as a protocol: six maps of UNETR and Swin UNETR, in MASM and as published."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from masm_jax import config as config_lib
from masm_jax.data.conventions import MODALITIES, REGIONS
from masm_jax.models import swin_unetr
from masm_jax.models.init import Initialiser
from masm_jax.models.masm import MASM, divisor
from masm_jax.models.sizes import BACKBONES, size_of
from masm_jax.state import Network, abstract_state

MIXERS = ("aware",) * 5 + ("shift",)
TRANSFORMERS = ("unetr", "swin_unetr")


def config_of(make_config, backbone, **changes):
    given = {"model.backbone": backbone, "patch": 32, "batch_size": 1} | changes
    config = make_config(**given)
    config_lib.validate(config)
    return config


@pytest.mark.parametrize("size", ["tiny", "base"])
@pytest.mark.parametrize("backbone", sorted(BACKBONES))
def test_six_maps_of_the_strides_and_widths_that_the_size_says(backbone, size, make_config):
    config = config_of(make_config, backbone, **{"model.size": size, "patch": 64})
    model = MASM(
        config.model, patch=(64, 64, 64), modalities=MODALITIES, num_regions=3, init=Initialiser(0)
    )
    chosen = size_of(config.model)
    edge = 64 // chosen.stem
    x = jax.ShapeDtypeStruct((4 * edge, edge, edge, chosen.stem**3), jnp.float32)
    maps = jax.eval_shape(lambda x: [plane for plane, _ in model.encoder(x, edge)], x)
    assert len(maps) == 6
    # model.encoder_width of the configs, and from level 2 on, model.encoder_single
    share = 0.5 if backbone == "unet" else 1
    widths = [chosen.widths[0], *(width * share for width in chosen.widths[1:])]
    for found, stride, width in zip(maps, np.cumprod(chosen.strides), widths):
        assert found.shape == (4 * edge // stride, edge // stride, edge // stride, width)


@pytest.mark.parametrize("backbone", TRANSFORMERS)
@pytest.mark.parametrize("mixers", [(), MIXERS], ids=["published", "masm"])
def test_logits_are_as_large_as_the_patch(backbone, mixers, make_config):
    config = config_of(
        make_config, backbone, **{"model.mixers": mixers, "patch": (64, 32, 96)}
    )  # fmt: skip
    network = Network(config, modalities=MODALITIES, regions=REGIONS)
    image = jax.ShapeDtypeStruct((2, 4, 64, 32, 96), jnp.float32)
    logits, keep = jax.eval_shape(
        lambda params, x: network.apply(params, x, deep=True),
        abstract_state(network)["params"], image,
    )  # fmt: skip
    assert logits[0].shape == (2, 64, 32, 96, 3)
    assert len(logits) == (size_of(config.model).deep_heads if mixers else 1)
    assert len(keep) == mixers.count("aware")


def test_the_stride_decides_which_patches_fit(make_config):
    assert divisor(config_of(make_config, "unetr", **{"model.mixers": ()}).model) == 16
    assert divisor(config_of(make_config, "swin_unetr", **{"model.mixers": ()}).model) == 32
    with pytest.raises(ValueError, match="patch = 48: expected a multiple of 32"):
        config_of(make_config, "swin_unetr", patch=48)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model.backbone": "resnet"}, "model.backbone = 'resnet': expected one of unet, unetr"),
        ({"model.size": "full"}, "model.size = 'full': expected one of tiny, base"),
        ({"model.modality_affine": True}, "modality_affine = True: expected False: the norms"),
        ({"mesh.spatial": 2}, "mesh.spatial = 2: expected 1: the transformer"),
        ({"model.backbone": "unet", "model.start_from": "a.pt"}, "start_from = 'a.pt': expected"),
    ],
)
def test_what_does_not_go_together_is_said(changes, message, make_config):
    with pytest.raises(ValueError, match=message):
        config_of(make_config, "unetr", **changes)


def test_windows_shift_and_what_comes_round_is_no_neighbour():
    """A volume of 14 along one axis: two windows; shifted by 3, the last holds both ends."""
    mask = swin_unetr._mask((14, 7, 7), (7, 7, 7), (3, 0, 0))
    assert mask.shape == (2, 343, 343) and not mask[0].any()
    depth = np.arange(343) // 49  # within the window
    apart = (depth[:, None] < 4) != (depth[None] < 4)  # places 10 to 13, and 0 to 2 come round
    np.testing.assert_array_equal(mask[1] != 0, apart)
    x = jnp.arange(2 * 14 * 7 * 14, dtype=jnp.float32).reshape(2, 14, 7, 14, 1)
    cells = swin_unetr._apart(x, (7, 7, 7))
    assert cells.shape == (2, 4, 343, 1)
    np.testing.assert_array_equal(cells[1, 2, :, 0], np.asarray(x[1, 7:, :, :7, 0]).ravel())
    np.testing.assert_array_equal(swin_unetr._together(cells, x.shape, (7, 7, 7)), x)
