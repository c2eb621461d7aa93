"""Columns of a collection: of its table and metadata.json files, of headers and configurations, and the rank."""

from __future__ import annotations

import re
from collections.abc import Iterable

from data import Collection
from experiment.settings import Settings, UsageError
from loras.command_line import suggestion
from loras.names import plain
from loras.recipe import recipe_columns

RANK = "rank"
HELD_OUT_BY = ("stats", "update_sketch", "update_views")  # representations that --holdout trains
PREFIXES = {"header", "adapter", "config", "ss", "modelspec"}  # words before the name of a trainer's field
MOST_SHOWN = 5  # columns in a message


def columns_of(collection: Collection) -> dict[str, dict[str, str]]:
    """Return the value of each file that has one, by column and path.

    Columns of the table and fields of the metadata.json files go before a field of the recipe (see `loras.recipe`) of
    the same name, and these before the rank of the weights, the largest of a file. Blanks around a value are no part of
    it, and a value of nothing else is none.
    """
    paths = [file.path for file in collection.files]
    columns = {RANK: {file.path: str(max(layer.rank for layer in file.layout.layers)) for file in collection.files}}
    for name, values in recipe_columns(collection.files).items():
        columns[plain(name)] = {path: value for path, value in zip(paths, values, strict=True) if value}
    return {
        name: {path: plain(text) for path, value in of_file.items() if (text := value.strip())}
        for name, of_file in (columns | collection.columns).items()
    }


def columns_named(asked: str, names: Iterable[str]) -> list[str]:
    """Return the columns that a name means: the one of just this name, else those that it is a short name of.

    Of ``header: ss_max_train_steps`` these are ``max_train_steps``, which goes before all others, and whole words of it
    in a row, such as ``steps``; upper case and signs do not count.

    Example:
        >>> columns_named("base", ["rank", "header: ss_base_model_version"])
        ['header: ss_base_model_version']
    """
    if asked in (names := list(names)):
        return [asked]
    words, words_of = _words(asked), {name: _words(name) for name in names}
    exact = [name for name in names if words and _without_prefixes(words_of[name]) == _without_prefixes(words)]
    return exact or [name for name in names if words and f" {' '.join(words)} " in f" {' '.join(words_of[name])} "]


def _words(name: str) -> list[str]:
    return re.findall(r"[^\W_]+", name.lower())


def _without_prefixes(words: list[str]) -> list[str]:
    """Return the words from the first on that is no prefix; all where each is one."""
    start = next((i for i, word in enumerate(words) if word not in PREFIXES), 0)
    return words[start:]


def check_columns(collection: Collection, settings: Settings) -> None:
    """Refuse columns of --holdout and --also that are not there, or are the label.

    Raises:
        UsageError: One is, or a short name means several.
    """
    asked = [("--holdout", name) for name in (settings.holdout,) if name]
    asked += [("--also", name) for name in settings.also or ()]
    columns = columns_of(collection) if asked else {}
    for flag, name in asked:
        shown = f"{flag} {plain(name)}"
        meant = columns_named(name, columns) if flag == "--holdout" else [name] * (name in columns)
        if not meant:
            near = suggestion(name, tuple(columns))
            raise UsageError(f"{shown}: no LoRA has such a column.{near} There are: {', '.join(sorted(columns))}.")
        if len(meant) > 1:
            listed = ", ".join(meant[:MOST_SHOWN]) + (", ..." if len(meant) > MOST_SHOWN else "")
            raise UsageError(f"{shown}: {len(meant)} columns could be meant: {listed}. Give the whole name of one.")
        if meant == [collection.label_column]:
            raise UsageError(f"{shown}: that is the label. Name another column.")
