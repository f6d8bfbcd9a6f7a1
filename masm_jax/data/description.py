"""Descriptions of data sets that are none of the built-in conventions: a JSON or Python file."""

import json
import reprlib
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

from masm_jax.data.conventions import Convention, hint
from masm_jax.files import name_fault


def load_description(path: Path | str) -> Convention:
    """Loads a description of any data set.

    A JSON file holds one object, a Python file assigns the same as a dict to ``description``. Keys:
    ``files`` (modality -> pattern or list of patterns) and ``regions`` (region -> label values,
    outer to inner) are needed; ``name``, ``modalities`` (the order, default that of ``files``),
    ``segmentation`` (pattern), ``labels`` (file value -> internal value, default the same),
    ``paint`` (region -> file value), ``channels`` (modality -> index in a 4-D file), ``pairs``,
    ``window`` and ``brain`` (as in ``Convention``) are optional.

    Args:
        path: The description file.

    Returns:
        The convention.

    Raises:
        ValueError: The file cannot be read or something in it is missing or contradictory.
    """
    path = Path(path)
    content = _content(path)
    try:
        _check_types(content)
        return _from_description(content, path.stem)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _content(path: Path) -> Any:
    try:
        if path.suffix != ".py":
            return json.loads(path.read_text(encoding="utf-8"))
        found = runpy.run_path(str(path))
    except Exception as error:  # of any kind: a Python file is a program, JSON may nest too deep
        raise ValueError(
            f"{path}: cannot be read ({type(error).__name__}: {error}); expected a JSON file or a "
            "Python file that sets 'description'"
        ) from error
    if "description" not in found:
        raise ValueError(f"{path}: no variable 'description'; assign the dict to it")
    return found["description"]


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e30


def _is_integer(value: object) -> bool:
    whole = isinstance(value, int) or isinstance(value, str) and value.isdecimal()
    return whole and not isinstance(value, bool) and len(str(value)) < 5


def _is_list(inside: Callable[[object], bool]) -> Callable[[object], bool]:
    return lambda value: isinstance(value, list | tuple) and all(map(inside, value))


def _is_dict(inside: Callable[[object], bool]) -> Callable[[object], bool]:
    return lambda value: isinstance(value, dict) and all(map(inside, value.values()))


def _is_text(value: object) -> bool:
    return isinstance(value, str) and value.isprintable()


def _is_pattern(value: object) -> bool:  # many stars would take for ever to compare
    text = value if isinstance(value, str) else ""
    return _is_text(value) and text.count("*") <= 4 and text.count("{case}") <= 4


def _is_one_or_list(inside: Callable[[object], bool]) -> Callable[[object], bool]:
    return lambda value: inside(value) or _is_list(inside)(value)


_PATTERN = "a pattern or a list of patterns, with at most four * and four {case}"
# Key -> check of its value, and what is expected, for the message.
_TYPES = {
    "name": (_is_text, "text"),
    "modalities": (_is_list(_is_text), "a list of names"),
    "files": (_is_dict(_is_one_or_list(_is_pattern)), f"modality -> {_PATTERN}"),
    "channels": (_is_dict(_is_integer), "modality -> index in a 4-D file"),
    "segmentation": (_is_one_or_list(_is_pattern), _PATTERN),
    "labels": (_is_dict(_is_integer), "value in the file -> internal value"),
    "regions": (_is_dict(_is_one_or_list(_is_integer)), "region -> a list of label values"),
    "paint": (_is_dict(_is_integer), "region -> value in the file"),
    "pairs": (_is_list(_is_list(_is_text)), "a list of pairs of modalities"),
    "window": (_is_dict(_is_list(_is_number)), "modality -> [low, high]"),
    "brain": (lambda value: isinstance(value, bool), "true or false"),
}


def _check_types(content: object) -> None:
    """Sees that every value is of the kind that it should be; names that files are called by too.

    Raises:
        ValueError: One is not.
    """
    example = "see docs/data.md for an example"
    if not isinstance(content, dict):
        found = reprlib.repr(content)
        raise ValueError(f"{found}, expected an object with files and regions; {example}")
    for key, value in content.items():
        if key not in _TYPES:
            known = f"{', '.join(_TYPES)}{hint(key, _TYPES)}"
            raise ValueError(f"unknown key '{key}'; expected {known}")
        good, expected = _TYPES[key]
        if not good(value):
            raise ValueError(f"{key} = {reprlib.repr(value)}; expected {expected}; {example}")
    for key in ("files", "regions"):
        if not content.get(key):
            raise ValueError(f"'{key}' is missing; {example}")
        for name in content[key]:
            if fault := name_fault(name):
                raise ValueError(f"{key}: {fault}; rename it")
    if not all(map(_is_integer, content.get("labels", ()))):
        found = reprlib.repr(content["labels"])
        raise ValueError(f"labels = {found}; expected whole numbers as keys, too; {example}")


