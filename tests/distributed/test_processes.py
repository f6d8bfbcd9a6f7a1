"""Runs on several processes of this host: started, agreed, failed, killed, paused, ended."""

import random
import re
import signal
import socket
import subprocess
import time

import pytest

from masm_jax import processes
from masm_jax.rollcall.members import differences, numbers
from masm_jax.runtime import EXIT_PEER

HOST = socket.gethostname()
HEAD = """
import os, signal, sys, time
from masm_jax import processes
from masm_jax.rollcall.roll import Roll
id, of, port = map(int, sys.argv[1:])
place = processes.Place(f"localhost:{port}", of, id, None, "the test")
"""
ALONE = HEAD + "processes._connect_jax = lambda *_: None\n"  # the roll call without jax.distributed
BOTH = HEAD + "import numpy as np; from jax.experimental.multihost_utils import process_allgather\n"
TOGETHER = "with processes.joined(place, limit=30) as roll:\n  print('started', flush=True)\n"


@pytest.fixture
def port():
    """One that is free, with the one above; below those that the system gives out."""
    for port in random.sample(range(20000, 32000), 100):
        try:
            for number in (port, port + 1):
                socket.create_server(("", number)).close()
            return port
        except OSError:
            continue
    raise AssertionError("no free ports")


@pytest.fixture
def launch(command_line, port):
    """launch(id, script, of=2) -> process; at the end none is left."""
    (python,), options = command_line
    started = []

    def launch(id, script, of=2):
        words = [python, "-c", script, str(id), str(of), str(port)]
        pipes = {
            "stdin": subprocess.PIPE,
            "stdout": subprocess.PIPE,
            "stderr": subprocess.PIPE,
            "text": True,
        }
        environment = options["env"] | {"JAX_PLATFORMS": "cpu"}
        started.append(subprocess.Popen(words, **options | {"env": environment}, **pipes))
        return started[-1]

    yield launch
    for process in started:
        process.kill()
        process.communicate(timeout=10)


def ended(process, code):
    """What it said: (standard output, last line of the errors)."""
    out, err = process.communicate(timeout=60)
    assert process.returncode == code, f"exit code {process.returncode}, expected {code}: {err}"
    return out, (err.splitlines() or [""])[-1]


def verdict(process, code):
    """Its line that says why the run ends: what failed for that reason may say so around it."""
    _, err = process.communicate(timeout=60)
    assert process.returncode == code, f"exit code {process.returncode}, expected {code}: {err}"
    (line,) = [line for line in err.splitlines() if line.startswith("-c: ")]
    return line


def until(process, word):
    """Read its output up to the line."""
    while line := process.stdout.readline():
        if line.strip() == word:
            return
    raise AssertionError(process.communicate(timeout=60))


def listening(number):
    """Wait for somebody to listen, and connect."""
    last = time.monotonic() + 30
    while True:
        try:
            return socket.create_connection(("localhost", number))
        except OSError:
            assert time.monotonic() < last
            time.sleep(0.05)


def who(process, id):
    return f"process {id} (host {HOST}, pid {process.pid})"


# ---------------------------------------------------------------- start and end


def test_all_come_agree_gather_and_leave(launch):
    script = (
        ALONE
        + TOGETHER
        + (
            "  roll.agree('the config', {'b': [1, None], 'a': 0.1})\n"
            "  print(roll.gather('ids', {'id': id}))\n"
            "  time.sleep(id / 2)\n"
            "  sys.exit(75)"
        )
    )
    for process in [launch(id, script, of=3) for id in range(3)]:
        out, said = ended(process, 75)
        assert out.splitlines()[1] == "[{'id': 0}, {'id': 1}, {'id': 2}]" and not said


def test_jax_knows_all_and_leaves(launch):
    script = BOTH + TOGETHER + "  print(process_allgather(np.int32(id + 1)).tolist())"
    for process in [launch(id, script) for id in range(2)]:
        assert "[1, 2]" in ended(process, 0)[0]


