"""The config of a run, in its folder: to JSON and back, and what may change after training."""

import ast
import json

import ml_collections

from masm_jax.config import validate
from masm_jax.data.conventions import hint
from masm_jax.files import as_path, read_json, replacing

_RESTORE = "restore it from a copy of the run"
# Keys that older runs lack, with the value that does as they did.
# (But infer.dtype: on a CPU they computed in bfloat16, less exactly and in six times the time.)
LATER = {
    "model.detail": 0, "model.encoder_width": 1.0, "model.encoder_single": 0,
    "model.fused_levels": 6, "infer.dtype": "auto",
}  # fmt: skip
# Keys that runs from 2026-11-30 have and this version has not, with the value that it works by.
GONE = {"model.pair_input": False}
TUNED = "infer.json"  # beside config.json: what masm_jax.tune has chosen
# Keys that may differ between the start of a run and its continuation: they do not touch the
# result, or in its rounding alone.
FREE_TO_CHANGE = (
    "stop_at_step", "accumulate", "mesh.", "model.remat", "data.records", "data.workers", "log.",
    "infer.", "evaluation.",
)  # fmt: skip


def tuned_on(workdir):
    """The cases on which WORKDIR/infer.json was chosen; none without one."""
    path = as_path(workdir) / TUNED
    content = read_json(path, "delete it, and tune again") if path.is_file() else {}
    cases = content.get("cases", [])
    if not (isinstance(cases, list) and all(isinstance(case, str) for case in cases)):
        raise ValueError(f"{path}: cases are no list of names; delete it, and tune again")
    return cases


def override(config, given):
    """Set keys of ``infer`` and ``evaluation``: what may change after training.

    Args:
      config: a ConfigDict; changed in place.
      given: strings such as "infer.flips=0,1,2", "infer.threshold=0.4".

    Raises:
      ValueError: no such key, or a value that it cannot have.
    """
    for text in given:
        key, equals, value = text.partition("=")
        if not equals:
            raise ValueError(f"--set {text}: expected KEY=VALUE, such as infer.flips=0,1,2")
        try:
            value = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            pass  # a word
        section, _, name = key.partition(".")
        if section not in ("infer", "evaluation"):
            raise ValueError(f"--set {text}: only keys of infer. or evaluation. may change here")
        if name not in config[section]:
            known = [f"{section}.{known}" for known in config[section]]
            raise ValueError(
                f"--set {text}: no such key{hint(key, known)}; expected one of {', '.join(known)}"
            )
        _set(config[section], name, value, f"--set {text}")
    validate(config)


def _set(section, name, value, where):
    """One value, of the type that the key has: 1 is a float too, 0.4 a tuple of one."""
    kind = type(section[name])
    if kind in (tuple, list):
        if isinstance(value, str):  # words: t1ce,flair
            value = tuple(word.strip() for word in value.split(","))
        value = tuple(value) if isinstance(value, list | tuple) else (value,)
        with section.unlocked(), section.ignore_type():
            section[name] = value
        return
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind:
        article = "an" if kind is int else "a"
        raise ValueError(f"{where}: expected {article} {kind.__name__}, such as {section[name]}")
    section[name] = value


def to_dict(config):
    """A config as plain JSON types: tuples become lists."""
    return json.loads(config.to_json())


def differences(old, new):
    """Lines "key: old -> new" for every key that differs and matters to the result."""
    old, new = LATER | GONE | _flat(old), LATER | GONE | _flat(new)
    lines = []
    for key in sorted(old.keys() | new.keys()):
        if old.get(key) != new.get(key) and not key.startswith(FREE_TO_CHANGE):
            lines.append(f"{key}: {old.get(key)!r} -> {new.get(key)!r}")
    return lines


def save(config, workdir):
    """Write WORKDIR/config.json, atomically."""
    with replacing(as_path(workdir) / "config.json") as temporary:
        temporary.write_text(json.dumps(to_dict(config), indent=2) + "\n")


def load(workdir, given=(), tuned=True):
    """Read WORKDIR/config.json into a locked ConfigDict, with the values of WORKDIR/infer.json.

    Args:
      workdir: folder of a run.
      given: as of ``override``; they come before what ``masm_jax.tune`` has written to infer.json.
      tuned: take that file.

    Raises:
      ValueError: there is none (not the folder of a run), it cannot be read, or a key is missing or
        out of range.
    """
    path = as_path(workdir) / "config.json"
    if not path.is_file():
        raise ValueError(
            f"{path} does not exist: --workdir must be a folder that train.py has written"
        )
    try:
        config = _from_json(path).lock()
        validate(config)
    except TypeError as error:
        raise ValueError(f"{path} holds a value of another type ({error}); {_RESTORE}") from error
    except (AttributeError, KeyError) as error:
        raise ValueError(
            f"{path} lacks a key ({error}): written by another version of this? Add it with "
            f"its value from configs/masm_brats.py, or use the version that trained the run"
        ) from error
    except ValueError as error:
        named = str(error).removeprefix(f"{path} ").removeprefix(f"{path}: ")
        raise ValueError(f"{path}: {named}") from error
    chosen = path.with_name(TUNED)
    if tuned and chosen.is_file():
        try:
            values = read_json(chosen, "mend it")["infer"]
            override(config, [f"infer.{key}={value!r}" for key, value in values.items()])
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{chosen}: {error}; mend it, or delete it and tune again") from error
    override(config, given)
    return config


def _from_json(path):
    """The config of a run, also of one from before a key of LATER or from when one of GONE was."""
    content = read_json(path, _RESTORE)
    for key, value in GONE.items():
        section, name = key.split(".")
        found = _section(content, section).pop(name, value)
        if found != value:
            raise ValueError(
                f"{path}: {key} = {found!r}: expected {value!r}, the only one that this version "
                f"knows; use the version that trained the run"
            )
    for key, value in LATER.items():
        section, name = key.split(".")
        _section(content, section).setdefault(name, value)
    try:
        return ml_collections.ConfigDict(content)
    except ValueError as error:
        raise ValueError(f"{path}: {error}; {_RESTORE}") from error


def _section(content, name):
    """A part of a config; where the file has none, which is found out later, an empty one."""
    found = content.get(name)
    return found if isinstance(found, dict) else {}


def _flat(tree, prefix=""):
    leaves = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            leaves |= _flat(value, f"{prefix}{key}.")
        else:
            leaves[prefix + key] = value
    return leaves
