"""Who has a lock, and when nobody has it any more."""

import errno
import json
import os
import socket
import subprocess
import sys
import threading
import time

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


# ---------------------------------------------------------------- alone in a folder


def test_two_do_not_work_in_one_folder(tmp_path):
    folder = tmp_path / "run"
    with locks.alone(folder):
        with pytest.raises(ValueError, match=f"run: process {os.getpid()} of this host.*wait for"):
            with locks.alone(folder):
                pytest.fail("two are in it")
        with locks.alone(folder, holds=False):  # another process of the same run
            pass
        assert (folder / ".lock").is_file()
    assert not folder.exists()  # nothing was done in it
    with locks.alone(folder):
        locks.give_back_all()  # before os._exit
        assert not folder.exists()
    folder.mkdir()
    with locks.alone(folder):
        pass
    assert list(folder.iterdir()) == []


def test_a_folder_of_a_killed_process_is_free(tmp_path):
    words = (
        "import sys; from masm_jax import locks; entered = locks.alone(sys.argv[1]); "
        "entered.__enter__(); print('in', flush=True); sys.stdin.read()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", words, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdout.readline() == b"in\n"
    with pytest.raises(ValueError, match=f"process {process.pid} of this host"):
        with locks.alone(tmp_path):
            pytest.fail("two are in it")
    process.kill()
    process.communicate()
    with locks.alone(tmp_path):
        pass


def test_without_locks_it_works_and_says_so(tmp_path, monkeypatch, caplog):
    def none(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(locks.fcntl, "flock", none)
    with locks.alone(tmp_path), locks.alone(tmp_path):
        pass
    assert "Function not implemented on this file system" in caplog.text


def test_of_another_host_the_lock_counts_while_it_is_touched(tmp_path, monkeypatch):
    monkeypatch.setattr(locks, "BEAT", 0.2)
    path = tmp_path / ".lock"
    written(path, {"pid": 1, "began": 1}, host="node7")
    beating = threading.Event()

    def touch():
        while not beating.wait(0.05):
            os.utime(path)

    thread = threading.Thread(target=touch)
    thread.start()
    try:
        with pytest.raises(ValueError, match="process 1 of host node7"):
            with locks.alone(tmp_path):
                pytest.fail("node7 works there")
    finally:
        beating.set()
        thread.join()
    with locks.alone(tmp_path):  # gone
        assert json.loads(path.read_text())["host"] == socket.gethostname()
        before = path.stat().st_mtime_ns
        time.sleep(0.5)
        assert path.stat().st_mtime_ns > before


@pytest.mark.parametrize("text", ["", "[]", "1", '{"host": 1}', '{"host": "a"}', "\x00\x00", "{"])
def test_a_lock_that_cannot_be_read_is_stale(tmp_path, text):
    (tmp_path / ".lock").write_text(text)
    with locks.alone(tmp_path):
        pass
