"""Files and folders that are there whole or not at all, on this machine or in a bucket."""

import contextlib
import os
import pathlib
import shutil
import tempfile
from collections.abc import Iterator

from etils import epath


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
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)
