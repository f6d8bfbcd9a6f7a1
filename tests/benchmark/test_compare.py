"""The comparison: two small networks through the command; stopping, failing, going on."""

import argparse
import dataclasses
import json
import os
import pathlib
import shutil
import subprocess
import sys
import time
import types

import pytest

from masm_jax.benchmark import compare, pareto, peers, ranking, worker
from masm_jax.benchmark.__main__ import main
from masm_jax.benchmark.store import Store

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]
QUICK = ["--patch=32", "--rounds=1", "--seconds=0", "--threads=1", "--variants=eager"]


def compared(folder, *words, code):
    """The command in a process of its own, as users start it; compiled quickly."""
    environment = os.environ | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    said = subprocess.run(
        [sys.executable, "-m", "masm_jax.benchmark", "compare", f"--output={folder}", *words],
        cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=500,
    )  # fmt: skip
    assert said.returncode == code, said.stdout + said.stderr
    return said, json.loads((folder / "comparison.json").read_text())


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Folder, output and results of one U-Net in two frameworks, and a peer that is not there."""
    pytest.importorskip("torch", reason="the peers need torch: requirements-test.txt")
    folder = tmp_path_factory.mktemp("comparison")
    words = ["--networks=unet_tiny,unet_tiny_torch", "--mode=infer"]
    return folder, *compared(folder, *QUICK, *words, code=0)


def test_both_frameworks_are_measured(small):
    folder, said, found = small
    results = {each["network"]: each for each in found["results"]}
    assert set(results) == {"unet_tiny", "unet_tiny_torch"} and not found["failures"]
    for each in results.values():
        assert min(each["median"], each["first"]) > 0 and each["calls"] >= worker.LEAST_CALLS
        assert 1e6 < each["peak"] < 4e9
    own, other = (found["counts"][name] for name in ("unet_tiny", "unet_tiny_torch"))
    assert own["forward"] == other["forward"] and own["parameters"] == other["parameters"]
    for name in ("report.md", "speed.png", "speed.svg", "memory.png", "memory.svg"):
        assert (folder / name).stat().st_size > 500
    assert (folder / "report.md").read_text() == said.stdout
    assert "| unet_tiny_torch | torch, eager |" in said.stdout
    assert "Published by others, not measured here" in said.stdout
    assert "round 1 of 1: unet_tiny (jit), infer" in said.stderr and "min left" in said.stderr


def test_what_is_there_is_not_measured_again_and_what_fails_is_named(small, tmp_path):
    """Another round alone; training at 16^3, where torch has no norm of the one lowest voxel."""
    folder, _, before = small
    folder = shutil.copytree(folder, tmp_path / "copy")
    again = [word for word in QUICK if "rounds" not in word]
    words = ["--networks=unet_tiny_torch,dynunet", "--mode=infer", "--rounds=2"]
    said, after = compared(folder, *again, *words, code=3)
    assert after["results"][:2] == before["results"]
    assert [(each["network"], each["round"]) for each in after["results"][2:]] == [
        ("unet_tiny_torch", 1)
    ]
    # 32^3 is one voxel at the lowest level of DynUNet; or MONAI is not installed.
    (reason,) = [line for line in said.stdout.splitlines() if line.startswith("- dynunet")]
    assert "make bench-env" in reason or "more than 1 spatial element" in reason


def test_another_comparison_is_not_mixed_with_it(small, capsys):
    folder, *_ = small
    words = ["compare", f"--output={folder}", *QUICK, "--networks=unet_tiny", "--batch=2"]
    assert main(words) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "--batch=1" in line and "another --output" in line


@pytest.mark.parametrize(
    "content, said",
    [("{}", "has no settings, results"), ("[1", "is damaged"), ("[]", "holds a list")],
)
def test_a_file_that_is_not_of_it_is_named(tmp_path, capsys, content, said):
    (tmp_path / "comparison.json").write_text(content)
    assert main(["compare", f"--output={tmp_path}", *QUICK, "--networks=unet_tiny"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "comparison.json" in line and said in line and "name another --output" in line


def test_without_torch_its_networks_say_what_they_need(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda _: None)
    monkeypatch.setattr(compare, "Worker", None)  # no process is started for it
    words = ["compare", f"--output={tmp_path}", *QUICK, "--networks=dynunet", "--mode=infer"]
    assert main(words) == 3
    assert "`make bench-env` makes .venv-bench" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["unet_tiny", "unet_tiny_torch"])
def test_a_training_step_goes_on_from_the_one_before(name, quick_training):
    """On one patch again and again: the loss falls."""
    call = quick_training(name)
    losses = [float(call()) for _ in range(4)]
    assert losses[0] > losses[3] and len(set(losses)) == 4


@pytest.fixture
def quick_training():
    from masm_jax.benchmark import jax_side

    def prepare(name):
        entry = peers.NETWORKS[name]
        size = dict(patch=32, batch=1, mode="train", device="cpu")
        if entry.framework == "jax":
            changes = entry.changes | {"optim.warmup_steps": 0}
            entry = dataclasses.replace(entry, changes=changes)
            return jax_side.prepare(entry, config="configs/masm_brats.py", dtype="bfloat16", **size)
        pytest.importorskip("torch", reason="the peers need torch: requirements-test.txt")
        from masm_jax.benchmark import torch_side

        # Not bfloat16: torch's kernel gradients of small planes are infinite then on some CPUs.
        return torch_side.prepare(entry, variant="contiguous", dtype="float32", **size)

    return prepare


@pytest.mark.parametrize(
    "words, said",
    [
        (["--networks=swin"], "swin is not known"),
        (["--mode=predict"], "--mode=predict"),
        (["--variants=fast"], "--variants=fast"),
        (["--rounds=0"], "--rounds=0"),
        (["--threads=4096"], "--threads=4096"),
        (["--config=none.py"], "none.py"),
        (["--device=cuda"], "--device=cuda: no driver of a GPU here (none of /no/driver)"),
    ],
)
def test_wrong_flags_are_one_line(words, said, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(compare, "_DRIVERS", ("/no/driver",))
    assert main(["compare", f"--output={tmp_path}", *words]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line


def test_a_process_that_dies_is_a_reason(tmp_path, monkeypatch):
    args = arguments(tmp_path, "--threads=1")
    monkeypatch.setattr(compare.sys, "executable", "/bin/false")
    dead = compare.Worker(compare.Item("unet_tiny", "jit", "infer"), args)
    with pytest.raises(RuntimeError, match="ended with code 1"):
        dead.measure(0.0)
    dead.close()


def arguments(folder, *words):
    parser = argparse.ArgumentParser()
    compare.add_arguments(parser)
    return parser.parse_args([f"--output={folder}", *words])


def test_a_name_that_has_become_another_network_is_refused(tmp_path):
    first = Store(tmp_path, {"patch": 32})
    first.define({"a": {"model": {"detail": 8, "mixers": ("aware",)}}, "b": {"class": "UNet"}})
    first.write()
    again = Store(tmp_path, {"patch": 32})
    again.define({"a": {"model": {"detail": 8, "mixers": ("aware",)}}, "c": {"class": "VNet"}})
    with pytest.raises(ValueError, match=r"with another a \(model.detail: 8 -> 0\); expected"):
        again.define({"a": {"model": {"detail": 0, "mixers": ("aware",)}}})


def test_another_machine_is_refused(tmp_path):
    Store(tmp_path, {}).write()
    file = tmp_path / "comparison.json"
    content = json.loads(file.read_text())
    content["machine"]["processor"] = "Some CPU"
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="measured on another machine, Some CPU, and this is"):
        Store(tmp_path, {})


def test_a_second_interruption_leaves_no_worker_behind(tmp_path):
    """Nor what a failed attempt has compiled, which would make the next one's compilation short."""
    ended, item = [], compare.Item("unet_tiny", "jit", "infer")
    (compiled := tmp_path / "cache" / "unet_tiny-jit-infer").mkdir(parents=True)

    class Busy:
        def measure(self, seconds):
            assert not compiled.exists()
            raise KeyboardInterrupt

        def kill(self):
            ended.append("killed")

    args = arguments(tmp_path, "--rounds=1")
    with pytest.raises(KeyboardInterrupt):
        compare.measure_all(
            [item], args, Store(tmp_path, {}), False, start=lambda item, args: Busy()
        )
    assert ended == ["killed"]


