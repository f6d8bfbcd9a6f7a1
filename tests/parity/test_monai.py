"""UNETR and Swin UNETR against MONAI's, with the same weights."""

import copy
import functools

import jax
import numpy as np
import pytest

from configs import masm_brats
from masm_jax.models import from_monai, residual
from masm_jax.state import Network

torch = pytest.importorskip("torch")
nets = pytest.importorskip("monai.networks.nets", reason="needs MONAI (requirements-bench.txt)")
MODALITIES = ("t1", "t1ce", "t2", "flair")
EDGE = {"unetr": (32, 16, 48), "swin_unetr": (64, 32, 32)}  # Swin: 32 tokens are padded to 35


@functools.cache
def monai(backbone, channels=4):
    torch.manual_seed(0)
    if backbone == "unetr":
        built = nets.UNETR(
            channels, 3, EDGE[backbone], feature_size=8, hidden_size=96, mlp_dim=384, num_heads=4
        )
    else:
        built = nets.SwinUNETR(channels, 3, feature_size=12)
    return built.eval()


def ours(backbone, **changes):
    config = masm_brats.get_config()
    given = {"model.backbone": backbone, "model.size": "tiny", "patch": EDGE[backbone]}
    given |= {"model.mixers": (), "model.dtype": "float32"}
    config.update_from_flattened_dict(given | changes)
    return Network(config, modalities=MODALITIES, regions={"WT": (1,), "TC": (2,), "ET": (3,)})


def arrays(network):
    return {name: value.numpy() for name, value in network.state_dict().items()}


@pytest.mark.parametrize("backbone", list(EDGE))
def test_the_same_weights_give_the_same_logits(backbone):
    network, theirs = ours(backbone), monai(backbone)
    params, report = from_monai.convert(arrays(theirs), network.init(0), backbone)
    assert not report.unused and not report.missing and not report.changed
    x = np.random.default_rng(0).standard_normal((2, 4, *EDGE[backbone]), np.float32)
    found = jax.jit(lambda params, x: network.apply(params, x)[0][0])(params, x)
    with torch.no_grad():
        wanted = theirs(torch.tensor(x)).moveaxis(1, -1).numpy()
    assert found.shape == wanted.shape
    assert np.abs(found - wanted).max() <= 1e-4 * np.abs(wanted).max()


def test_the_same_weights_give_the_same_gradients(monkeypatch):
    """Without the kink of the leaky ReLU: rounding decides on which side of it a voxel is."""
    backbone = "unetr"
    network, theirs = ours(backbone), copy.deepcopy(monai(backbone))
    monkeypatch.setattr(residual, "LEAKY_SLOPE", 1.0)
    for module in theirs.modules():
        if isinstance(module, torch.nn.LeakyReLU):
            module.negative_slope = 1.0
    params = from_monai.convert(arrays(theirs), network.init(0), backbone)[0]
    x = np.random.default_rng(0).standard_normal((1, 4, *EDGE[backbone]), np.float32)
    weight = np.random.default_rng(1).standard_normal((1, *EDGE[backbone], 3), np.float32)

    def total(x):
        return (network.apply(params, x)[0][0] * weight).sum()

    found = np.asarray(jax.jit(jax.grad(total))(x))
    given = torch.tensor(x, requires_grad=True)
    (theirs(given).moveaxis(1, -1) * torch.tensor(weight)).sum().backward()
    wanted = given.grad.numpy()
    assert np.abs(found - wanted).max() <= 1e-4 * np.abs(wanted).max()


@pytest.mark.parametrize("backbone", list(EDGE))
def test_the_shared_encoder_takes_the_sum_over_the_first_layers_inputs(backbone):
    """Four channels that hold the same volume and a sum of their weights: the same features."""
    mixers = ("concat",) * 6
    network, theirs = ours(backbone, **{"model.mixers": mixers}), monai(backbone)
    started = network.init(0)
    params, report = from_monai.convert(arrays(theirs), started, backbone)
    assert report.changed and all("4 input channels" in how for how in report.changed.values())
    assert any("decoder" in name for name in report.unused)  # MASM's own decoder is another
    plain = ours(backbone)
    whole = from_monai.convert(arrays(theirs), plain.init(0), backbone)[0]
    kernel = "patch_embedding" if backbone == "unetr" else "patch_embed"
    taken, given = (tree["encoder"][kernel]["kernel"] for tree in (params, whole))
    np.testing.assert_allclose(taken, given.reshape(len(taken), 4, -1).sum(1), rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(params["fuse"][0]["kernel"], started["fuse"][0]["kernel"])


def test_a_file_is_read_and_what_does_not_fit_is_named(tmp_path):
    theirs = monai("swin_unetr")
    torch.save({"state_dict": theirs.state_dict()}, tmp_path / "swin.pt")
    found = from_monai.read(tmp_path / "swin.pt")
    np.savez(tmp_path / "swin.npz", **found)
    again = from_monai.read(tmp_path / "swin.npz")
    assert found.keys() == again.keys() and all((found[k] == again[k]).all() for k in found)
    network = ours("swin_unetr")
    wrong = found | {"out.conv.conv.weight": np.zeros((5, 12, 1, 1, 1)), "head.weight": np.zeros(3)}
    del wrong["decoder1.transp_conv.conv.weight"]
    report = from_monai.convert(wrong, network.init(None), "swin_unetr")[1]
    assert report.unused == {
        "out.conv.conv.weight": "is (12, 5), ours is (12, 3)",
        "head.weight": "not part of this network",
    }
    assert report.missing == ["decoder.out.kernel", "decoder.ups.0.dense.kernel"]
    assert "  as it starts: decoder.ups.0.dense.kernel: nothing in the file" in report.lines()


def test_pretrained_swin_encoders_have_other_names():
    """module.patch_embed, fc1 and fc2: the files of the self-supervised pre-training."""
    theirs = arrays(monai("swin_unetr"))
    renamed = {
        "module." + name.removeprefix("swinViT.").replace("linear", "fc"): value
        for name, value in theirs.items() if name.startswith("swinViT.")
    }  # fmt: skip
    report = from_monai.convert(renamed, ours("swin_unetr").init(None), "swin_unetr")[1]
    assert not report.unused and all(
        path.startswith(("decoder", "encoder.blocks")) for path in report.missing
    )


def test_faults_are_named(tmp_path):
    with pytest.raises(ValueError, match="no such file"):
        from_monai.read(tmp_path / "none.pt")
    (tmp_path / "bad.pt").write_bytes(b"no archive")
    with pytest.raises(ValueError, match="bad.pt: cannot be read as weights"):
        from_monai.read(tmp_path / "bad.pt")
    params = ours("unetr").init(None)
    with pytest.raises(ValueError, match="no array fits .* first names are resnet.conv1"):
        from_monai.convert({"resnet.conv1": np.zeros(3)}, params, "unetr")
    with pytest.raises(ValueError, match="model.backbone = 'unet'"):
        from_monai.convert({}, params, "unet")
