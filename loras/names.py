"""Names: which texts may be the name of a file, a layer, a label, a group or a column, and how other texts are shown.

Names come from files that anyone may have written, and end in lines, tables and pages. One rule holds for all: a name
is printable, as ``str.isprintable`` says, and at most ``MAX_LENGTH`` characters long. So it holds no control character,
no lone surrogate (as which Python shows bytes that are not UTF-8), no mark that turns the direction of a text, no line
or paragraph separator, and nothing of no width.
"""

from __future__ import annotations

import os
import sys
from contextlib import suppress

MAX_LENGTH = 255
MAX_LINE = 1000
FORMULA = ("=", "+", "-", "@", "\t", "\r")  # the beginnings of a cell that a spreadsheet would compute


def plain(text: str) -> str:
    """Return a text as one line that every file and screen can hold: what is not printable is escaped."""
    if text.isprintable():
        return text
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)


def one_line(text: str) -> str:
    """Return a message as `plain` does, cut in the middle where names have made it too long."""
    line = plain(text)
    return line if len(line) <= MAX_LINE else f"{line[: MAX_LINE // 2]} ... {line[-MAX_LINE // 2 :]}"


def fault(text: str) -> str:
    """Return what is wrong with a text as a name, with its beginning; empty where nothing is."""
    beginning = text[:40] + "..." * (len(text) > 40)
    if not text.isprintable():
        return f"'{plain(beginning)}' is not printable text"
    return f"'{beginning}' has {len(text)} characters" if len(text) > MAX_LENGTH else ""


def quoted(label: str) -> str:
    """Return a label as it stands in a list: in quotes where a blank at an end could not be seen."""
    return label if label == label.strip() else f"'{label}'"


def spreadsheet_cell(text: str) -> str:
    """Return a cell of a table that a spreadsheet shows as it is: an apostrophe stands before a formula's beginning."""
    return f"'{text}" if text.startswith(FORMULA) else text


def escape_output() -> None:
    """Let standard output and error escape what their encoding lacks, in place of an error, or go nowhere if closed.

    A program calls it first: any other file would take the number of a stream that was closed when Python began, and
    libraries would write into that. Worker processes inherit the streams.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):  # in the order of their numbers
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115 (it is open until the end)
            os.set_inheritable(getattr(sys, name).fileno(), True)
    for stream in (sys.stdout, sys.stderr):
        # Others stand in for the streams in tests; and one that was a file when Python began may be a pipe by now.
        with suppress(AttributeError, OSError):
            stream.reconfigure(errors="backslashreplace")


def discard_output() -> None:
    """Let standard output go nowhere from now on: nobody reads it any more, and at the end Python would flush it."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