def test_strangers_are_left_alone(launch, port):
    script = ALONE + TOGETHER + "  roll.agree('all is well', True)\n"
    zero = launch(0, script)
    strangers = [listening(port + 1)]  # says nothing, and stays
    for words in (b"GET / HTTP/1.1\r\n\r\n", b"\xff\x16\n", b"[1]\n", b'{"hello": 1}\n', b""):
        with listening(port + 1) as stranger:
            stranger.sendall(words)
    strangers.append(listening(port + 1))
    strangers[-1].sendall(b"{" * 2**20)  # a line without an end
    one = launch(1, script)
    for process in (zero, one):
        assert not ended(process, 0)[1]
    for stranger in strangers:
        stranger.close()


def test_who_is_missing_is_named(launch, port):
    script = ALONE + "Roll(place, limit=6 if id == 0 else 30)"
    zero, two = launch(0, script, of=4), launch(2, script, of=4)
    expected = (
        rf"-c: processes 1 and 3 of 4 did not come within 6 s; present: process 0 \(host {HOST}, "
        rf"pid {zero.pid}\), process 2 \(host {HOST}, pid {two.pid}\); look at the logs .* ports "
        rf"{port} and {port + 1} "
    )
    for process in (zero, two):
        assert re.match(expected, ended(process, 1)[1])


def test_nobody_writes_into_the_line_of_a_verdict(launch):
    """With PYTHONUNBUFFERED each write of Python is one to the file, and threads take turns."""
    script = (
        ALONE
        + "write, sys.stderr.write = sys.stderr.write, lambda text: write(f'<{text}>')\n"
        + "Roll(place, limit=1)"
    )
    _, err = launch(1, script).communicate(timeout=60)
    assert re.fullmatch("<-c: process 0 of 2 could not be reached [^<>]*\n>", err)


def test_process_0_is_missing(launch, port):
    process = launch(1, ALONE + "Roll(place, limit=1)")
    said = ended(process, 1)[1]
    assert said.startswith(
        f"-c: process 0 of 2 could not be reached at localhost:{port + 1} within"
    )
    assert who(process, 1) in said


@pytest.mark.parametrize(
    ("ids", "sizes", "message"),
    [
        ((1, 1), (3, 3), "two processes have the same id: {} and {}; give each its own"),
        ((1, 0), (3, 2), "{} was started as one of 3 processes, {} as one of 2; give all the"),
    ],
)
def test_who_does_not_fit_is_refused(launch, port, ids, sizes, message):
    script = ALONE + "Roll(place, limit=30)"
    zero = launch(0, script, of=3) if 0 not in ids else None
    others = [launch(id, script, of=of) for id, of in zip(ids, sizes)]
    names = [who(process, id) for process, id in zip(others, ids)]
    for process in [zero, *others] if zero else others:
        said = ended(process, 1)[1]
        assert message.format(*names) in said or message.format(*names[::-1]) in said


def test_who_went_before_the_start_may_come_again(launch):
    script = ALONE + TOGETHER + "  pass"
    zero = launch(0, script, of=3)
    first = launch(
        1,
        ALONE + "import threading\nthreading.Timer(0.5, os._exit, [9]).start()\n"
        "Roll(place, limit=30)",
        of=3,
    )
    ended(first, 9)
    rest = [launch(id, script, of=3) for id in (1, 2)]
    for process in (zero, *rest):
        ended(process, 0)


def test_a_late_double_does_not_end_the_run(launch):
    script = ALONE + TOGETHER + "  sys.stdin.readline() if id else None"
    zero, one = (
        launch(0, script),
        launch(1, script.replace("sys.stdin.readline()", "time.sleep(4)")),
    )
    until(one, "started")
    double = launch(1, script)
    assert f"the same id: {who(one, 1)} and {who(double, 1)}" in ended(double, 1)[1]
    ended(zero, 0), ended(one, 0)


@pytest.mark.parametrize("above", [0, 1])
def test_a_port_in_use_is_said(launch, port, above):
    with socket.create_server(("", port + above)):
        said = ended(launch(0, ALONE + "Roll(place, limit=30)"), 1)[1]
    assert f"cannot listen on ports {port} and {port + 1}" in said and "already in use" in said


