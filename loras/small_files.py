"""Small files beside the weights: configurations, metadata, tables of labels, records of what was built.

Anyone may have written them. They are read here alone: opened without waiting, as a pipe may never be written to;
checked once they are open, as what is at a path may change; and bounded in size and depth. Surrogates without a partner
are escaped. Numbers are what JSON says, also NaN and 1e300: each reader has its own use for them.
"""

from __future__ import annotations

import io
import json
import os
import re
import stat
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import TextIO

MAX_JSON_BYTES = 2**20
MAX_DEPTH = 100  # of lists and objects in each other
_SURROGATE = re.compile(r"[\ud800-\udfff]")
_WRITTEN_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


# Of tables that are not UTF-8, as iconv names them: where bytes above 127 stand alone among letters, and where in runs.
ALONE = ("CP1252", "CP1251", "CP932", "GB18030", "CP949")
IN_RUNS = ("CP932", "GB18030", "CP949", "CP1251", "CP1252")
MAX_READINGS = 3  # encodings in a message


class EncodingError(ValueError):
    """Bytes that are no text in an encoding that is read; ``encodings`` are those in which they may be."""

    def __init__(self, message: str, encodings: Sequence[str] = ()):
        super().__init__(message)
        self.encodings = encodings


class NoObjectError(ValueError):
    """A JSON text that is something else than an object."""


def read_bytes(path: Path | str, most: int) -> bytes:
    """Read a plain file of at most ``most`` bytes.

    Raises:
        OSError: It cannot be read, or is a folder; the error names it.
        ValueError: It is a pipe, a device or a socket, or larger.
    """
    with open(path, "rb", buffering=0, opener=_open_without_waiting) as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise ValueError("not a plain file")
        if status.st_size > most:
            raise ValueError(f"{status.st_size} bytes, more than {most}")
        data = bytearray()
        while part := file.read(min(2**20, most + 1 - len(data))):  # it may grow, and have no size as in /proc
            data += part
            if len(data) > most:
                raise ValueError(f"more than {most} bytes")
    return bytes(data)


def _open_without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK | os.O_NOCTTY)


def open_text(data: bytes) -> TextIO:
    """Return a text file of bytes: UTF-8, or UTF-16 with a byte order mark; line ends stay as they are.

    Raises:
        EncodingError: They are text in another encoding, or no text.
    """
    encoding = "utf-16" if data.startswith((b"\xff\xfe", b"\xfe\xff")) else "utf-8-sig"
    file = io.TextIOWrapper(io.BytesIO(data), encoding=encoding, newline="")
    try:
        while part := file.read(2**20):
            if "\0" in part:
                wide = [name for start, name in ((1, "UTF-16LE"), (0, "UTF-16BE")) if data[start:200:2].count(0) > 25]
                raise EncodingError("holds NUL bytes: UTF-16 without a byte order mark, or no text", wide)
    except UnicodeDecodeError as error:
        raise _other_encoding(data, encoding, error) from error
    file.seek(0)
    return file


def _other_encoding(data: bytes, encoding: str, error: UnicodeDecodeError) -> EncodingError:
    """Describe the first byte that is not text of an encoding, and what it reads as in those that it may be in."""
    if encoding == "utf-16":
        return EncodingError(f"not readable as UTF-16, as which it begins ({error.reason})")
    for number, line in enumerate(data.splitlines(), 1):
        try:
            line.decode("utf-8")
        except UnicodeDecodeError as fault:
            readings = _readings(line)
            words = ", ".join(f"{name} '{text}'" for name, text in readings.items())
            byte = f"byte 0x{line[fault.start]:02x} in line {number}"
            return EncodingError(f"not UTF-8: {byte}" + (f", in {words}" if words else ""), list(readings))
    return EncodingError("not UTF-8")


def _readings(line: bytes) -> dict[str, str]:
    """Return the first cell of a line that is not ASCII, by the encodings in which the line is printable text."""
    readings = {}
    for name in IN_RUNS if re.search(rb"[\x80-\xff]{2}", line) else ALONE:
        try:
            text = line.decode(name)
        except UnicodeDecodeError:
            continue
        cell = next((cell for cell in re.split(r'[,;\t"]', text) if not cell.isascii()), "")
        if cell.isprintable():
            readings[name] = cell[:40]
    return dict(list(readings.items())[:MAX_READINGS])


def read_object(path: Path | str, most: int = MAX_JSON_BYTES) -> dict:
    """Read a JSON object. Equal short texts give the same object, not to be changed.

    Raises:
        OSError: The file cannot be read.
        ValueError: It is no plain file, too large, or no JSON; a `NoObjectError` where it is other JSON.
    """
    return parse_object(open_text(read_bytes(path, most)).read())


def parse_object(text: str) -> dict:
    """Return the JSON object of a text, as `read_object` does."""
    value = (_parsed_short if len(text) < 2**14 else _parsed)(text)
    if not isinstance(value, dict):
        raise NoObjectError("not a JSON object")
    return value


def _parsed(text: str) -> object:
    try:
        value = json.loads(text)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    if text.count("[") + text.count("{") > MAX_DEPTH or _WRITTEN_SURROGATE.search(text):
        return _escaped(value)
    return value


_parsed_short = lru_cache(maxsize=64)(_parsed)  # files of a folder mostly have few texts between them


def _escaped(value: object, depth: int = 0) -> object:
    """Return a JSON value with the surrogates escaped that have no partner.

    Raises:
        ValueError: It is nested too deeply.
    """
    if depth > MAX_DEPTH:
        raise ValueError("nested too deeply")
    if isinstance(value, str):
        return _SURROGATE.sub(lambda match: ascii(match[0])[1:-1], value)
    if isinstance(value, list):
        return [_escaped(item, depth + 1) for item in value]
    if isinstance(value, dict):
        return {_escaped(name): _escaped(item, depth + 1) for name, item in value.items()}
    return value
