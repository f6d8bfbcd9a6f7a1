"""The command: errors in one line without a compiler; with one, a real small compilation."""

import argparse
import importlib.util
import json
import os
import pathlib
import re
import subprocess
import sys

import pytest

from masm_jax.benchmark import chips, program, tpu
from masm_jax.benchmark.__main__ import main

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]
SMALL = (
    "--config=configs/masm_brats.py", "--topology=v5e:2x2", "--patch=16",
    "--set", "model.size=tiny", "--set", "model.mixers=()", "--set", "augment=none",
)  # fmt: skip


@pytest.fixture(scope="session")
def compiler():
    """A Python with libtpu: this one, $MASM_TPU_PYTHON or that of ``make tpu-env``; else skip."""
    if importlib.util.find_spec("libtpu"):
        return sys.executable
    named = os.environ.get("MASM_TPU_PYTHON", REPOSITORY / ".venv-tpu" / "bin" / "python")
    if not pathlib.Path(named).is_file():
        pytest.skip(f"no TPU compiler: neither libtpu here nor {named}; make tpu-env makes it")
    return str(named)


def started(python, *words, **options):
    """A process of the repository, without the settings that tests/conftest.py made for JAX."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("JAX_")}
    return subprocess.run(
        [python, *words],
        cwd=REPOSITORY,
        env=clean,
        capture_output=True,
        text=True,
        timeout=500,
        **options,
    )


def test_without_libtpu_one_line_says_how_to_get_it(monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.delenv("TPU_LIBRARY_PATH", raising=False)
    assert main(["tpu", *SMALL]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "make tpu-env" in line and "libtpu" in line


def test_a_wrong_topology_is_one_line(capsys):
    assert main(["tpu", "--config=configs/masm_brats.py", "--topology=v5e:99"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "--topology=v5e:99" in line


def test_commands_are_imported_only_when_asked_for():
    """``tpu`` has to set the environment before JAX is there."""
    code = (
        "import sys; from masm_jax.benchmark.__main__ import main\n"
        "try: main(['tpu', '--help'])\n"
        "except SystemExit: pass\n"
        "sys.exit('jax' in sys.modules)"
    )
    result = started(sys.executable, "-c", code)
    assert result.returncode == 0, result.stderr
    assert "--topology" in result.stdout


@pytest.mark.parametrize(
    "changes, words",
    [
        (["--set", "model.size=huge"], "config.model.size = 'huge'"),
        (["--set", "model.sise=tiny"], "--set model.sise=tiny"),
        (["--set", "model.size"], "expected KEY=VALUE"),
        (["--set", "total_steps=many"], "--set total_steps=many"),
        (["--patch=30"], "a multiple of"),
        (["--patch=32,32"], "expected an edge, or three"),
        (["--patch=64,32,30"], "a multiple of"),
        (["--spatial=3"], "expected a divisor of 4"),
        (["--config=configs/none.py"], "no such file"),
    ],
)
def test_what_is_wrong_with_a_config(monkeypatch, changes, words):
    """Said before anything is compiled, and without the compiler."""
    monkeypatch.chdir(REPOSITORY)
    parser = argparse.ArgumentParser()
    tpu.add_arguments(parser)
    args, where = parser.parse_args([*SMALL, *changes]), chips.parse("v5e:2x2")
    with pytest.raises(ValueError, match=re.escape(words)):
        program.lower(tpu.settings(args, where), where, "train")


def test_crops_of_a_step(monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    parser = argparse.ArgumentParser()
    tpu.add_arguments(parser)
    args = parser.parse_args([*SMALL, "--batch_per_chip=3", "--spatial=2", "--patch=64,32,32"])
    config = tpu.settings(args, chips.parse("v5e:4x4"))
    assert config.batch_size == 24  # 16 chips are 8 pairs with 3 crops each
    assert (config.patch, config.mesh.spatial) == ((64, 32, 32), 2)


def test_an_error_is_one_line_with_the_compiler_too(compiler):
    words = ["-m", "masm_jax.benchmark", "tpu", *SMALL, "--set", "model.size=huge"]
    result = started(compiler, *words)
    assert result.returncode == 1 and "Traceback" not in result.stderr, result.stderr
    assert "benchmark tpu: config.model.size = 'huge'" in result.stderr


# Two programs whose bytes and FLOPs are known.
KNOWN = """
import json, sys
from masm_jax.benchmark import chips, hlo, tpu, traffic
where = chips.parse(sys.argv[1])
tpu.describe(where)
import jax, jax.numpy as jnp
from masm_jax import sharding
from masm_jax.benchmark import program
alone = sharding.replicated(sharding.make_mesh(program.devices(where)))
n = 4096
def numbers(function, *arrays):
    arrays = [jax.ShapeDtypeStruct((n, n), dtype, sharding=alone) for dtype in arrays]
    facts, text = program.compile_(jax.jit(function).lower(*arrays))
    moves = traffic.count(hlo.parse(text)).moves
    return [sum(m.bytes for m in moves), sum(m.flops for m in moves), facts["cost"]]
