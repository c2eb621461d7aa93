"""The command line: what is mistaken is refused in one line, which names the nearest word that is known.

Imports only what takes no time: --help and mistakes are answered before any library is imported.
"""

from __future__ import annotations

import argparse
import os
import shlex
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from pathlib import Path

from loras.names import one_line, plain

MOST_NAMED = 3  # words that are suggested
MOST_SHOWN = 40  # letters of a word that is refused


def suggestion(word: str, known: Iterable[str]) -> str:
    """Return a sentence that names the nearest known words, with a blank before it; empty where none is near.

    These are the words that begin with it, as an abbreviation does, or else the one that is spelled most alike.
    """
    known = list(known)
    alike = word.lower().replace("_", "-")
    spelled = {name.lower().replace("_", "-"): name for name in known}
    near = [name for letters, name in spelled.items() if alike.strip("-") and letters.startswith(alike)]
    near = near or [spelled[letters] for letters in get_close_matches(alike, spelled, n=1)]
    return f" Did you mean {' or '.join(near[:MOST_NAMED])}?" if near else ""


def program_path(name: str) -> str:
    """Return how a program of this project is called from the working folder, quoted for a shell."""
    path = Path(__file__).parents[1] / name
    return shlex.quote(name if path.parent == Path.cwd() else os.fspath(path))


def whole_number(text: str) -> int:
    """Return the number of an argument.

    Raises:
        argparse.ArgumentTypeError: It is none.
    """
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{_quoted(text)} is not a whole number.") from None


class Parser(argparse.ArgumentParser):
    """A parser whose errors are a line and an exit code of 2, and that takes no flag for another that it begins.

    An abbreviation would mean something else as soon as there is another flag of that beginning.
    """

    def __init__(self, **how: object):
        super().__init__(allow_abbrev=False, **how)

    def error(self, message: str) -> None:
        """Print what is wrong, without the list of all flags, and end the program."""
        self.exit(2, f"error: {one_line(message.removeprefix('argument '))}\n")

    def parse_known_args(
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        """Parse, and refuse what is left: here, where the flags of a subcommand are known."""
        namespace, left = super().parse_known_args(args, namespace)
        if left:
            word = next((word for word in left if word.startswith("-")), left[0])
            self.error(self._refusal(word.partition("=")[0] if word.startswith("-") else word))
        return namespace, left

    def _refusal(self, word: str) -> str:
        if not word.startswith("-"):
            return f"{_quoted(word)}: no flag stands before it. {self.prog} --help lists all."
        flags = [flag for action in self._actions for flag in action.option_strings]
        return f"{word[:MOST_SHOWN]}: no such flag.{suggestion(word, flags) or f' {self.prog} --help lists all.'}"

    def _check_value(self, action: argparse.Action, value: object) -> None:
        """Refuse a value that is none of the choices; argparse has no public place for it."""
        if action.choices is not None and value not in action.choices:
            mend = suggestion(str(value), map(str, action.choices)) or f" Choose from {', '.join(action.choices)}."
            raise argparse.ArgumentError(action, f"{_quoted(str(value))} is not known.{mend}")


def _quoted(word: str) -> str:
    return f"'{plain(word if len(word) <= MOST_SHOWN else word[:MOST_SHOWN] + '...')}'"
