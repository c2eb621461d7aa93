"""Columns of a collection: of its table and metadata.json files, of headers and configurations, and the rank."""

from __future__ import annotations

from data import Collection
from experiment.settings import Settings, UsageError
from loras.command_line import suggestion
from loras.names import plain
from loras.recipe import recipe_columns

RANK = "rank"


def columns_of(collection: Collection) -> dict[str, dict[str, str]]:
    """Return the value of each file that has one, by column and path.

    Columns of the table and fields of the metadata.json files go before a field of the recipe (see `loras.recipe`) of
    the same name, and these before the rank of the weights, the largest of a file.
    """
    paths = [file.path for file in collection.files]
    columns = {RANK: {file.path: str(max(layer.rank for layer in file.layout.layers)) for file in collection.files}}
    for name, values in recipe_columns(collection.files).items():
        columns[plain(name)] = {path: plain(value) for path, value in zip(paths, values, strict=True) if value}
    return columns | collection.columns


def check_columns(collection: Collection, settings: Settings) -> None:
    """Refuse columns of --holdout and --also that are not there, or are the label.

    Raises:
        UsageError: One is.
    """
    asked = [("--holdout", name) for name in (settings.holdout,) if name]
    asked += [("--also", name) for name in settings.also or ()]
    columns = columns_of(collection) if asked else {}
    for flag, name in asked:
        shown = f"{flag} {plain(name)}"
        if name not in columns:
            near = suggestion(name, tuple(columns))
            raise UsageError(f"{shown}: no LoRA has such a column.{near} There are: {', '.join(sorted(columns))}.")
        if name == collection.label_column:
            raise UsageError(f"{shown}: that is the label. Name another column.")
