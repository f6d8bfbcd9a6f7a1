"""A network in one folder that needs no config and none of the code that built it.

    FOLDER/network.PLATFORM.jaxexport   (weights, tiles) -> logits, serialised by ``jax.export``
    FOLDER/weights.npz                  the averaged weights, one float32 array per name
    FOLDER/export.json                  the ``Settings``, the preparation, versions, sha256 of the
                                        other files

Weights are arguments of the program, not constants in it: one file of them serves all platforms,
and any number of tiles can be segmented at once. No pickle anywhere.
"""

import dataclasses
import hashlib
import io
import json
import pathlib

import jax
import jax.export
import numpy as np

from masm_jax import sharding
from masm_jax.data import preprocess
from masm_jax.files import replacing_folder
from masm_jax.inference.volume import Segmenter, Settings

FORMAT, VERSION = "masm_jax export", 1
PLATFORMS = ("cpu", "cuda", "rocm", "tpu")
_ABOUT, _WEIGHTS = "export.json", "weights.npz"


def program_file(platform):
    """Name of the file with the program for a platform."""
    return f"network.{platform}.jaxexport"


def check_target(folder):
    """See that an export may be written to ``folder``: not there, empty, or an older export.

    Raises:
      ValueError: something else is there, and would be lost.
    """
    folder = pathlib.Path(folder)
    if not folder.exists():
        return
    if not folder.is_dir():
        raise ValueError(f"--output={folder} is a file; expected a folder, name another")
    there = {path.name for path in folder.iterdir()}
    ours = {_ABOUT, _WEIGHTS, *map(program_file, PLATFORMS)} if _ABOUT in there else set()
    if ours:
        _read_about(folder)
    if there - ours:
        raise ValueError(
            f"--output={folder} holds {', '.join(sorted(there - ours)[:3])}, no part of an export; "
            f"expected an empty folder or an older export: name another, or clear it"
        )


def write_export(folder, programs, weights, settings, about):
    """Write an export, whole or not at all.

    Args:
      folder: as ``check_target`` allows; an older export there is replaced.
      programs: {platform: ``jax.export.Exported``}.
      weights: {name: float32 array}, the first argument of every program.
      settings: the ``Settings``.
      about: further JSON-able entries of export.json; "spacing" (mm of the prepared images, or
        None) is needed to segment.
    """
    check_target(folder)
    buffer = io.BytesIO()
    np.savez(buffer, **weights)
    files = {program_file(p): bytes(program.serialize()) for p, program in programs.items()}
    files[_WEIGHTS] = buffer.getvalue()
    about = {
        "format": FORMAT,
        "version": VERSION,
        "notice": "research software, not a medical device",
        **about,
        "preprocessing": preprocess.VERSION,
        "settings": dataclasses.asdict(settings),
        "platforms": list(programs),
        "calling_convention": next(iter(programs.values())).calling_convention_version,
        "sha256": {name: hashlib.sha256(content).hexdigest() for name, content in files.items()},
    }
    files[_ABOUT] = (json.dumps(about, indent=2) + "\n").encode()
    with replacing_folder(folder) as temporary:
        for name, content in files.items():
            (temporary / name).write_bytes(content)


def load_export(folder, *, mesh=None):
    """The network of an export.

    Args:
      folder: as ``write_export`` leaves it.
      mesh: of the devices to run on; all by default.

    Returns:
      segmenter, and the content of export.json (step, spacing, ...).

    Raises:
      ValueError: no export, of a newer format, damaged, or not for this platform or version of JAX.
    """
    folder = pathlib.Path(folder)
    about = _read_about(folder)
    try:
        _check_versions(folder, about)
        settings = about["settings"]
        settings = Settings(**settings | {"modalities": tuple(settings["modalities"])})
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"{folder / _ABOUT} is not as masm_jax.export wrote it ({error}); export again"
        ) from error
    platform = jax.export.default_export_platform()
    if platform not in about["platforms"]:
        wanted = ",".join([*about["platforms"], platform])
        raise ValueError(
            f"{folder} has programs for {', '.join(about['platforms'])}; this process computes on "
            f"{platform}; export again: python -m masm_jax.export --workdir={about['run']} "
            f"--output={folder} --platforms={wanted}"
        )
    content = {name: _read(folder / name, digest) for name, digest in about["sha256"].items()}
    with np.load(io.BytesIO(content[_WEIGHTS]), allow_pickle=False) as arrays:
        weights = dict(arrays)
    program = _program(folder / program_file(platform), content[program_file(platform)], about)
    mesh = mesh or sharding.make_mesh(jax.local_devices())
    return Segmenter(program.call, weights, mesh, settings), about


def _read_about(folder):
    """export.json, of any version."""
    path = folder / _ABOUT
    if not path.is_file():
        raise ValueError(
            f"{path} does not exist: expected a folder that python -m masm_jax.export has written"
        )
    try:
        about = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}); copy it again, or export again") from error
    if not isinstance(about, dict) or about.get("format") != FORMAT:
        raise ValueError(f"{path} is not of an export: expected the format {FORMAT!r} in it")
    return about


def _check_versions(folder, about):
    made = f"{folder} was made by masm_jax {about['masm_jax']} with jax {about['jax']}"
    if about["version"] > VERSION:
        raise ValueError(
            f"{made}, in version {about['version']} of the format; this masm_jax reads up to "
            f"{VERSION}: update it, or export again with it"
        )
    if about["preprocessing"] != preprocess.VERSION:
        raise ValueError(
            f"{made}, for scans prepared by version {about['preprocessing']}; this masm_jax "
            f"prepares by version {preprocess.VERSION}: use {about['masm_jax']}, or train again"
        )
    low = jax.export.minimum_supported_calling_convention_version
    high = jax.export.maximum_supported_calling_convention_version
    if not low <= about["calling_convention"] <= high:
        raise ValueError(
            f"{made}, in calling convention {about['calling_convention']}; jax {jax.__version__} "
            f"runs {low} to {high}: use a jax closer to {about['jax']}, or export again"
        )


def _program(path, content, about):
    try:
        program = jax.export.deserialize(bytearray(content))
        program.mlir_module()  # parsed already here, and not at the first tile
    except Exception as error:  # of any kind; the bytes are those that were written
        raise ValueError(
            f"{path} cannot be read by jax {jax.__version__}, it was written by {about['jax']} "
            f"({error}); {about['guarantee']}: use such a version, or export again"
        ) from error
    return program


def _read(path, digest):
    """The bytes of a file, if they are those that were written."""
    if not path.is_file():
        raise ValueError(f"{path} is missing; copy the whole folder again, or export again")
    content = path.read_bytes()
    if hashlib.sha256(content).hexdigest() != digest:
        raise ValueError(
            f"{path} is not the file that was exported (its sha256 differs from export.json): "
            f"damaged or swapped; copy the whole folder again, or export again"
        )
    return content