# ---------------------------------------------------------------- agreement


def test_what_differs_is_said_by_process_0(launch):
    script = ALONE + "Roll(place, limit=30).agree('the config', {'seed': id // 2, 'patch': 16})\n"
    three = [launch(id, script, of=3) for id in range(3)]
    zero, *others = [process.communicate(timeout=60)[1].splitlines() for process in three]
    assert [process.returncode for process in three] == [1, 1, 1]
    assert zero[-2].startswith("-c: the processes do not agree on the config; start all with")
    assert zero[-1] == "  seed: 0 on processes 0 and 1; 1 on process 2"
    for lines in others:
        assert lines == [zero[-2] + " (more in the output of process 0)"]


def test_who_does_not_come_to_a_meeting_is_named(launch):
    script = ALONE + "roll = Roll(place, limit=30); time.sleep(60 * id)\n"
    zero, one = [launch(id, script + "roll.agree('ready', 1, limit=1)") for id in range(2)]
    for process in (zero, one):
        assert f"{who(one, 1)} has not reached 'ready' within 1 s" in ended(process, 1)[1]


def test_different_points_of_the_run(launch):
    script = ALONE + "roll = Roll(place, limit=30); roll.gather(f'point {id}', 0)"
    zero, one = [launch(id, script) for id in range(2)]
    assert ended(zero, 1)[1] == '  "point 0" on process 0; "point 1" on process 1'
    assert "different points" in ended(one, 1)[1]


def test_differences():
    assert differences([{"a": 1, "b": [1]}, {"b": [1], "a": 1}]) == ""
    assert differences([float("nan"), float("nan")]) == ""
    assert differences([5, 3, 5]) == "  5 on processes 0 and 2; 3 on process 1"
    one, two = {"x": {"y": 1, "z": []}}, {"x": {"y": 1.5, "z": [7]}, "w": None}
    assert differences([one, two]).splitlines() == [
        "  x.y: 1 on process 0; 1.5 on process 1",
        "  x.z: [] on process 0; absent on process 1",
        "  x.z.0: absent on process 0; 7 on process 1",
        "  w: absent on process 0; null on process 1",
    ]
    lines = differences([list(range(50)), list(range(1, 51))]).splitlines()
    assert len(lines) == 11 and lines[-1] == "  and 40 more"


def test_numbers():
    assert numbers([2]) == "process 2"
    assert numbers([0, 1]) == "processes 0 and 1"
    assert numbers([0, 1, 2, 5, 7, 8, 9, 10]) == "processes 0-2, 5 and 7-10"
    assert numbers(range(0, 1000, 2)).endswith(", 36, 38 and more")


# ---------------------------------------------------------------- failure, death, pause


@pytest.mark.parametrize("failing", [0, 1])
def test_an_error_of_one_ends_all(launch, failing):
    script = (
        ALONE
        + TOGETHER
        + (
            f"  if id == {failing}: raise ValueError('config.patch = 7:\\nexpected 8')\n"
            "  time.sleep(60)"
        )
    )
    processes = [launch(id, script) for id in range(2)]
    cause = who(processes[failing], failing)
    said = [process.communicate(timeout=60)[1] for process in processes]
    assert [process.returncode for process in processes] == [1, 1]
    assert said[0].endswith(f"-c: {cause}: config.patch = 7:\nexpected 8\n")
    assert f"-c: {cause}: config.patch = 7:" in said[1]
    assert "Traceback" not in "".join(said)


def test_an_error_that_was_not_foreseen_has_its_traceback_where_it_was(launch):
    script = ALONE + TOGETHER + "  1 / id\n  time.sleep(60)"
    zero, one = [launch(id, script) for id in range(2)]
    err = zero.communicate(timeout=60)[1]
    assert "Traceback" in err and zero.returncode == 1
    assert ended(one, 1)[1] == f"-c: {who(zero, 0)}: ZeroDivisionError: division by zero"