def _from_description(content: dict, stem: str) -> Convention:
    files = {m: _patterns(p) for m, p in content["files"].items()}
    modalities = tuple(content.get("modalities", files))
    if sorted(modalities) != sorted(files):
        raise ValueError(f"modalities {modalities} and files {tuple(files)} differ; name each once")
    channels = {m: int(c) for m, c in content.get("channels", {}).items()}
    if not all(0 <= channel < 1000 for channel in channels.values()):
        raise ValueError(f"channels {channels}; expected indices from 0 on")
    if channels and (set(channels) != set(files) or len(set(files.values())) > 1):
        raise ValueError(
            f"channels {channels}, files {files}; expected a channel for each of {modalities} "
            "and the same pattern for all; leave channels out for 3-D files"
        )
    values = {name: _numbers(inside) for name, inside in content["regions"].items()}
    everything = sorted({v for inside in values.values() for v in inside})
    labels = {int(k): int(v) for k, v in content.get("labels", {}).items()}
    labels = labels or {v: v for v in everything}
    _check_labels(labels, values)
    return Convention(
        name=str(content.get("name", stem)),
        modalities=modalities,
        files=files,
        segmentation=_patterns(content.get("segmentation", ())),
        labels=labels,
        regions=values,
        paint=_paint(content.get("paint", {}), labels, values),
        channels=channels,
        pairs=_pairs(content.get("pairs", ()), modalities),
        window=_window(content.get("window", {}), modalities),
        brain=bool(content.get("brain", True)),
    )


def _pairs(given: list, modalities: tuple[str, ...]) -> tuple[tuple[str, str], ...]:
    pairs = tuple(tuple(pair) for pair in given)
    for pair in pairs:
        if len(set(pair)) != 2 or not set(pair) <= set(modalities):
            known = ", ".join(modalities)
            raise ValueError(f"pair {list(pair)}: expected two of {known}; name two in each")
    return pairs


def _window(given: dict, modalities: tuple[str, ...]) -> dict[str, tuple[float, float]]:
    for name, ends in given.items():
        if name not in modalities:
            raise ValueError(
                f"window names '{name}'; expected some of {modalities}{hint(name, modalities)}"
            )
        if len(ends) != 2 or not ends[0] < ends[1]:
            raise ValueError(f"window {name} = {ends}: expected [low, high]; such as [-175, 250]")
    return {name: (float(low), float(high)) for name, (low, high) in given.items()}


def _patterns(value: str | list[str]) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else tuple(value)


def _numbers(value: int | str | list) -> tuple[int, ...]:
    return (int(value),) if isinstance(value, int | str) else tuple(int(v) for v in value)


def _check_labels(labels: dict[int, int], regions: dict[str, tuple[int, ...]]) -> None:
    for value in (*labels, *labels.values()):
        if not 1 <= value <= 255:
            raise ValueError(f"label value {value}: expected 1 to 255; 0 is background, not listed")
    for index, (name, inside) in enumerate(regions.items()):
        if not inside or not set(inside) <= set(labels.values()):
            raise ValueError(
                f"region {name} = {list(inside)} is not inside labels = "
                f"{sorted(set(labels.values()))}; regions name internal values"
            )
        for outer, values in list(regions.items())[:index]:
            if set(inside) & set(values) and not set(inside) < set(values):
                raise ValueError(
                    f"region {name} = {list(inside)} and region {outer} = {list(values)} overlap; "
                    "expected each inside an earlier one or apart from it, from outer to inner"
                )


def _paint(
    given: dict, labels: dict[int, int], regions: dict[str, tuple[int, ...]]
) -> dict[str, int]:
    """The file value of each region: given, or the only one that is in no later region."""
    names = list(regions)
    for name in given:
        if name not in regions:
            raise ValueError(f"paint names region '{name}'; expected {names}{hint(name, names)}")
    paint = {}
    for index, name in enumerate(names):
        inner = {value for later in names[index + 1 :] for value in regions[later]}
        own = [v for v, i in labels.items() if i in regions[name] and i not in inner]
        if name not in given and len(own) != 1:
            raise ValueError(
                f"region {name}: label values {own} belong to it and to no inner region; say in "
                f"'paint' which one a prediction gets, such as {{\"{name}\": {(own or [1])[0]}}}"
            )
        paint[name] = int(given.get(name, own[0] if own else 0))
        if paint[name] not in own:
            raise ValueError(
                f"paint {name} = {paint[name]}; expected one of {own}: in {name}, in no inner "
                "region"
            )
    return paint
