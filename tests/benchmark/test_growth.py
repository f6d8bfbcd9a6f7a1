"""Growth: two points through the command; what does not fit; points and exponents by hand."""

import json

import pytest

from masm_jax.benchmark import growth, growth_report
from masm_jax.benchmark.__main__ import main
from masm_jax.benchmark.store import Item, Store

CONFIG = "configs/masm_brats.py"
QUICK = ["growth", "--network=tiny", "--rounds=1", "--seconds=0", "--mode=infer"]


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(growth, "EDGES", (16,))
    monkeypatch.setattr(growth, "USUAL_EDGE", 16)
    monkeypatch.setattr(growth, "AXES", {"modalities": (2,)})
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")


def test_points_are_measured_and_what_does_not_fit_is_not(small, monkeypatch, tmp_path, capsys):
    unet = "--config=configs/unet_brats.py"  # compiles fastest
    words = [*QUICK, unet, "--axis=modalities", f"--output={tmp_path}"]
    assert main(words) == 0
    found = json.loads((tmp_path / "growth.json").read_text())
    (result,) = found["results"]
    assert result["variant"] == "patch16-batch1-modalities2-depth1"
    assert result["median"] > 0 and result["peak"] > 0
    for name in ("growth.md", "growth.png", "growth.svg"):
        assert (tmp_path / name).stat().st_size > 500
    assert capsys.readouterr().out == (tmp_path / "growth.md").read_text()

    # Going on: what is there stays, and for the new point there is no memory.
    monkeypatch.setattr(growth, "AXES", {"modalities": (2, 4)})
    monkeypatch.setattr(growth, "free_memory", lambda: 1e6)
    assert main(words) == 3
    assert json.loads((tmp_path / "growth.json").read_text())["results"] == found["results"]
    said = capsys.readouterr().out
    assert "| not measured: it needs 0." in said and "0.0 GB are free |" in said


def test_points_of_the_axes():
    tiny = growth.points(list(growth.AXES), "tiny", CONFIG)
    assert [point.patch for point in tiny["patch"]] == [32, 48, 64, 96, 128, 160]
    assert {point.patch for point in tiny["batch"] + tiny["depth"]} == {48}
    base = growth.points(["patch", "batch"], "base", CONFIG)  # its patches are multiples of 32
    assert 48 not in [point.patch for point in base["patch"]] and base["batch"][0].patch == 64
    assert base["batch"][0] == base["patch"][1] == growth.Point(64)


@pytest.mark.parametrize("modalities, pairs", [(1, 0), (2, 1), (4, 2), (8, 4)])
def test_networks_of_all_modalities_can_be_counted(modalities, pairs):
    point = growth.Point(16, batch=3, modalities=modalities, depth=2)
    ours = growth.network(point, "tiny", CONFIG)
    assert len(ours.modalities) == modalities and len(ours.changes["model.pairs"]) == pairs
    assert (ours.changes["model.aware_depth"], ours.changes["model.shift_depth"]) == (2, 4)
    assert ("model.mixers" in ours.changes) == (modalities == 1)
    built = growth.jax_side.network(ours, patch=16, batch=1, dtype="float32", config=CONFIG)
    assert growth.jax_side.calls(built)["forward"][2].shape == (1, modalities, 16, 16, 16)


def test_exponents_and_tables_by_hand(tmp_path):
    """Time as the work to the power of 1, then of 2: 1.5 in all. The largest was not measured."""
    store = Store(tmp_path, dict.fromkeys(growth.FIXED, "tiny"), "growth.json")
    chosen = [growth.Point(edge) for edge in (32, 64, 128, 160)]
    for point, macs, seconds, peak in zip(chosen, (1e9, 8e9, 64e9), (1, 8, 512), (1e8, 8e8, 8e9)):
        result = {"median": seconds, "peak": peak, "round": 0}
        store.results.append(Item("masm_tiny", point.name, "infer")._asdict() | result)
        store.counts[point.name] = {"infer": macs}
    store.counts[chosen[3].name] = {"infer": 125e9}
    store.failures[f"masm_tiny {chosen[3].name} infer"] = "it needs 9.0 GB, and 8.0 GB are free"
    measured = growth_report.rows(store, "patch", chosen, "infer")
    assert growth_report.slopes(measured, "macs", "seconds") == pytest.approx((1.5, 2.0))
    every, last = growth_report.slopes(measured, "amount", "peak")
    assert last > every > 1
    lines = growth_report.words(store, {"patch": chosen}, {("patch", "infer"): measured})
    assert any("| 64 | 1.50, last 2.00 |" in line and line.endswith("| no |") for line in lines)
    assert "| 160 | 125 | not measured: it needs 9.0 GB, and 8.0 GB are free |  |  |" in lines
    assert growth_report.slopes(measured[:1], "macs", "seconds") is None


@pytest.mark.parametrize(
    "words, said",
    [
        (
            ["--axis=width"],
            "--axis=width: width is not known (did you mean depth?); expected some of patch, "
            "batch, modalities, depth",
        ),
        (["--rounds=0"], "--rounds=0"),
        (["--config=none.py"], "none.py"),
        (
            ["--network=full", "--config=configs/swin_unetr_brats.py"],
            "--network=full: configs/swin_unetr_brats.py has model.backbone='swin_unetr', which "
            "has no such size; expected one of tiny, base",
        ),
    ],
)
def test_wrong_flags_are_one_line(words, said, tmp_path, capsys):
    assert main(["growth", f"--output={tmp_path}", *words]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line
