"""PEFT's patterns of modules, ``rank_pattern`` and ``alpha_pattern``: names or regular expressions -> values.

They are texts of strangers. Most name a module, and are looked up; of regular expressions there may be a few, and only
such as need steps in proportion to a small power of a path's length. Steps are counted before anything is matched.
"""

from __future__ import annotations

import math
import re
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import lru_cache

from loras.keys import LoraFileError

# What reading a text raises where it does not hold what it should.
UNREADABLE = (ValueError, LookupError, TypeError, AttributeError, RecursionError)

_PLAIN = re.compile(r"[\w.\-]*")
_REPEATS = re.compile(r"[*+{]|(?<!\()\?")
# Repeats of groups, references back, and groups that are more than that: flags, comments, conditions.
_REFUSED = re.compile(r"\)[*+?{]|\(\?(?!:|=|!|<=|<!|P<)")
_BACK = re.compile(r"\\[1-9]")
_PLAIN_GROUP = re.compile(r"\((?:\?:)?([\w\-]*(?:\|[\w\-]*)+)\)")
_MAX_EXPRESSIONS, _MAX_LENGTH, _MAX_REPEATS, _MAX_ALTERNATIVES, _MAX_PATH = 64, 1000, 3, 200, 300
_MAX_TARGETS = 1000
_MAX_KNOWN = 64
MAX_STEPS = 5e7  # to match a file's modules with all expressions: about a second


class Rule:
    """The values of modules by a configuration: of the first pattern that names the end of a path, else the default.

    Raises:
        ValueError, TypeError: A pattern is no regular expression, or more than one of modules.
        re.error: Likewise.
    """

    def __init__(self, config: dict, patterns: str, default: str):
        self.values = config.get(patterns) or {}
        self.default = config.get(default)
        if not isinstance(self.values, dict):
            raise TypeError(f"{patterns} is no object")
        self.name, self.position = patterns, {pattern: i for i, pattern in enumerate(self.values)}
        expressions = [pattern for pattern in self.values if not _PLAIN.fullmatch(pattern)]
        if len(expressions) > _MAX_EXPRESSIONS:
            raise ValueError(f"{patterns} has {len(expressions)} regular expressions")
        self.expressions = {pattern: _compiled(pattern) for pattern in expressions}
        self.steps = Counter()  # repeats -> expressions, weighted by their alternatives
        for pattern in expressions:
            repeats, ways = _cost(pattern)
            self.steps[repeats] += ways
        self.named = lru_cache(maxsize=2**15)(self._named)

    def check(self, paths: Iterable[str]) -> None:
        """Refuse expressions that would take too long for the modules of a file.

        Raises:
            ValueError: They would.
        """
        if not self.expressions:
            return
        steps = 0.0
        for path in paths:
            if len(path) > _MAX_PATH:
                raise ValueError(f"regular expressions for a path of {len(path)} characters")
            for start in _starts(path):
                length = len(path) - start + 1
                steps += sum(n * length**k / math.factorial(k) for k, n in self.steps.items())
        if steps > MAX_STEPS:
            raise ValueError(f"the regular expressions of {self.name} take too long for so many modules")

    def value(self, path: str) -> float:
        """Return the value of the module of a path, 0 where none is stated.

        Raises:
            ValueError, TypeError, OverflowError: It is no number.
        """
        pattern = self.named(path) if self.values else None
        return number(self.default if pattern is None else self.values[pattern])

    def _named(self, path: str) -> str | None:
        """Return the first pattern that names the end of a path."""
        starts = _starts(path)
        named = [path[start:] for start in starts if path[start:] in self.position]
        # Matched from a place in the whole path, so that ^ is only the beginning of that.
        named += [
            pattern
            for pattern, found in self.expressions.items()
            if any(found.fullmatch(path, start) for start in starts)
        ]
        return min(named, key=self.position.get, default=None)


_known: dict[tuple[int, str, str], tuple[dict, Rule]] = {}  # the dictionaries are held, so that no other has their id


def rule_of(config: dict, patterns: str, default: str) -> Rule:
    """Return the rule of a configuration, made once for one object, which is not to be changed.

    Raises:
        ValueError, TypeError, re.error: As `Rule` says.
    """
    if not config.get(patterns):
        return Rule(config, patterns, default)
    key = id(config), patterns, default
    if known := _known.get(key):
        return known[1]
    rule = Rule(config, patterns, default)
    if len(_known) >= _MAX_KNOWN:
        _known.clear()
    _known[key] = config, rule
    return rule


