"""A file that says which process works on something, so that a second one leaves it alone.

The file holds host and process; where that process is gone, whatever ended it, the lock is stale
and the next one takes it. What a process of another host does cannot be seen from here: its lock
stays until somebody deletes the file, which the message says.
"""

import contextlib
import datetime
import fcntl
import json
import os
import pathlib
import socket


class Lock:
    """One lock file.

    Args:
        path: of the file; its folder is made where it is not there.
    """

    def __init__(self, path):
        self.path = pathlib.Path(path)
        self._mine = None

    def take(self):
        """Take it, unless a process that lives has it.

        Returns:
            None: it is ours now; else who has it, in words.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self._opened(create=True) as file:
            holder = _content(file)
            if holder and (words := _living(holder)):
                return f"{words}, lock {self.path}"
            self._mine = {
                "host": socket.gethostname(),
                "processes": [_process(os.getpid())],
                "since": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
            }
            _write(file, self._mine)
        return None

    def with_child(self, pid):
        """Let the lock outlive this process for as long as another one of this host works on."""
        own = self._mine["processes"][:1]
        self._mine = self._mine | {"processes": [*own, _process(pid)]}
        with self._opened() as file:
            _write(file, self._mine)

    def release(self):
        """Give it back; nothing happens where it is another's by now."""
        mine, self._mine = self._mine, None
        with contextlib.suppress(FileNotFoundError), self._opened() as file:
            if mine is not None and _content(file) == mine:
                self.path.unlink()

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
        return json.load(file)
    except ValueError:  # empty: new, or a machine that went down while it was written
        return {}


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
