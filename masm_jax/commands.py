"""Commands of this project run as processes of their own, from one that waits for them."""

import os
import pathlib
import subprocess
import sys

import masm_jax
from masm_jax import runtime

REPOSITORY = pathlib.Path(masm_jax.__file__).resolve().parents[1]


class Stopped(Exception):
    """A signal has come; what ran has saved."""


def python(words, folder, stop, *, cwd=None, environment=None, started=None):
    """Run ``python WORDS`` to its end, its words going to FOLDER/log.txt.

    Args:
        words: arguments of Python, such as ["train.py", "--workdir=runs/masm"].
        folder: made where it is not there.
        stop: ``runtime.StopSignal``; a signal is passed on.
        cwd: folder to run in; None: that of this process.
        environment: variables over those of this process.
        started: called with the number of the process.

    Raises:
        RuntimeError: it failed; with the last line that it has written.
        Stopped: a signal came, or it says that it was stopped.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "log.txt", "a") as log:
        log.write(f"$ python {' '.join(words)}\n")
        log.flush()
        child = subprocess.Popen(
            [sys.executable, *words],
            cwd=cwd,
            env=os.environ | {"PYTHONUNBUFFERED": "1"} | (environment or {}),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C comes to this process, which passes it on once
        )
        code = _ended(child, stop, started)
    if stop.name or code == runtime.EXIT_STOPPED:
        raise Stopped
    if code:
        said = (folder / "log.txt").read_text().strip().splitlines()[-1]
        name = words[1] if words[0] == "-m" else pathlib.Path(words[0]).name
        raise RuntimeError(f"{name} ended with code {code}: {said} ({folder / 'log.txt'})")


def _ended(child, stop, started):
    """The exit code of a process, which is asked to stop when this one is."""
    asked = False
    try:
        if started is not None:
            started(child.pid)
        while True:
            try:
                return child.wait(timeout=0.2)
            except subprocess.TimeoutExpired:
                if stop.name and not asked:
                    child.terminate()
                    asked = True
    finally:
        if child.poll() is None:  # a second signal
            child.kill()
            child.wait()
