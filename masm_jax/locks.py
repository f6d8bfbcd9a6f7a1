"""A file that says which process works on something, so that a second one leaves it alone.

The file holds host and process; where that process is gone, whatever ended it, the lock is stale
and the next one takes it. What a process of another host does cannot be seen from here: its lock
stays until somebody deletes the file, which the message says.
"""

import contextlib
import datetime
import errno
import fcntl
import json
import logging
import os
import pathlib
import socket
import threading
import time

from masm_jax.files import as_path, is_remote

_log = logging.getLogger(__name__)
_NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK)  # flock() on Lustre, unless mounted with it
BEAT = 20.0  # seconds between signs of life of who works alone in a folder
_held: set["Lock"] = set()  # of ``alone``


@contextlib.contextmanager
def alone(folder, *, holds=True):
    """Work in a folder in which no other process works in this way.

    While it works, the lock is touched. So that of a host that is gone can be told from that of one
    that works: it is watched for three beats before it is taken, which is what a job that is
    started again on another node needs.

    Args:
        folder: made where it is not there. One in a bucket has no lock.
        holds: False does nothing: of many processes of one run, one holds the lock.

    Raises:
        ValueError: another process works there; the message says which.
    """
    if not holds or is_remote(folder):
        yield
        return
    lock = Lock(as_path(folder) / ".lock")
    try:
        holder = lock.take()
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        _log.warning(
            "%s: %s on this file system, where a second process is not seen: start one alone",
            folder, error.strerror,
        )  # fmt: skip
        yield
        return
    if holder and lock.of_another_host():
        _log.warning("%s: %s; looking for %d s whether it lives", folder, holder, 3 * BEAT)
        if _untouched(lock.path, 3 * BEAT):
            holder = lock.take(over_hosts=True)
    if holder:
        raise ValueError(f"{folder}: {holder}; wait for it, stop it, or name another folder")
    ended = threading.Event()
    thread = threading.Thread(target=_beat, args=(lock.path, ended), daemon=True)
    thread.start()
    _held.add(lock)
    try:
        yield
    finally:
        ended.set()
        thread.join()
        lock.release()
        _held.discard(lock)


def give_back_all():
    """What ``alone`` holds, for an end by ``os._exit``: nothing is unwound then."""
    for lock in list(_held):
        with contextlib.suppress(OSError):
            lock.release()


def _beat(path, ended):
    while not ended.wait(BEAT):
        with contextlib.suppress(OSError):
            os.utime(path)


def _untouched(path, seconds):
    """Whether a file stays as it is for so long; its own times are compared, no clocks."""
    before = _touched(path)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        time.sleep(min(1.0, seconds / 3))
        if _touched(path) != before:
            return False
    return True


def _touched(path):
    try:
        return path.stat().st_mtime_ns
    except FileNotFoundError:
        return None


class Lock:
    """One lock file.

    Args:
        path: of the file; its folder is made where it is not there.
    """

    def __init__(self, path):
        self.path = pathlib.Path(path)
        self._mine, self._made_folder = None, False

    def take(self, over_hosts=False):
        """Take it, unless a process that lives has it.

        Args:
            over_hosts: also that of another host, of which it is known that it is gone.

        Returns:
            None: it is ours now; else who has it, in words.
        """
        self._made_folder = not self.path.parent.exists()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self._opened(create=True) as file:
            holder = _content(file)
            gone = over_hosts and holder and holder["host"] != socket.gethostname()
            if holder and not gone and (words := _living(holder)):
                return f"{words}, lock {self.path}"
            self._mine = {
                "host": socket.gethostname(),
                "processes": [_process(os.getpid())],
                "since": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
            }
            _write(file, self._mine)
        return None

    def of_another_host(self):
        """Whether a process of another host has it."""
        with contextlib.suppress(FileNotFoundError), self._opened() as file:
            return _content(file).get("host") not in (None, socket.gethostname())
        return False

    def with_child(self, pid):
        """Let the lock outlive this process for as long as another one of this host works on."""
        own = self._mine["processes"][:1]
        self._mine = self._mine | {"processes": [*own, _process(pid)]}
        with self._opened() as file:
            _write(file, self._mine)

    def release(self):
        """Give it back, and a folder that was made for it and is empty; nothing happens where it is
        another's by now."""
        mine, self._mine = self._mine, None
        with contextlib.suppress(FileNotFoundError), self._opened() as file:
            if mine is not None and _content(file) == mine:
                self.path.unlink()
        if mine is not None and self._made_folder:
            with contextlib.suppress(OSError):  # something was done there
                self.path.parent.rmdir()

    @contextlib.contextmanager
    def _opened(self, create=False):
        """The file, which no other process reads or changes meanwhile."""
        while True:
            descriptor = os.open(self.path, os.O_RDWR | (os.O_CREAT if create else 0), 0o644)
            with open(descriptor, "r+", encoding="utf-8") as file:
                fcntl.flock(file, fcntl.LOCK_EX)  # until it is closed
                if not _same(file, self.path):  # removed while we waited: write to the next one
                    continue
                yield file
                return


def _same(file, path):
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    except FileNotFoundError:
        return False


def _content(file):
    file.seek(0)
    try:
        content = json.load(file)
        living = isinstance(content["host"], str) and content["since"]
        known = living and [int(one["pid"]) for one in content["processes"] if "began" in one]
    except (ValueError, KeyError, TypeError):  # empty: new, or a machine went down while it was
        return {}  # written
    return content if known else {}


def _write(file, content):
    file.seek(0)
    file.truncate()
    json.dump(content, file)
    file.flush()


def _process(pid):
    """A process and when it began, as numbers are given again."""
    return {"pid": pid, "began": _began(pid)}


def _living(holder):
    """Who holds the lock, in words; None where it is stale."""
    if holder["host"] != socket.gethostname():
        return (
            f"process {holder['processes'][0]['pid']} of host {holder['host']} since "
            f"{holder['since']}; if it is gone, delete the lock"
        )
    for process in holder["processes"]:
        if _lives(process):
            return f"process {process['pid']} of this host since {holder['since']}"
    return None


def _lives(process):
    try:
        os.kill(process["pid"], 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # another user's
    began = _began(process["pid"])
    return began != "ended" and began == process["began"]


def _began(pid):
    """When a process began, in ticks since the machine started; "ended" of one that nobody has
    waited for; None where /proc does not say it (macOS)."""
    try:
        stat = pathlib.Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    fields = stat.rpartition(")")[2].split()
    return "ended" if fields[0] in "ZX" else int(fields[19])
