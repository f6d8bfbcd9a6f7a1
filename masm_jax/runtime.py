"""Process start: devices, logging, compilation cache, signals, exit codes."""

import ctypes
import faulthandler
import gc
import logging
import os
import pathlib
import re
import signal
import sys
import time

import jax
from absl import flags

from masm_jax.config_file import in_short
from masm_jax.data.conventions import hint
from masm_jax.files import printable, told

_SAME = 1.0  # seconds
_THRESHOLD = gc.get_threshold()
EXIT_ERROR, EXIT_USAGE, EXIT_SOME_FAILED, EXIT_STOPPED, EXIT_PEER = 1, 2, 3, 75, 76
EXIT_INTERRUPTED = 128 + signal.SIGINT  # as shells have it


def start(*, devices=0, cache=True):
    """Set up logging and JAX; call before anything touches a device.

    Args:
      devices: force this many CPU devices (0 leaves it to JAX).
      cache: keep compiled programs in ``~/.cache/masm_jax`` (or $JAX_COMPILATION_CACHE_DIR).
    """
    logging.basicConfig(
        format="%(asctime)s %(levelname).1s %(message)s",
        datefmt="%H:%M:%S",
        stream=sys.stderr,
        force=True,
    )
    logging.getLogger("masm_jax").setLevel(logging.INFO)
    for library in ("absl", "jax", "orbax"):  # checkpointing alone says fifty lines a save
        logging.getLogger(library).setLevel(logging.ERROR)
    # Where a disk is full: tracebacks by thread and by array. Checkpoints says it in a line.
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    logging.getLogger("absl").addFilter(lambda record: "/orbax/" not in record.pathname)
    _quiet_closed_loops()
    keep_memory()
    # kill -USR2 PID asks a run that seems to stand still where each of its threads is.
    faulthandler.register(signal.SIGUSR2, file=sys.__stderr__)
    if devices:
        jax.config.update("jax_num_cpu_devices", devices)
    if cache and not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        folder = pathlib.Path.home() / ".cache" / "masm_jax"
        jax.config.update("jax_compilation_cache_dir", str(folder))
    # Small programs too: a training step comes with eighty, a second of compilation in all.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def collect_rarely():
    """Until ``collect_as_ever``, Python looks for garbage 70 times less often.

    Tracing makes millions of small objects that live on: looking through them again and again took
    a tenth of a start. For good it would be wrong: what a case or a step leaves in circles stayed,
    and a prediction of 300 cases grew by a quarter (docs/reliability.md).
    """
    gc.freeze()
    gc.set_threshold(50_000, 50, 100)


