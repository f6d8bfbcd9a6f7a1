"""A measurement in a process of its own: its result, its cores, its end."""

import json
import os
import subprocess
import sys
import time

import pytest

from masm_jax.benchmark import workers

HERE = "masm_jax.benchmark.workers"


def test_the_result_comes_back_and_the_process_is_pinned():
    last = workers.cores()[-1:]
    assert workers.call(f"{HERE}:cores", cores=last) == last
    assert workers.call("textwrap:shorten", text="a  b", width=9) == "a b"


def test_what_goes_wrong_is_said():
    with pytest.raises(workers.Failed, match="expected at most 1 argument|unexpected keyword"):
        workers.call(f"{HERE}:cores", unknown=1)


GROWN = """
import json, mmap, os
from masm_jax.benchmark import workers
before = workers.memory()
held = mmap.mmap(-1, 2**25, mmap.MAP_PRIVATE)  # pages of its own, where no freed ones serve
held.write(os.urandom(len(held)))
print(json.dumps([before, workers.memory()]))
"""


def test_memory_of_a_process():
    """A fresh one: the threads of this one give back what other tests have held."""
    done = subprocess.run([sys.executable, "-c", GROWN], capture_output=True, text=True, check=True)
    before, after = json.loads(done.stdout)
    for kind in ("own", "share", "rss"):
        assert after[kind] - before[kind] > 0.9 * 2**25 / 1024


def test_time_of_a_process():
    used = workers.cpu_seconds([os.getpid()])
    start = time.process_time()
    while time.process_time() < start + 0.1:  # a clock of ticks sees a tenth of a second
        pass
    assert workers.cpu_seconds([os.getpid()]) > used
    assert workers.family()[0] == os.getpid()
    assert workers.memory(2**30) == {}
