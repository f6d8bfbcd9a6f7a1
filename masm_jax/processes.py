"""Runs on several processes: finding one's place among them, starting together, ending together.

    place = processes.detect(flags.FLAGS)  # None: a run of one process
    with processes.joined(place, limit=300) as roll:
        roll.agree("the config", config)
        ...

A run ends on all processes or goes on on all: an error of one is printed by process 0 as the cause
and ends the others with the same code (1); after the death of one the others end with code 76. What
lies beneath is in masm_jax/rollcall.
"""

import contextlib
import ctypes
import logging
import pathlib
import re
import signal
import sys
import threading
import traceback

import jax
import jaxlib

from masm_jax.files import told
from masm_jax.launch import Place, define_flags, detect
from masm_jax.rollcall.roll import Roll
from masm_jax.runtime import EXIT_ERROR, EXIT_INTERRUPTED, EXIT_SOME_FAILED, EXIT_STOPPED

__all__ = ["Place", "Roll", "Solo", "define_flags", "detect", "joined", "start"]

# What JAX says first when a computation failed for what may have happened elsewhere.
_ELSEWHERE = re.compile(
    r"(UNKNOWN|INTERNAL|UNAVAILABLE|ABORTED|CANCELLED|DEADLINE_EXCEEDED|FAILED_PRECONDITION): "
)
log = logging.getLogger("masm_jax.processes")


@contextlib.contextmanager
def joined(place, *, limit=300.0, readable=(ValueError, FileNotFoundError)):
    """Start with the other processes, and end with them.

    However the body ends on one process, all end: with it if it is done (no error, or SystemExit
    of code 0, 3 or 75, on every process), else with code 1 and its error as the cause.

    Args:
      place: from detect; None is a run of one process, where no error but those readable is
        touched.
      limit: seconds for all processes to come.
      readable: errors whose text says all; others are printed with their traceback.

    Yields:
      A Roll, or its stand-in for one process.
    """
    roll = start(place, limit=limit) if place else Solo()
    orderly = (None, 0, EXIT_SOME_FAILED, EXIT_STOPPED)
    try:
        yield roll
    except BaseException as error:
        if place and _ELSEWHERE.match(str(error)):  # a ValueError at times
            _failed_collective(roll, error)
        if isinstance(error, readable):
            roll.fail(told(error))
        if place and not (isinstance(error, SystemExit) and error.code in orderly):
            if isinstance(error, Exception):
                traceback.print_exception(error)
            roll.fail(_in_short(error))
        roll.leave()
        if isinstance(error, KeyboardInterrupt) and not place:
            print("stopped before it was done; start it again", file=sys.stderr)
            sys.exit(EXIT_INTERRUPTED)
        raise
    roll.leave()


def start(place, *, limit=300.0, connect_jax=True):
    """Wait for all processes, then connect JAX; before anything touches a device.

    Who is missing at the limit, or has come with another id, number of processes or version of
    JAX, ends all that are there with a line that says so and code 1.

    Args:
      place: from detect.
      limit: seconds for all to come, and for JAX to connect.
      connect_jax: False leaves out jax.distributed.

    Returns:
      The Roll of the run.
    """
    log.info(
        "process %d of %d, by %s; waiting for all at %s, up to %g s",
        place.process_id,
        place.num_processes,
        place.how,
        place.coordinator,
        limit,
    )
    roll = Roll(place, limit=limit)
    versions = {"jax": jax.__version__, "jaxlib": jaxlib.__version__}
    roll.agree("the versions of JAX", versions, limit=limit)
    if connect_jax:
        _connect_jax(roll, limit)
    return roll


def _connect_jax(roll, limit):
    place = roll.place
    _slow_aborts()
    # It would take SIGTERM, which is runtime.StopSignal's; Roll.stopping does what it is for.
    jax.config.update("jax_enable_preemption_service", False)
    # Ahead of JAX's own limit, which is an abort() that names nobody.
    text = (
        f"all are there, but JAX could not connect them at {place.coordinator} within {limit:g} s; "
        f"{place.firewall}"
    )
    late = threading.Timer(limit, roll.fail, [text])
    late.daemon = True
    late.start()
    try:
        jax.distributed.initialize(
            place.coordinator,
            place.num_processes,
            place.process_id,
            place.local_device_ids,
            cluster_detection_method="deactivate",
            initialization_timeout=int(limit) + 60,
            shutdown_timeout_seconds=60,  # all have come to the end by then
        )
    except Exception as error:  # no type is documented
        roll.fail(f"JAX could not connect the processes: {error}")
    finally:
        late.cancel()


def _slow_aborts():
    """Have abort() wait for six seconds, so that a verdict of the roll call comes first.

    When a process is gone, a thread of JAX's coordination in the others says so in a C++ stack and
    calls abort(), at once if it was process 0. Python cannot handle that: its handlers run in the
    main thread, which may be in a collective for ever. But the C function sleep() can be the
    handler: called with the signal's number, 6, it puts that one thread to sleep for 6 seconds (it
    is async-signal-safe); the roll call's thread meanwhile prints the cause and ends the process.
    If it knows of none, abort() goes on as ever.
    """
    if not sys.platform.startswith("linux"):
        return
    libc = ctypes.CDLL(None)
    libc.signal.argtypes, libc.signal.restype = (ctypes.c_int, ctypes.c_void_p), ctypes.c_void_p
    libc.signal(signal.SIGABRT, ctypes.cast(libc.sleep, ctypes.c_void_p))


def _failed_collective(roll, error):
    """Where a process died a collective fails in the others; the roll call may learn of it later.

    Who has died is then the cause, and not the error.
    """
    seconds = roll.silence + 2 * roll.ping
    log.error("%s; up to %g s to hear if another process is the cause", _in_short(error), seconds)
    roll.await_verdict(seconds)
    traceback.print_exception(error)
    roll.fail(_in_short(error))


def _in_short(error):
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


class Solo:
    """A run of one process, by the calls of a Roll."""

    def agree(self, name, value, *, limit=600.0):
        pass

    def gather(self, name, value, *, limit=600.0):
        return [value]

    def stopping(self, step, wanted):
        return bool(wanted)

    def fail(self, text, code=EXIT_ERROR):
        print(f"{pathlib.Path(sys.argv[0]).name}: {text}", file=sys.stderr)
        sys.exit(code)

    def await_verdict(self, seconds):
        pass

    def leave(self, *, limit=600.0):
        pass
