"""Signals and flags of the commands."""

import gc
import os
import platform
import signal
import subprocess
import sys

import pytest
from absl import flags

from masm_jax import runtime
from masm_jax.commands import REPOSITORY


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_first_signal_is_a_flag_and_the_second_acts(number, monkeypatch):
    before = signal.getsignal(number)
    acted = []
    signal.signal(number, lambda *_: acted.append(True))
    try:
        with runtime.StopSignal() as stop:
            assert not stop
            os.kill(os.getpid(), number)
            assert stop and stop.name == number.name and not acted
            os.kill(os.getpid(), number)  # the same, passed on by make or timeout
            assert not acted
            monkeypatch.setattr(runtime, "_SAME", 0.0)
            os.kill(os.getpid(), number)
            assert acted
        os.kill(os.getpid(), number)
        assert len(acted) == 2  # handlers are as they were
    finally:
        signal.signal(number, before)


def test_a_command_ends_in_a_line(capsys):
    def fails(error):
        raise error

    assert runtime.command("x", lambda a, b: a + b, 1, 2) == 3
    assert runtime.command("x", fails, ValueError("bad \033[31mname")) == 1
    assert runtime.command("x", fails, FileNotFoundError(2, "No such file", "a.nii")) == 1
    assert runtime.command("x", fails, KeyboardInterrupt()) == 130
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == r"x: bad \x1b[31mname"
    assert lines[1].startswith("x: a.nii: No such file; correct the path")
    assert lines[2] == "x: stopped before it was done; start it again"
    with pytest.raises(ZeroDivisionError):  # a defect
        runtime.command("x", fails, ZeroDivisionError())


def test_garbage_is_looked_for_rarely_for_a_while_alone():
    before = gc.get_threshold()
    runtime.collect_rarely()
    assert gc.get_threshold()[0] > 10 * before[0]
    runtime.collect_as_ever()
    assert gc.get_threshold() == before


def test_a_training_starts_without_what_it_does_not_need_yet():
    """Each of them takes a tenth of a second and more: docs/performance.md."""
    late = ["scipy.ndimage", "scipy.optimize", "scipy.spatial", "matplotlib.figure", "tensorboardX"]
    asked = f"import sys, train; print([name for name in {late} if name in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", asked], capture_output=True, text=True, check=True, cwd=REPOSITORY
    )
    assert done.stdout.strip() == "[]"


def test_a_process_says_where_it_is_when_asked_and_goes_on():
    program = "from masm_jax import runtime; runtime.start(); print('ready', flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", program], text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    ) as process:  # fmt: skip
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGUSR2)
        assert "most recent call first" in process.stderr.readline()
        assert 'File "<string>", line 1 in <module>' in process.stderr.readline()
        assert process.communicate("\n", timeout=60)[1] == ""
    assert process.returncode == 0


_FAULTS = """
import resource
import jax
from masm_jax import runtime

runtime.start(cache=False)
products = jax.jit(lambda x: jax.lax.map(lambda row: jax.numpy.outer(row, row), x).sum())
rows = jax.numpy.ones((12, 1500))
faults = [0]
for _ in range(8):
    products(rows).block_until_ready()
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
print(min(now - before for before, now in zip(faults, faults[1:])))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a setting of glibc")
def test_a_step_takes_the_memory_of_the_step_before():
    """108 MB of buffers: 26367 pages of 4 kB, each a fault where the kernel had them back."""
    ran = subprocess.run(
        [sys.executable, "-c", _FAULTS], text=True, capture_output=True, timeout=120
    )
    assert ran.returncode == 0, ran.stderr
    assert int(ran.stdout) < 1000


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--colour=red", "--siez=3"], "Did you mean: size"),
        (["--size=three"], "flag --size=three"),
        (["size=3"], "unexpected argument 'size=3'"),
    ],
)
def test_usage_errors_are_one_line_and_exit_2(words, message, monkeypatch, capsys):
    known = flags.FlagValues()
    flags.DEFINE_integer("size", 1, "A size.", flag_values=known)
    flags.DEFINE_string("colour", "", "A colour.", flag_values=known)
    monkeypatch.setattr(flags, "FLAGS", known)
    with pytest.raises(SystemExit) as stopped:
        runtime.parse_flags(["/somewhere/train.py", *words])
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("train.py: ") and message in said and len(said.splitlines()) == 1
