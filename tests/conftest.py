"""Shared fixtures. Set before JAX starts: CPU only, eight devices, quick compilation."""

import datetime
import json
import os
import pathlib
import subprocess
import sys

os.environ.setdefault("JAX_PLATFORMS", "cpu")
import jax  # noqa: E402

jax.config.update("jax_num_cpu_devices", 8)
# Tests compile many programs and run each once or twice; tests/parity turns this off.
jax.config.update("jax_disable_most_optimizations", True)

import numpy as np  # noqa: E402
import pytest  # noqa: E402

# Files of minutes: first, so that at the end no worker is left with one of them alone.
LONG = (
    "test_runs.py", "test_train.py", "test_mesh.py", "test_real_scans.py", "test_accuracy.py",
    "test_steps.py",
)  # fmt: skip
CASES = [f"Phantom_{index:05d}" for index in range(4)]
REPOSITORY = pathlib.Path(__file__).resolve().parents[1]
# A third of the time that a training step takes to compile. The names are those of one XLA.
QUICK = {"xla_cpu_use_fusion_emitters": False, "xla_cpu_parallel_codegen_split_count": 2}
if jax.__version_info__ >= (0, 11):
    QUICK = {}


def pytest_addoption(parser):
    today = datetime.date.today().toordinal()  # of all workers the same
    words = "order of the tests in a file, and of the files; another one each day"
    parser.addoption("--order_seed", type=int, default=today, help=words)


def pytest_report_header(config):
    return f"order of the tests: --order_seed={config.getoption('order_seed')}"


def pytest_collection_modifyitems(config, items):
    """Files in random order, the long ones first; the tests of a file in random order."""
    random = np.random.default_rng(config.getoption("order_seed"))
    files = {path: random.random() for path in dict.fromkeys(item.path for item in items)}
    place = {item: random.random() for item in items}
    items.sort(key=lambda item: (item.path.name not in LONG, files[item.path], place[item]))


@pytest.fixture(scope="session")
def real_data():
    """Folder of real scans: ``$MASM_REAL_DATA``, else ``../shared/data``, else skip."""
    named = os.environ.get("MASM_REAL_DATA")
    folder = pathlib.Path(named) if named else REPOSITORY.parent / "shared" / "data"
    if not (folder / "brats").is_dir():
        pytest.skip(
            f"no real scans: {folder}/brats is absent; set $MASM_REAL_DATA to a folder with it"
        )
    return folder


@pytest.fixture(scope="session")
def quick_jit():
    """``jax.jit`` for large programs that run once or twice."""

    def jit(function, **options):
        return jax.jit(function, compiler_options=QUICK or None, **options)

    return jit


@pytest.fixture(scope="session")
def make_config():
    """The demo's config, shrunk to seconds: make_config(**{"model.mixers": (), ...})."""
    from configs import masm_demo

    def make(**changes):
        config = masm_demo.get_config()
        small = {"total_steps": 6, "batch_size": 8, "patch": 16, "augment": "none"}
        config.update_from_flattened_dict(small | {"optim.warmup_steps": 2} | changes)
        return config

    return make


@pytest.fixture(scope="session")
def command_line(tmp_path_factory):
    """(start, options) of subprocess.run([*start, "train.py", ...], **options): as users do it.

    One CPU device. The processes share a cache of compiled programs: only the first of a kind
    compiles.
    """
    folder = tmp_path_factory.mktemp("commands")
    (folder / "hidden").mkdir()
    # TensorBoard's writer would import it, for three seconds in each process.
    (folder / "hidden" / "torch.py").write_text("raise ImportError('hidden by tests/conftest.py')")
    named = " ".join(f"--{name}={str(value).lower()}" for name, value in QUICK.items())
    environment = os.environ | {
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"),
        "XLA_FLAGS": named,
        "PYTHONPATH": str(folder / "hidden"),
    }
    return [sys.executable], {"cwd": REPOSITORY, "env": environment}


@pytest.fixture(scope="session")
def command(command_line):
    """Runs a command in its own process: command("train.py", "--flag=value", code=0) -> result."""
    start, options = command_line

    def run(*words, code=0, optimised=False, timeout=600):
        words = [*start, *map(str, words)]
        environment = options["env"]
        if optimised:  # for where the steps take longer than the compilation
            environment = environment | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "0", "XLA_FLAGS": ""}
        result = subprocess.run(
            words,
            **options | {"env": environment},
            capture_output=True,
            text=True,
            timeout=timeout,
        )
        said = f"{' '.join(words)}\n{result.stdout}\n{result.stderr}"
        assert result.returncode == code, f"exit code {result.returncode}, expected {code}: {said}"
        return result

    return run


# ---------------------------------------------------------------- phantoms, for the commands


@pytest.fixture(scope="session")
def phantoms(command, tmp_path_factory):
    """Four phantoms at 6 mm, raw."""
    folder = tmp_path_factory.mktemp("phantoms") / "raw"
    command("-m", "masm_jax.phantom", f"--output={folder}", "--cases=4", "--spacing=6")
    return folder


@pytest.fixture(scope="session")
def records(command, phantoms):
    """The same, prepared."""
    folder = phantoms.parent / "records"
    said = command("-m", "masm_jax.prepare", f"--input={phantoms}", f"--output={folder}")
    assert "4 records" in said.stdout and "brats2021" in said.stdout
    return folder


@pytest.fixture(scope="session")
def split(phantoms):
    path = phantoms.parent / "split.json"
    path.write_text(json.dumps({"train": CASES[:3], "val": CASES[3:]}))
    return path