print(json.dumps([
    numbers(lambda a, b: a @ b, jnp.bfloat16, jnp.bfloat16),
    numbers(lambda x: x[2:] + x[1:-1] + x[:-2], jnp.float32),
    program.compile_(jax.jit(lambda x: x + 1).lower(
        jax.ShapeDtypeStruct((300 * n, n, 8), jnp.float32, sharding=alone)))[0],
]))
"""


@pytest.mark.parametrize("topology, usable", [("v5e:2x2", "15.75"), ("v5p:2x2x1", "95.7")])
def test_bytes_and_flops_of_known_programs(compiler, topology, usable):
    result = started(compiler, "-c", KNOWN, topology)
    assert result.returncode == 0, result.stderr
    product, stencil, misfit = json.loads(result.stdout)
    n = 4096
    assert product[0] == 3 * n * n * 2  # two factors and the product, none padded
    assert product[1] == product[2]["flops"] == 2 * n**3
    assert product[2]["bytes_accessed"] > 2 * product[0]  # the prefetch, four times
    assert stencil[0] == pytest.approx(2 * n * n * 4, rel=0.01)
    assert stencil[2]["bytes_accessed"] == pytest.approx(4 * n * n * 4, rel=0.01)  # a slice each
    assert not misfit["fits"] and f"exceeds available HBM ({usable}" in misfit["message"]


def test_a_real_step_is_compiled_once(compiler, tmp_path):
    def run(name):
        paths = [f"--json={tmp_path / name}.json", f"--text={tmp_path / name}.txt"]
        kept = f"--cache={tmp_path / 'cache'}"
        result = started(compiler, "-m", "masm_jax.benchmark", "tpu", *SMALL, *paths, kept)
        assert result.returncode == 0, result.stderr
        return result, json.loads((tmp_path / f"{name}.json").read_text())

    result, found = run("first")
    assert "Compiled, not run" in result.stdout and "compiling for v5e:2x2" in result.stderr
    assert found["run"]["accelerator_type"] == "v5litepod-4" and found["run"]["batch_size"] == 4
    # State: parameters, their average and two moments, float32; padding comes on top.
    parameters = found["run"]["parameters"]
    state, memory = 4 * 4 * parameters, found["memory"]
    assert state < memory["arguments"] < 1.5 * state
    assert memory["aliased"] == pytest.approx(memory["outputs"], rel=0.01)  # donated
    assert memory["arguments"] < memory["peak"] < memory["usable"]
    # Gradients are all-reduced: 4 bytes for each parameter, 2 where that is done in bfloat16.
    assert 2 * parameters < found["all_reduced_bytes"] < 4.1 * parameters
    assert found["collectives"]["all-reduce"]["groups"] == [4]
    # What the compiler counts beside convolutions: at this size the optimiser, most of all.
    others = found["cost_analysis"]["flops"] - found["traffic"]["flops"]
    assert 10 * parameters < others < 50 * parameters
    # The state is read and written once, at least.
    assert memory["arguments"] < found["traffic"]["read"] < found["cost_analysis"]["bytes_accessed"]
    places = found["traffic"]["by_place"]
    assert any(place.startswith("encoder level 3 ") for place in places)
    assert any(place.startswith("decoder level 1 ") for place in places)
    assert "ENTRY" in (tmp_path / "first.txt").read_text()

    result, again = run("second")
    assert "compiling" not in result.stderr and "reused from" in result.stdout
    assert again["compiled"].pop("reused").startswith(str(tmp_path / "cache"))
    assert again == found