def test_an_error_of_a_collective_waits_for_its_cause(launch):
    """JAX raises such as a ValueError at times."""
    script = (
        ALONE
        + "Roll.ping, Roll.silence = 0.5, 3.0\n"
        + TOGETHER
        + "  if id: raise ValueError('UNKNOWN: Gloo AllGather failed')\n"
        + "  time.sleep(60)"
    )
    zero, one = [launch(id, script) for id in range(2)]
    err = one.communicate(timeout=60)[1]
    assert "UNKNOWN: Gloo AllGather failed; up to 4 s to hear" in err and "Traceback" in err
    assert ended(zero, 1)[1] == f"-c: {who(one, 1)}: ValueError: UNKNOWN: Gloo AllGather failed"
    zero, one = [launch(id, script) for id in range(2)]
    until(one, "started")
    time.sleep(0.5)  # longer than a death takes to be seen
    zero.kill()
    assert "has gone without a word" in verdict(one, EXIT_PEER)


def test_an_error_ends_a_collective_of_the_others(launch):
    script = (
        BOTH
        + TOGETHER
        + ("  if id: roll.fail('no such record', 5)\n  process_allgather(np.ones(3))\n")
    )
    zero, one = [launch(id, script) for id in range(2)]
    for process in (zero, one):
        assert verdict(process, 5) == f"-c: {who(one, 1)}: no such record"


@pytest.mark.parametrize(("victim", "number"), [(0, signal.SIGKILL), (1, signal.SIGTERM)])
def test_a_death_ends_a_collective_of_the_others(launch, victim, number):
    """JAX would call abort(), at once if process 0 is dead, and name nobody."""
    script = (
        BOTH
        + TOGETHER
        + (
            "  process_allgather(np.ones(3))\n"
            f"  if id == {victim}: print('ready', flush=True); time.sleep(60)\n"
            "  process_allgather(np.ones(3))\n"
        )
    )
    two = [launch(id, script) for id in range(2)]
    until(two[victim], "ready")
    time.sleep(0.5)  # the other goes into the collective
    two[victim].send_signal(number)
    assert two[victim].wait(timeout=10) == -number  # JAX has not taken SIGTERM for itself
    start = time.monotonic()
    said = verdict(two[1 - victim], EXIT_PEER)
    assert time.monotonic() - start < 20
    assert said.startswith(
        f"-c: process {victim} of 2 (host {HOST}, pid {two[victim].pid}) has gone without a word"
    )


@pytest.mark.parametrize("victim", [0, 1])
def test_a_paused_process_ends_the_others_and_itself_when_it_comes_back(launch, victim):
    script = ALONE + "Roll.ping, Roll.silence = 0.2, 3.0\n" + TOGETHER + "  time.sleep(60)"
    two = [launch(id, script) for id in range(2)]
    until(two[victim], "started")
    two[victim].send_signal(signal.SIGSTOP)
    said = ended(two[1 - victim], EXIT_PEER)[1]
    assert f"pid {two[victim].pid}) has given no sign of life for 3 s" in said
    two[victim].send_signal(signal.SIGCONT)
    assert "; the run ends here; start all" in ended(two[victim], EXIT_PEER)[1]


def test_a_short_pause_is_forgiven(launch):
    script = ALONE + "Roll.ping, Roll.silence = 0.2, 5.0\n" + TOGETHER + "  time.sleep(2)"
    zero, one = [launch(id, script) for id in range(2)]
    until(one, "started")
    for process in (zero, one):
        process.send_signal(signal.SIGSTOP)
        time.sleep(0.7)
        process.send_signal(signal.SIGCONT)
    ended(zero, 0), ended(one, 0)


# ---------------------------------------------------------------- one process


def test_one_process_has_the_same_calls(capsys):
    with processes.joined(None) as roll:
        roll.agree("the config", {"a": 1})
        assert roll.gather("ids", 7) == [7]
    with pytest.raises(SystemExit) as stopped, processes.joined(None):
        raise ValueError("config.patch = 7")
    assert stopped.value.code == 1 and capsys.readouterr().err.endswith(": config.patch = 7\n")
    with pytest.raises(ZeroDivisionError), processes.joined(None):
        raise ZeroDivisionError
