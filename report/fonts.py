"""The fonts that figures are lettered with: a font of this machine for names in any script, and the width of a text.

A letter has the first font that has it: the one that comes with matplotlib, else one of ``KNOWN``, else any other of
this machine. Text is drawn and measured with the same fonts. For a letter that no font has, PNG and PDF show a box, as
`without_font` says; an SVG holds the letter itself, which is there wherever it is opened on a machine that has it.
"""

from __future__ import annotations

import logging
import re
import unicodedata
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache

from matplotlib.font_manager import FontProperties, findfont, findSystemFonts, fontManager, get_font
from matplotlib.textpath import text_to_path

FONT = "DejaVu Sans"  # comes with matplotlib: Latin, Greek, Cyrillic, Arabic, Hebrew, Georgian, Armenian, Lao
KNOWN = (  # families that are preferred for the other scripts
    *(f"Noto Sans CJK {region}" for region in ("SC", "JP", "KR", "TC", "HK")),
    *(f"Source Han Sans{region}" for region in (" SC", " CN", "", " K", " TC", " TW")),
    *(f"Noto Sans {region}" for region in ("SC", "JP", "KR", "TC", "HK")),
    *("WenQuanYi Micro Hei", "WenQuanYi Zen Hei", "Droid Sans Fallback", "IPAexGothic", "NanumGothic"),
    *("PingFang SC", "PingFang HK", "Hiragino Sans GB", "Hiragino Sans", "Apple SD Gothic Neo"),
    *("Microsoft YaHei", "Yu Gothic", "Meiryo", "Malgun Gothic", "SimHei", "Arial Unicode MS"),
    *("Noto Emoji", "Segoe UI Emoji", "Segoe UI Symbol", "Symbola", "Nirmala UI"),
)
NO_LETTERS = re.compile(r"last ?resort|adobe blank|color", re.IGNORECASE)  # boxes, nothing, and coloured bitmaps
JOINERS = "\u200c\u200d"  # between letters, or emoji, that are drawn as one or apart
BOX = "□"  # for what is no letter, as a control character
BOX_WIDTH = 1.15  # of the box that matplotlib draws for a letter that no font has, by the size of the font


def shown(name: object) -> str:
    """Return a name on one line, a box for what is no letter, without marks of direction and others without shape."""
    text = " ".join(str(name).split())
    return "".join(letter if letter in JOINERS else _shown(letter) for letter in text)


def _shown(letter: str) -> str:
    category = unicodedata.category(letter)
    if category == "Cf":
        return ""
    return BOX if category[0] == "C" else letter


def letters_in(value: object) -> set[str]:
    """Return the letters of all strings in a value of JSON, but of lists that begin with a number."""
    if isinstance(value, dict):
        return set().union(*map(letters_in, value), *map(letters_in, value.values()))
    if isinstance(value, list) and value and not isinstance(value[0], int | float):
        return set().union(*map(letters_in, value))
    return set(value) if isinstance(value, str) else set()


def families_of(letters: Iterable[str]) -> tuple[str, ...]:
    """Return the families of the fonts that have the letters, that of matplotlib first."""
    needed = {family for letter in letters if (family := family_of(letter))}
    return (FONT, *(family for family in dict.fromkeys(_families()) if family in needed - {FONT}))


def without_font(letters: Iterable[str]) -> str:
    """Return the letters, sorted, that no font of this machine has."""
    return "".join(sorted(letter for letter in set(letters) if family_of(letter) is None and _shown(letter) == letter))


@cache
def family_of(letter: str) -> str | None:
    """Return the first family that has a letter; None where none has it."""
    return next((family for family in _families() if ord(letter) in _letters_of(family)), None)


def _families() -> Iterator[str]:
    """Yield the families of this machine, the preferred ones first: most are looked at only for rare letters."""
    yield FONT
    yield from (family for family in KNOWN if family in fontManager.get_font_names())
    yield from _others()


@cache
def _others() -> tuple[str, ...]:
    """Return all other families, sans-serif ones of Noto first; also of fonts that matplotlib has not listed yet."""
    listed = {entry.fname for entry in fontManager.ttflist}
    for path in sorted(findSystemFonts()):
        if path not in listed:
            _list_font(path)
    names = {name for name in fontManager.get_font_names() if not NO_LETTERS.search(name)}
    return tuple(sorted(names - {FONT}, key=lambda name: (name not in KNOWN, not name.startswith("Noto Sans"), name)))


def _list_font(path: str) -> None:
    """Add a font to matplotlib's list, which is as old as matplotlib, unless matplotlib cannot draw with it."""
    try:
        fontManager.addfont(path)
    except (OSError, RuntimeError, ValueError, LookupError):  # damaged, or without outlines
        return


@cache
def _letters_of(family: str) -> frozenset[int]:
    try:
        with quietly():
            path = findfont(FontProperties(family=family), fallback_to_default=False)
        return frozenset(get_font(path).get_charmap())
    except (OSError, RuntimeError, ValueError):  # removed since matplotlib has listed it
        return frozenset()


@contextmanager
def quietly() -> Iterator[None]:
    """Keep matplotlib from a line for each letter that no font has, and each family without a regular weight."""
    logger = logging.getLogger("matplotlib.font_manager")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", r"(?s)Glyph .* missing from font", UserWarning)
            yield
    finally:
        logger.setLevel(level)


def width_of(text: str, size: float) -> float:
    """Return the width of a text in inches: the sum of its letters, or of joined letters that of the whole."""
    if any(map(_is_joined, text)):
        return size * _drawn_width(text)
    return size * sum(map(_advance, text))


@cache
def _is_joined(letter: str) -> bool:
    """Return whether a letter has another shape, or width, beside others: of all scripts but the simple ones."""
    code = ord(letter)
    simple = code < 0x300 or 0x370 <= code < 0x590 or 0x1E00 <= code < 0x2E80
    simple = simple or (unicodedata.east_asian_width(letter) in "WF" and code < 0x1F000)
    return not simple and family_of(letter) is not None


@cache
def _advance(letter: str) -> float:
    """Return the width that a letter takes, in inches at 1 point."""
    return BOX_WIDTH / 72 if family_of(letter) is None else _drawn_width(f"n{letter}n") - _drawn_width("nn")


@cache
def _drawn_width(text: str) -> float:
    """Return the width of a text in inches at 1 point."""
    known = "".join(letter for letter in text if family_of(letter))
    font = FontProperties(family=list(families_of(known)), size=100)
    with quietly():
        width = text_to_path.get_text_width_height_descent(known, font, False)[0]
    return width / 7200 + (len(text) - len(known)) * BOX_WIDTH / 72
