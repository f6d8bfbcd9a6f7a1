"""Command lines: what is wrong with one in a line, and the word that was probably meant."""

import argparse
import re
import sys
from collections.abc import Sequence
from typing import NoReturn

from masm_jax.data.conventions import hint

_KINDS = {"int": "a whole number", "float": "a number"}


def some(flag, text, known):
    """The words of a flag such as --mode=infer,train.

    Args:
        flag: its name without dashes.
        text: what was given.
        known: words that it may have.

    Raises:
        ValueError: none, or one that is not known.
    """
    known = [str(word) for word in known]
    words = [word.strip() for word in text.split(",") if word.strip()]
    unknown = [word for word in words if word not in known]
    if unknown or not words:
        wrong = f"{unknown[0]} is not known{hint(unknown[0], known)}" if unknown else "nothing"
        raise ValueError(f"--{flag}={text}: {wrong}; expected some of {', '.join(known)}")
    return words


class Parser(argparse.ArgumentParser):
    """``argparse.ArgumentParser`` without abbreviated flags; its errors are one line, exit code 2.

    A misspelt flag is often a required one, too: it is named, and not the one that then lacks.
    """

    def __init__(self, **options):
        super().__init__(allow_abbrev=False, **options)
        self._words: Sequence[str] = ()

    def parse_known_args(self, args=None, namespace=None):
        self._words = sys.argv[1:] if args is None else list(args)
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        known = [
            flag for parser in (self, *self._chosen()) for flag in parser._option_string_actions
        ]
        known = [flag for flag in known if flag.startswith("--")]
        given = [word.split("=")[0] for word in self._words if re.match("--[A-Za-z]", word)]
        unknown = [flag for flag in given if flag not in known]
        if unknown:
            message = f"{unknown[0]}: no such argument{hint(unknown[0], known)}"
        elif found := re.fullmatch(
            r"argument (\S+): invalid choice: '?(.*?)'? \(choose from (.*)\)", message
        ):
            flag, value, choices = found.groups()
            choices = [choice.strip(" '") for choice in choices.split(",")]
            message = f"{flag}={value}: expected one of {', '.join(choices)}{hint(value, choices)}"
        elif found := re.fullmatch(r"argument (\S+): invalid (.*) value: '(.*)'", message):
            flag, kind, value = found.groups()
            message = f"{flag}={value}: expected {_KINDS.get(kind, 'a ' + kind)}"
        self.exit(2, f"{self.prog}: {message}; --help lists the arguments\n")

    def _chosen(self):
        """The parser of the subcommand that is named, if there are such."""
        choices = [action.choices for action in self._actions if action.nargs == argparse.PARSER]
        return [own[word] for own in choices for word in self._words[:1] if word in own]
