"""Work on many cases in several processes."""

import os
import signal
import subprocess
import sys

import pytest

from masm_jax.parallel import in_order


def square(x):
    return x * x, os.getpid(), os.environ.get("OMP_NUM_THREADS")


def die(x):
    if x == 1:
        os._exit(9)
    return x


@pytest.mark.parametrize("workers", [0, 2])
def test_results_come_in_order_and_jobs_are_taken_as_needed(workers):
    taken = []

    def jobs():
        for x in range(20):
            taken.append(x)
            yield (x,)

    results = in_order(square, jobs(), workers=workers)
    first = next(results)
    assert first[0] == 0 and len(taken) < 20
    values, processes, threads = zip(first, *results)
    assert list(values) == [x * x for x in range(20)]
    assert (os.getpid() in processes) == (workers == 0)
    assert workers == 0 or set(threads) == {"1"}


def test_a_worker_that_dies_is_told_and_not_waited_for():
    with pytest.raises(ValueError, match="worker process died.*about 2 GB.*--workers below 2"):
        list(in_order(die, ((x,) for x in range(5)), workers=2, needs="2 GB"))


INTERRUPTED = """
import os, signal
from masm_jax.parallel import in_order
if __name__ != "__main__":
    os.kill(os.getpid(), signal.SIGINT)  # a worker, while it imports: Ctrl-C reaches all processes
if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's "&" ignores it
    print(list(in_order(pow, [(2, 3), (3, 2)], workers=2)))
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, [])
    os.kill(os.getpid(), signal.SIGINT)
"""


def test_ctrl_c_is_the_parents_alone(tmp_path):
    (tmp_path / "script.py").write_text(INTERRUPTED)
    words = [sys.executable, str(tmp_path / "script.py")]
    done = subprocess.run(
        words,
        capture_output=True,
        text=True,
        cwd=os.getcwd(),
        env=os.environ | {"PYTHONPATH": os.getcwd()},
    )
    assert done.stdout == "[8, 9]\n" and done.returncode == -signal.SIGINT
    assert done.stderr.count("Traceback") == 1  # of the parent, which asked for it