@pytest.mark.skipif(sys.platform != "linux", reason="a flag of Linux")
def test_a_worker_ends_with_the_command_that_is_killed(tmp_path):
    job = {"network": "unet_tiny", "variant": "jit", "mode": "infer", "patch": 16, "batch": 1}
    job |= {"dtype": "float32", "device": "cpu", "threads": 1, "config": "configs/masm_brats.py"}
    command = (
        "import subprocess, sys, time\n"
        "words = [sys.executable, '-m', 'masm_jax.benchmark.worker', sys.argv[1]]\n"
        "worker = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE)\n"
        "worker.stdin.write(b'1e9\\n'); worker.stdin.flush()\n"
        "print(worker.pid, flush=True)\n"
        "time.sleep(600)\n"
    )
    said = [sys.executable, "-c", command, json.dumps(job)]
    with subprocess.Popen(said, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True) as process:
        worker_pid = int(process.stdout.readline())
        until(lambda: "libjax" in maps(worker_pid), "it has not begun")
        process.kill()
    until(lambda: not maps(worker_pid), "it goes on")


def maps(pid):
    """What a process has mapped; "" where it is gone."""
    try:
        return pathlib.Path(f"/proc/{pid}/maps").read_text()
    except OSError:
        return ""


def until(true, otherwise, seconds=60):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, otherwise
        time.sleep(0.05)


