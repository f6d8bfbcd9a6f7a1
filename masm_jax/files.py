"""Files and folders that are there whole or not at all, on this machine or in a bucket."""

import contextlib
import errno
import json
import os
import pathlib
import shutil
import tempfile
from collections.abc import Iterator
from typing import Any

from etils import epath

LONGEST_NAME = 200  # bytes; file systems take 255, and endings are put after it
_SILENT = "see to the disk or to its mount"
_RIGHTS = "change its rights, or name another place"
_FIXES = {
    errno.ENOSPC: "free space there, and start the same command again",
    errno.EDQUOT: "free space there or get a larger quota, and start the same command again",
    errno.EROFS: "name a place that can be written to",
    errno.EACCES: _RIGHTS,
    errno.EPERM: _RIGHTS,
    errno.ENOENT: "correct the path, or mount what it is on",
    errno.ENOTDIR: "correct the path",
    errno.EISDIR: "name a file",
    errno.EMFILE: "raise the limit on open files (ulimit -n), or use fewer workers",
    errno.EIO: _SILENT,
    errno.ESTALE: _SILENT,
    errno.ENOTCONN: _SILENT,
    errno.ETIMEDOUT: _SILENT,
}


def as_path(place: str | os.PathLike) -> pathlib.Path:
    """An absolute path; one with a scheme, such as gs://bucket/run, as ``etils.epath`` has it.

    Raises:
        ValueError: a scheme that epath does not know.
    """
    text = os.fspath(place)
    scheme, found, rest = text.partition("://")
    if not found or scheme == "file":
        return pathlib.Path(rest if found else text).absolute()
    if scheme not in ("gs", "s3", "az"):
        raise ValueError(f"{text}: no such scheme; expected a folder, or gs://, s3:// or az://")
    return epath.Path(text)


def name_fault(name: str) -> str:
    """What is wrong with the name of a case or region, of which files are named; "" if nothing is.

    Names come from the files of a data set, from descriptions and from records, which may be
    anybody's: one must not lead out of the folder it is used in, nor say something else on a
    terminal than it is.
    """
    if not isinstance(name, str):
        return f"name {name!r}, expected text"
    if not name or name.startswith(".") or set(name) & set("/\\"):
        return f"name {name!r}, expected one for a file: no / or \\, no point at its start"
    if not name.isprintable():
        return f"name {name!a}, expected characters that can be printed, in UTF-8"
    size = len(name.encode())
    return f"name of {size} bytes, expected at most {LONGEST_NAME}" if size > LONGEST_NAME else ""


def printable(text: str) -> str:
    """The text with control characters, and what is no UTF-8, as escapes: it may be anybody's."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def of_case(case: str, reason: str) -> str:
    """Why a case failed, printable, and with its name, which some reasons begin with."""
    return printable(reason if reason.startswith(case) else f"{case}: {reason}")


def told(error: BaseException) -> str:
    """What an error says to the user: one of the system's as place, what is wrong, and the fix."""
    if not isinstance(error, OSError) or not error.strerror:
        return str(error)
    place = "" if error.filename is None else f"{printable(os.fsdecode(error.filename))}: "
    fix = _FIXES.get(error.errno or 0)
    return place + error.strerror + (f"; {fix}" if fix else "")


def read_json(path: str | os.PathLike, fix: str, kind: type = dict) -> Any:
    """The content of a JSON file that a command of this project has written.

    Args:
        path: The file.
        fix: What to do where it is damaged, for the message.
        kind: What it should hold.

    Raises:
        ValueError: It is not there or damaged; the message names it.
    """
    path = as_path(path)
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise ValueError(f"{path} is missing; {fix}") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({error}), expected JSON; {fix}") from error
    if not isinstance(content, kind):
        found = type(content).__name__
        raise ValueError(f"{path} holds a {found}, expected a {kind.__name__}; {fix}")
    return content


def check_output(folder: str | os.PathLike, *, flag: str = "--output") -> None:
    """See that what ``flag`` names can be a folder, before hours of work go into it.

    Raises:
        ValueError: it, or what it should be in, is a file.
        OSError: it cannot be written to.
    """
    for place in (as_path(folder), *as_path(folder).parents):
        if place.exists():
            if not place.is_dir():
                raise ValueError(f"{flag}={folder}: {place} is a file; name a folder")
            if not is_remote(place) and not os.access(place, os.W_OK | os.X_OK):
                read_only = os.statvfs(place).f_flag & os.ST_RDONLY
                code = errno.EROFS if read_only else errno.EACCES
                raise OSError(code, os.strerror(code), str(place))
            return


def is_remote(path: str | os.PathLike) -> bool:
    """Whether it is in a bucket: no renaming, no appending, and the network in between."""
    return "://" in os.fspath(path)


@contextlib.contextmanager
def replacing(path: str | os.PathLike) -> Iterator[pathlib.Path]:
    """A temporary name that becomes `path` at the end: readers never see half a file."""
    path = as_path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if is_remote(path):  # an object appears whole, when its upload is done
        with tempfile.TemporaryDirectory() as folder:
            temporary = pathlib.Path(folder) / path.name
            yield temporary
            path.write_bytes(temporary.read_bytes())
        return
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        raise _named(error, path) from error
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def replacing_folder(path: str | os.PathLike) -> Iterator[pathlib.Path]:
    """The same for a folder, filled under a temporary name; what was at `path` is removed."""
    path = pathlib.Path(path).resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary, old = (path.with_name(f".{path.name}.{os.getpid()}.{end}") for end in ("tmp", "old"))
    temporary.mkdir()
    try:
        yield temporary
        if path.exists():
            os.rename(path, old)  # a folder cannot be renamed onto another with files in it
        try:
            os.rename(temporary, path)
        except OSError:
            if old.exists():
                os.rename(old, path)
            raise
    except OSError as error:
        raise _named(error, path) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def _named(error: OSError, path: pathlib.Path) -> OSError:
    """The error with a file: writing to an open one does not say to which."""
    if error.filename is not None or error.errno is None:
        return error
    return OSError(error.errno, error.strerror, str(path))