@contextmanager
def in_words(source: str) -> Iterator[None]:
    """Raise what reading a configuration raises as a `LoraFileError`, under the name of its source."""
    try:
        yield
    except LoraFileError:
        raise
    except (*UNREADABLE, OverflowError, re.error) as error:
        raise LoraFileError(f"{source} has an unusable alpha or rank ({error}). Mend or remove it.") from error


def number(value: object) -> float:
    """Return a number that a configuration states, also as a text; 0 for none.

    Raises:
        ValueError, TypeError, OverflowError: It is none.
    """
    if isinstance(value, bool):
        raise TypeError(f"{value} is no number")
    return 0.0 if value in (None, "") else float(value)


def _starts(path: str) -> list[int]:
    """Return where the parts of a path begin."""
    return [0, *(dot.end() for dot in re.finditer(r"\.", path))]


def _bare(pattern: str) -> str:
    """Return a pattern with a dot for whatever stands behind a backslash."""
    return re.sub(r"\\.", ".", pattern, flags=re.DOTALL)


@lru_cache(maxsize=2**10)
def _cost(pattern: str) -> tuple[int, float]:
    """Return the repeats of a pattern, and a bound of the ways through its alternatives, of which none is repeated.

    Of plain texts few fit at one place, those that begin with each other; to try one takes less than a step, and least
    where its first character differs.
    """
    bare, ways = _bare(pattern), 1.0
    for group in _PLAIN_GROUP.finditer(bare):
        texts = group[1].split("|")
        fitting = max(sum(text.startswith(other) for other in texts) for text in texts)
        alike = max(Counter(text[:1] for text in texts).values())
        ways *= min(len(texts), fitting * (1 + alike / 3 + len(texts) / 16))
    open_groups = [1]
    for character in _PLAIN_GROUP.sub("", bare):
        if character == "(":
            open_groups.append(1)
        elif character == "|":
            open_groups[-1] += 1
        elif character == ")" and len(open_groups) > 1:
            ways *= open_groups.pop()
    return len(_REPEATS.findall(bare)), ways * math.prod(open_groups)


@lru_cache(maxsize=2**10)
def _compiled(pattern: str) -> re.Pattern:
    """Compile a pattern, unless it could take longer than its use is worth: repeats of repeats, and many of both."""
    refused = len(pattern) > _MAX_LENGTH or _REFUSED.search(_bare(pattern)) or _BACK.search(pattern)
    if refused or pattern.count("|") > _MAX_ALTERNATIVES or _cost(pattern)[0] > _MAX_REPEATS:
        raise ValueError(f"{pattern[:_MAX_LENGTH]} is more than a pattern of modules")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of sets in sets, which mean nothing yet
        return re.compile(pattern)


# ----------------------------------------------------------------------------------------------------------------------
# Paths of modules
# ----------------------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=2**16)
def path_of(name: str) -> str:
    """Return the path of a module by which PEFT names it, given the key of a factor."""
    return re.split(r"\.(?:lora[._]|hada_|lokr_)", name)[0].removeprefix("base_model.model.")


def parameter_paths(path: str, config: dict) -> tuple[str, ...]:
    """Return the paths of the parameters that PEFT wraps at a module, empty for a module that is no parameter.

    They stand in ``target_parameters``. Which of several is the outer one the file does not tell.

    Raises:
        ValueError: There are more than any network has.
    """
    targets = config.get("target_parameters")
    if not targets or not isinstance(targets, list):
        return ()
    if len(targets) > _MAX_TARGETS:
        raise ValueError(f"target_parameters has {len(targets)} names")
    return _parameter_paths(path, tuple(target for target in targets if isinstance(target, str)))


@lru_cache(maxsize=2**14)
def _parameter_paths(path: str, targets: tuple[str, ...]) -> tuple[str, ...]:
    module = path.replace(".base_layer", "")
    names = {target: f"{module}.{target.rpartition('.')[2]}" for target in targets}
    return tuple(sorted({name for target, name in names.items() if f".{name}".endswith(f".{target}")}))