def test_the_clock():
    """Calls of 2 s, the first of 10 s: for 5 s that is three calls, of 7 s four."""
    ticks = []

    def clock():
        return sum(ticks)

    def call():
        ticks.append(2.0 if ticks else 10.0)

    assert worker.measure(call, 5.0, clock=clock) == {"first": 10.0, "median": 2.0, "calls": 3}
    assert worker.measure(call, 7.0, warm=True, clock=clock) == {
        "first": None, "median": 2.0, "calls": 4,
    }  # fmt: skip


# ---------------------------------------------------------------- from numbers to a table


def result(network, variant, median, first=None, mode="infer", peak=2e9):
    found = {"network": network, "variant": variant, "mode": mode, "round": 0}
    return found | {"median": median, "first": first, "peak": peak, "calls": 3, "wall": 9.0}


COUNTS = {
    "masm_base": {"parameters": 20e6, "forward": 50e9, "train": 150e9},
    "dynunet": {"parameters": 30e6, "forward": 500e9, "train": 1500e9},
    "unet_base_torch": {"parameters": 10e6, "forward": 40e9, "train": 120e9},
}


SETTINGS = {"patch": 128, "batch": 1, "dtype": "float32"}


def test_medians_and_ratios_by_hand():
    results = [
        result("masm_base", "jit", 2.0, first=12.0, peak=5e9),
        result("masm_base", "jit", 1.0, first=3.0, peak=4e9),
        result("masm_base", "jit", 4.0, first=5.0),
        result("dynunet", "eager", 20.0),
        result("dynunet", "compile", 10.0),
        result("unet_base_torch", "eager", 0.5),  # the fastest, but no large peer
    ]
    rows = ranking.rows(results, COUNTS, SETTINGS | {"batch": 4})
    own, eager, compiled, small = rows
    assert (own["latency"], own["patches"], own["spread"]) == (2.0, 2.0, (1.5, 3.0))
    assert own["compile"] == 10.0 and own["peak"] == 2e9 and own["rounds"] == 3
    assert eager["spread"] is None and eager["per_mac"] == 2.0 and compiled["per_mac"] == 1.0
    assert own["per_mac"] == pytest.approx((2 / 50) / (10 / 500))
    assert own["faster"] == 5.0 and small["faster"] == 20.0
    assert own["flops_per_second"] == 2 * 50e9 * 2.0 and own["mfu"] is None


def test_without_a_reference_there_is_no_ratio():
    (row,) = ranking.rows([result("masm_base", "jit", 2.0)], {}, SETTINGS)
    assert row["per_mac"] is row["faster"] is row["macs"] is row["flops_per_second"] is None


def test_mfu_of_a_known_gpu():
    results = [result("masm_base", "jit", 0.002, mode="train")]
    for dtype, device, mfu in (
        ("bfloat16", "NVIDIA A100-SXM4-80GB", 2 * 150e9 / 0.002 / 312e12),
        ("bfloat16", "NVIDIA Something", None),
        ("float32", "NVIDIA A100-SXM4-80GB", None),
    ):
        settings = SETTINGS | {"dtype": dtype, "device": "cuda", "threads": 2}
        rows = ranking.rows(results, COUNTS, settings, device)
        assert rows[0]["mfu"] == (mfu and pytest.approx(mfu))
        store = types.SimpleNamespace(settings=settings, versions={"jax": {"device": device}})
        text = "\n".join(ranking.words(rows, store, {}))
        assert ("| MFU |" in text) == (mfu is not None)
        assert "| 150 | 300 | 2 |" in text and ("| 48.1% |" in text) == (mfu is not None)


def test_the_front_is_what_nothing_cheaper_beats():
    points = [(1, 5), (2, 4), (3, 7), (4, 7), (5, 9)]
    assert pareto.front(points, max) == [(1, 5), (3, 7), (5, 9)]
    assert pareto.front(points, min) == [(1, 5), (2, 4)]