def collect_as_ever():
    """All is traced: what lives now is not looked at again, what is new as often as ever."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(*_THRESHOLD)


def _quiet_closed_loops():
    """Where a write has failed, hundreds that are under way tell it to a loop that is closed."""
    before = sys.unraisablehook
    if before.__module__ == __name__:
        return  # done

    def hook(unraisable):
        if str(unraisable.exc_value) != "Event loop is closed":
            before(unraisable)

    sys.unraisablehook = hook


def keep_memory():
    """Have glibc keep freed memory for the next step instead of handing it back to the kernel.

    XLA's CPU client allocates a step's buffers anew at each call, and without this a fifth of the
    time goes into page faults (docs/performance.md). It does so in this thread, where programs are
    not dispatched to another one: for those glibc maps and unmaps what is larger than 64 MB,
    whatever is set here.
    """
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    if not sys.platform.startswith("linux"):
        return
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return  # another C library, such as musl
    trim_threshold, mmap_max = -1, -4  # malloc.h
    mallopt(mmap_max, 0)
    mallopt(trim_threshold, -1)  # never


def command(name, work, *arguments):
    """Exit code of a command; what the user can mend is one readable line, and so is Ctrl-C.

    Args:
      name: before the line.
      work: gives the exit code.
      *arguments: of it.
    """
    try:
        return work(*arguments)
    except (ValueError, OSError) as error:
        print(f"{name}: {printable(told(error))}", file=sys.stderr)
        return EXIT_ERROR
    except KeyboardInterrupt:
        print(f"{name}: stopped before it was done; start it again", file=sys.stderr)
        return EXIT_INTERRUPTED


def parse_flags(argv):
    """For ``absl.app.run``: a wrong flag or config key is one readable line and exit code 2."""
    try:
        rest = flags.FLAGS(argv)[1:]
        problem = f"unexpected argument {rest[0]!r}: expected --flag=value" if rest else None
        # A config file that is not there shows only where its content is asked for.
        getattr(getattr(flags.FLAGS, "config", None), "keys", None)
    except flags.UnrecognizedFlagError as error:
        problem = f"{error}{_of_config(error.flagname)}"
    except (flags.Error, TypeError, ValueError, OSError) as error:
        problem = _no_config(argv) or _plainly(str(error))
    except (KeyError, AttributeError) as error:  # of ml_collections, for a key the config has not
        problem = f"unknown config key: {in_short(error)}"
        if "get_config" in str(error):
            problem = (
                "the file of --config has no function get_config(); the files in configs/sweeps "
                "are for python -m masm_jax.sweep"
            )
    except (SyntaxError, NameError, ImportError) as error:  # it is a program
        problem = f"the file of --config cannot be run: {type(error).__name__}: {error}"
    except SystemExit:
        if not any(re.fullmatch("--?help(full|short|xml)?", word) for word in argv):
            raise  # of a config file
        sys.exit(0)  # absl takes it for an error
    if problem:
        print(f"{pathlib.Path(argv[0]).name}: {' '.join(problem.split())}", file=sys.stderr)
        sys.exit(EXIT_USAGE)
    return argv[:1]


def _of_config(name):
    """That a flag which there is not may be a key of the config, where there is one."""
    takes = "config" in flags.FLAGS and "." not in name
    return f"; a key of the config is set by --config.KEY=VALUE: --config.{name}" if takes else ""


def _plainly(text):
    """What absl says of a flag, in the words of the other commands."""
    for pattern, words in (
        (r"flag --(\w+)=None: Flag --\w+ must have a value other than None.", r"--\1 is missing"),
        (r"invalid literal for int\(\) with base 10: '.*'", "expected a whole number"),
        (r"could not convert string to float: '.*'", "expected a number"),
    ):
        text = re.sub(pattern, words, text)
    return text


def _no_config(argv):
    """What to say where --config is no file: not what ml_collections makes of it, "" otherwise."""
    given = [word.removeprefix("--config=") for word in argv if word.startswith("--config=")]
    path = pathlib.Path(given[-1].split(":")[0]) if given else None
    if path is None or path.is_file():
        return ""
    beside = [str(place) for place in path.parent.glob("*.py") if place.stem != "__init__"]
    near = hint(str(path), beside)
    return f"--config={path}: no such file{near}; expected such as configs/masm_brats.py"


class StopSignal:
    """Makes the first SIGTERM or Ctrl-C a flag that the loop reads; a later one acts at once.

    Within a second it is taken for the same: a signal to a process group comes twice where make,
    timeout or a launcher in the group passes it on, and the step would not be saved.
    """

    def __init__(self):
        self.name, self._since = None, None
        self._previous = {}

    def __enter__(self):
        for number in (signal.SIGTERM, signal.SIGINT):
            self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_):
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def __bool__(self):
        return self.name is not None

    def _receive(self, number, _frame):
        now = time.monotonic()
        if self.name is not None:
            if now - self._since > _SAME:
                signal.signal(number, self._previous[number])
                signal.raise_signal(number)
            return
        self.name, self._since = signal.Signals(number).name, now
        logging.getLogger("masm_jax").warning(
            "%s: finishing the step and saving; a second one stops at once", self.name
        )
