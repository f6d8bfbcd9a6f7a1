"""One network in a process of its own, measured when asked: started by ``compare``, not by hand.

    python -m masm_jax.benchmark.worker '{"network": "dynunet", ...}'

Reads a line of seconds from standard input, calls the network for that long, and answers with a
line of JSON; in between it waits for the next line and takes no time from anybody. What libraries
print goes to standard error.
"""

import contextlib
import ctypes
import dataclasses
import importlib
import json
import os
import pathlib
import re
import signal
import statistics
import sys
import time

LEAST_CALLS = 3


def main():
    """Exit code: 0 when standard input ends, 1 after {"error": reason}."""
    _end_with_parent()
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    job = json.loads(sys.argv[1])
    if hasattr(os, "sched_setaffinity"):  # before any library counts the cores
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: job["threads"]])
    try:
        side, arguments = _side(job)
        before = _memory("VmRSS")
        call, first = side.prepare(**arguments), None
        for line in sys.stdin:
            found = measure(call, float(line), warm=first is not None)
            first = first or found["first"]
            peak = side.peak_bytes(job["device"])
            found["peak"] = _memory("VmHWM") - before if peak is None else peak
            answers.write(json.dumps(found | {"versions": side.versions(job["device"])}) + "\n")
    except Exception as error:  # whatever it is, it is the reason why this network has no numbers
        import traceback

        traceback.print_exc()
        said = " ".join(str(error).split()) or type(error).__name__
        answers.write(json.dumps({"error": said[:300]}) + "\n")
        return 1
    return 0


def _end_with_parent():
    """On Linux, also where the command is killed in the middle of a measurement."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def _side(job):
    """Module of the framework, imported, and the arguments of its ``prepare``."""
    from masm_jax.benchmark import peers

    entry = peers.NETWORKS[job["network"]]
    arguments = {name: job[name] for name in ("patch", "batch", "dtype", "mode", "device")}
    if entry.framework == "jax":
        from masm_jax import runtime
        from masm_jax.benchmark import jax_side as side

        runtime.keep_memory()
        entry = dataclasses.replace(entry, **job.get("ours", {}))
        arguments |= {"ours": entry, "config": job["config"], "limit": job.get("limit")}
    else:
        import torch

        from masm_jax.benchmark import torch_side as side

        # All that is imported is no memory of the network. Without MONAI ``build`` says why.
        with contextlib.suppress(ImportError):
            importlib.import_module(entry.module)
        if job["variant"] == "compile":
            importlib.import_module("torch._dynamo")
        torch.set_num_threads(job["threads"])
        arguments |= {"peer": entry, "variant": job["variant"]}
    return side, arguments


def measure(call, seconds, *, warm=False, clock=time.perf_counter):
    """Time a function again and again.

    Args:
      call: without arguments; returns when its work is done.
      seconds: to go on for; LEAST_CALLS at least.
      warm: whether it has run before; if not, two calls go ahead, of which the first compiles.
      clock: in seconds.

    Returns:
      {"first": seconds of the first call, None if ``warm``; "median", "calls"}.
    """

    def timed():
        began = clock()
        call()
        return clock() - began

    first = None
    if not warm:
        first = timed()
        timed()
    times, end = [], clock() + seconds
    while len(times) < LEAST_CALLS or clock() < end:
        times.append(timed())
    return {"first": first, "median": statistics.median(times), "calls": len(times)}


def _memory(kind):
    """Bytes of this process: "VmRSS" now, "VmHWM" at most; 0 where the system does not say."""
    status = pathlib.Path("/proc/self/status")
    found = re.search(rf"{kind}:\s+(\d+) kB", status.read_text()) if status.exists() else None
    return 1024 * int(found.group(1)) if found else 0


if __name__ == "__main__":
    sys.exit(main())
