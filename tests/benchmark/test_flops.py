"""The command: counts of both frameworks side by side, and what it says of what cannot be."""

import json
import sys

import jax
import jax.numpy as jnp
import pytest

from masm_jax.benchmark import flops, peers
from masm_jax.benchmark.__main__ import main

SMALL = ["flops", "--patch=32"]


def test_a_multiply_add_is_two_flops():
    x, y = (jax.ShapeDtypeStruct(sizes, jnp.float32) for sizes in ((3, 5), (5, 7)))
    found = flops.count(lambda x, y: x @ y, x, y)
    assert (found.macs, found.flops) == (105, 210)


def test_one_network_in_two_frameworks(tmp_path, capsys):
    pytest.importorskip("torch", reason="one of them needs torch: requirements-test.txt")
    file = tmp_path / "flops.json"
    words = [*SMALL, "--networks=unet_tiny,unet_tiny_torch", "--by-module", f"--json={file}"]
    assert main(words) == 0
    said = capsys.readouterr().out
    found = json.loads(file.read_text())["networks"]
    own, other = found["unet_tiny"], found["unet_tiny_torch"]
    assert own["parameters"] == other["parameters"]
    assert own["forward"] == other["forward"]
    # Heads of deep supervision, in our training step alone: at 8^3 and 4^3 voxels, 32 and 64
    # channels, 3 regions. The lowest has no weight in the loss, and so no way back.
    heads = 3 * 8**3 * 32 * 3 + 4**3 * 64 * 3
    assert own["train"] == other["train"] + heads
    assert f"| {2 * own['forward'] / 1e9:.1f} |" in said and "XLA counts otherwise" in said
    for direction in ("forward", "train"):
        places = own["places"][direction]
        assert sum(places.values()) == own[direction]
        assert "encoder level1" in places and "elsewhere" not in places


def test_unetr_counts_as_monais(tmp_path):
    """Parameters but for the norms of a cross-attention that MONAI never calls: 12 x 2 x 768."""
    pytest.importorskip("monai", reason="the peers need MONAI: requirements-test.txt")
    file = tmp_path / "flops.json"
    assert main([*SMALL, "--networks=unetr_jax,unetr", "--no-xla", f"--json={file}"]) == 0
    own, other = (json.loads(file.read_text())["networks"][name] for name in ("unetr_jax", "unetr"))
    assert own["forward"] == other["forward"] and own["train"] == other["train"]
    assert own["parameters"] == other["parameters"] - 12 * 2 * 768


def test_without_torch_ours_is_counted(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: None)
    assert main([*SMALL, "--networks=unet_tiny,dynunet", "--no-xla"]) == 3
    said = capsys.readouterr().out
    assert "| unet_tiny |" in said
    (line,) = [line for line in said.splitlines() if line.startswith("- dynunet")]
    assert "make bench-env" in line


@pytest.mark.parametrize(
    "words, said",
    [
        (["--networks=masm_base,unet"], "unet is not known"),
        (["--networks=,"], "nothing is not known"),
        (["--patch=0"], "--patch=0"),
    ],
)
def test_wrong_flags_are_one_line(words, said, capsys):
    assert main(["flops", *words]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line


@pytest.mark.parametrize("config", ["masm_laptop", "unet_brats", "swin_unetr_brats"])
def test_a_name_is_the_same_network_whatever_the_config_is(config):
    """Parameters and multiply-adds of masm_brats.py, where sizes, mixers and encoders differ."""
    for name in (
        "masm_tiny",
        "masm_base",
        "masm_base_plain",
        "masm_base_wide",
        "late_base",
        "unet_base",
    ):
        usual, other = (
            flops.jax_side.count(
                peers.NETWORKS[name], patch=32, config=f"configs/{file}.py", xla=False
            )
            for file in ("masm_brats", config)
        )
        for key in ("parameters", "forward", "train"):
            assert usual[key] == other[key], name


def test_a_patch_that_does_not_fit_is_that_networks_reason(capsys):
    assert main(["flops", "--patch=40", "--networks=unet_tiny", "--no-xla"]) == 3
    assert "a multiple of 16" in capsys.readouterr().out


def test_every_peer_of_monai_is_what_its_name_says():
    """Parameters as published: nnU-Net 31.2 M, SwinUNETR 62.2 M, MedNeXt 5.6 and 10.5 M."""
    pytest.importorskip("monai", reason="the peers need MONAI: make bench-env")
    millions = {
        "dynunet": 31.2, "segresnet16": 4.7, "segresnet32": 18.8, "unetr": 102.5,
        "swinunetr48": 62.2, "vnet": 45.6, "mednext_s": 5.6, "mednext_b": 10.5,
    }  # fmt: skip
    assert set(millions) == {
        name for name, entry in peers.NETWORKS.items()
        if entry.framework == "torch" and entry.module.startswith("monai")
    }  # fmt: skip
    for name, expected in millions.items():
        model = peers.NETWORKS[name].build(128)
        assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(expected, abs=0.06)
