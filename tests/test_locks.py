"""Who has a lock, and when nobody has it any more."""

import json
import os
import socket
import subprocess
import sys

import pytest

from masm_jax import locks
from masm_jax.locks import Lock


@pytest.fixture
def sleeper():
    """A process that lives."""
    process = subprocess.Popen(["sleep", "60"])
    yield process
    process.kill()
    process.wait()


def dead():
    """The number of a process that has ended."""
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


def written(path, *processes, host=None):
    """A lock that another process has left."""
    content = {"host": host or socket.gethostname(), "processes": list(processes), "since": "noon"}
    path.write_text(json.dumps(content))
    return Lock(path)


def test_one_has_it_at_a_time(tmp_path):
    path = tmp_path / "run" / "lock"
    first, second = Lock(path), Lock(path)
    assert first.take() is None
    assert f"process {os.getpid()} of this host since " in second.take()
    assert json.loads(path.read_text())["host"] == socket.gethostname()
    second.release()  # it had none
    assert path.is_file()
    first.release()
    assert not path.exists() and second.take() is None
    first.release()
    assert path.is_file()


def test_a_dead_process_has_no_lock(tmp_path, sleeper):
    path = tmp_path / "lock"
    assert written(path, {"pid": dead(), "began": None}).take() is None
    living = {"pid": sleeper.pid, "began": locks._began(sleeper.pid)}
    assert f"process {sleeper.pid} " in written(path, living).take()
    # Its number was given again: this one began at another time.
    assert written(path, living | {"began": 12345}).take() is None
    path.write_text('{"host": ')  # the machine went down
    assert Lock(path).take() is None


def test_a_process_that_nobody_has_waited_for_is_dead(tmp_path):
    process = subprocess.Popen(["sleep", "60"])
    holder = {"pid": process.pid, "began": locks._began(process.pid)}
    process.kill()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # ended, and still in the table
    assert written(tmp_path / "lock", holder).take() is None
    process.wait()


def test_what_a_dead_process_has_started_keeps_the_lock(tmp_path, sleeper):
    path = tmp_path / "lock"
    mine = Lock(path)
    mine.take()
    mine.with_child(sleeper.pid)
    content = json.loads(path.read_text())
    assert [one["pid"] for one in content["processes"]] == [os.getpid(), sleeper.pid]
    orphaned = written(path, {"pid": dead(), "began": None}, content["processes"][1])
    assert f"process {sleeper.pid} of this host" in orphaned.take()


def test_another_host_is_believed(tmp_path):
    path = tmp_path / "lock"
    said = written(path, {"pid": dead(), "began": 1}, host="node7").take()
    assert "of host node7 since noon; if it is gone, delete the lock" in said and str(path) in said


def test_of_many_that_find_it_stale_one_takes_it(tmp_path):
    path = tmp_path / "lock"
    written(path, {"pid": dead(), "began": None})
    words = (
        "import sys; from masm_jax.locks import Lock; sys.stdin.read(1); "
        f"taken = Lock({str(path)!r}).take() is None; print(taken, flush=True); sys.stdin.read(1)"
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    crowd = [subprocess.Popen([sys.executable, "-c", words], **pipes) for _ in range(6)]
    for process in crowd:
        process.stdin.write("g")
        process.stdin.flush()
    assert sorted(process.stdout.readline() for process in crowd) == ["False\n"] * 5 + ["True\n"]
    for process in crowd:
        process.communicate("e")
