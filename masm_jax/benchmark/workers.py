"""Measure a function in a process of its own: nothing compiled, cached or allocated before it.

``call("package.module:function", ...)`` starts ``python -m masm_jax.benchmark.workers``, which pins
itself to its cores before anything is imported that counts them, calls the function and hands its
dict back as JSON. This module imports nothing heavy, so that what the function imports is its own.
"""

import contextlib
import importlib
import json
import os
import pathlib
import platform
import signal
import subprocess
import sys
import tempfile
import time

# One thread of each library on one core: pools that are larger than their cores only fight.
_POOLS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
_ROOT = pathlib.Path(__file__).resolve().parents[2]
# glibc keeps freed memory, as ``runtime.start`` tells it to for training: here for both sides.
KEEP_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**64 - 1)}


class Failed(ValueError):
    """The process died, or the function raised; the message has its last words."""


def call(function, *, cores=None, environment=None, **arguments):
    """Run ``MODULE:FUNCTION`` of ``arguments`` in a fresh process.

    Args:
      function: such as "masm_jax.benchmark.feeding:throughput"; returns what JSON can hold.
      cores: numbers of the CPU cores it may use; None: all.
      environment: variables over those of this process.
      **arguments: of the function; what JSON can hold.

    Returns:
      What the function returned.

    Raises:
      Failed: it died or raised.
    """
    environment = os.environ | (environment or {})
    inside = environment.get("PYTHONPATH")
    environment["PYTHONPATH"] = os.pathsep.join([str(_ROOT), *([inside] if inside else [])])
    if cores:
        environment |= dict.fromkeys(_POOLS, str(len(cores)))
    with tempfile.TemporaryDirectory() as folder:
        task, result = pathlib.Path(folder) / "task.json", pathlib.Path(folder) / "result.json"
        task.write_text(json.dumps({"function": function, "cores": cores, "arguments": arguments}))
        with open(pathlib.Path(folder) / "said", "w+") as said:
            process = subprocess.Popen(
                [sys.executable, "-m", __name__, task, result],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=said,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # so that the processes it starts end with it
            )
            try:
                code = process.wait()
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            said.seek(0)
            words = [line.strip() for line in said.read().splitlines() if line.strip()]
        if code:
            reason = f"signal {-code}, often out of memory" if code < 0 else f"exit code {code}"
            raise Failed(f"{function}: {reason}: {' | '.join(words[-3:])}")
        return json.loads(result.read_text())


def cores():
    """Numbers of the CPU cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def machine():
    """What a measurement must be read with: processor, cores in use, load, system, date."""
    name = platform.processor()
    info = pathlib.Path("/proc/cpuinfo")
    if info.is_file():
        lines = (line.partition(":") for line in info.read_text().splitlines())
        name = next((value.strip() for key, _, value in lines if key.strip() == "model name"), name)
    return {
        "processor": name,
        "cores": len(cores()),
        "load": round(os.getloadavg()[0], 2),  # runnable processes over the minute before
        "system": platform.platform(),
        "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%d"),
    }


def family(pid=None):
    """Ids of a process (this one by default) and of all that it has started; Linux."""
    pid = pid or os.getpid()
    found = [pid]
    for tasks in pathlib.Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            for child in tasks.read_text().split():
                found += family(int(child))
    return found


def words(pid):
    """The command line of a process; "" where it is gone."""
    try:
        return pathlib.Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")
    except OSError:
        return ""


def memory(pid=None):
    """Memory of a process in kB, {} where it is gone or this is no Linux.

    Returns:
      {"own": what it has allocated, shared memory too, "share": the same, what it has in common
      with others divided by their number, "rss": with the pages of memory-mapped files, which the
      kernel takes back when it likes}.
    """
    folder = pathlib.Path(f"/proc/{pid or os.getpid()}")
    try:
        lines = (folder / "status").read_text() + (folder / "smaps_rollup").read_text()
    except OSError:
        return {}
    values = dict(line.split(":", 1) for line in lines.splitlines() if ":" in line)
    names = {
        "own": ("RssAnon", "RssShmem"), "share": ("Pss_Anon", "Pss_Shmem"), "rss": ("VmRSS",)
    }  # fmt: skip
    if "RssAnon" not in values:  # it has ended
        return {}
    return {key: sum(int(values[name].split()[0]) for name in of) for key, of in names.items()}


def cpu_seconds(pids):
    """CPU time, user and system, that the processes have used so far, s; Linux."""
    ticks = 0
    for pid in pids:
        with contextlib.suppress(OSError):
            stat = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            ticks += int(stat[11]) + int(stat[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def main(task, result):
    """In the fresh process: pin, import, call, write."""
    task = json.loads(pathlib.Path(task).read_text())
    if task["cores"] and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, task["cores"])
    module, _, name = task["function"].partition(":")
    found = getattr(importlib.import_module(module), name)(**task["arguments"])
    pathlib.Path(result).write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
