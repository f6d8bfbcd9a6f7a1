"""Processes of this host that are started together."""

import random
import socket
import subprocess

import pytest


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
