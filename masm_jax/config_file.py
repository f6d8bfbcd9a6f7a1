"""Config files, which are Python: read, with keys set over what they give."""

import ast
import importlib.util
import pathlib
import re


def load_module(path, *, flag="--config", example="configs/masm_brats.py"):
    """The module that a Python file is.

    Args:
      path: of the file.
      flag, example: for the error.

    Raises:
      ValueError: no such file, or it cannot be run.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise ValueError(f"{flag}={path}: no such file; expected such as {example}")
    spec = importlib.util.spec_from_file_location("config_file", path)
    if spec is None:
        raise ValueError(f"{flag}={path}: not a Python file; expected such as {example}")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # of any kind: it is a program
        raise ValueError(f"{flag}={path}: {type(error).__name__}: {error}") from error
    return module


def load_config(path, given=()):
    """Config of a file, locked, with ``given`` = ["model.size=full", ...] over it.

    Raises:
      ValueError: no such file or key, or a value of another type.
    """
    module = load_module(path)
    if not hasattr(module, "get_config"):
        raise ValueError(f"--config={path}: it has no function get_config()")
    config = module.get_config().lock()
    for text in given:
        change(config, dict([parsed(text)]), f"--set {text}")
    return config


def parsed(text):
    """(key, value) of "KEY=VALUE"; what is no Python literal is a word.

    Raises:
      ValueError: no "=" in it.
    """
    key, equals, value = text.partition("=")
    if not equals:
        raise ValueError(f"--set {text}: expected KEY=VALUE, such as model.size=full")
    try:
        return key, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return key, value


def change(config, changes, where):
    """Set keys of a locked config, each of the type that it has.

    Args:
      config: a ConfigDict; changed in place.
      changes: {"model.size": "full", ...}.
      where: for the error: what asks for it.

    Raises:
      ValueError: no such key, or a value of another type.
    """
    try:
        config.update_from_flattened_dict(dict(changes))
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{where}: {in_short(error)}") from error


def in_short(error):
    """What ml_collections says of a key, in a line: without the whole config that it quotes."""
    said = re.sub(r"[\\'\"]*\\n|[\\'\"]+", " ", str(error))
    said = re.sub(r"Other fields present:.*?(?=Did you mean|$)", "", said, flags=re.DOTALL)
    return " ".join(said.split())
