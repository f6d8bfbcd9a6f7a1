"""What processes that are started together run, and what they have said when they end."""

import socket
import time

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
