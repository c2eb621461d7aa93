"""The recipe of a file: what its trainer decided and its concept did not, as headers and configurations show it.

Where the recipe differs between classes, a classifier may see the trainer's file and not the concept.

Shape letters: N LoRAs, P modules (pairs of a down and an up).
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache
from typing import Protocol

import numpy as np

from loras.labels import plain
from loras.lora_files import ADAPTER_METADATA, Header, Layout
from loras.notices import Notice
from loras.scales import CONFIG, NONE, ScaleCount, has_unused_fields

DORA = ("*.dora_scale", "*.lora_magnitude_vector", "*.m")  # rows of `keys.IGNORED`
# Ways to begin a training after which up·down is the change of W; the other ones change W itself before it.
PLAIN_INITS = ("true", "false", "gaussian", "orthogonal", "eva", "none", "")
# Fields of the header that name the concept, or its images: what they tell is the label and no recipe.
NAMING = (
    *("ss_output_name", "ss_dataset_dirs", "ss_reg_dataset_dirs", "ss_datasets", "ss_tag_frequency"),
    *("ss_training_comment", "training_info", "name"),
    *("modelspec.title", "modelspec.description", "modelspec.tags", "modelspec.trigger_phrase"),
)
MAX_COLUMNS = 500
MAX_SHOWN = 60  # characters of a value in a message


class IndexedFile(Protocol):
    """A file of a collection, with what indexing has read."""

    path: str
    label: str
    header: Header
    adapter_config: dict | None
    scales: tuple[ScaleCount, ...]

    @property
    def layout(self) -> Layout:
        """The layers of the file."""


def recipe(file: IndexedFile) -> dict[str, str]:
    """Return the recipe of a file, by field: key style, dtype, scale, tensors beside the factors, what the writer says.

    The scale of alpha tensors is a weight, and not part of it; nor is what names the concept.
    """
    fields = dict(_of_layout(file.layout))
    if all(scale.value is not None for scale, _ in file.scales):
        count = sum(modules for _, modules in file.scales)
        fields["scale"] = f"{sum(scale.value * modules for scale, modules in file.scales) / max(count, 1):.6g}"
    fields["scale source"] = " + ".join(sources_of(file))
    fields["DoRA"] = "yes" if has_dora(file) else "no"
    for prefix, config in _configs(file):
        for name, value in config.items():
            if isinstance(value, str | int | float):
                fields[f"{prefix}{name}"] = str(value)
    return fields | {f"header: {name}": value for name, value in file.header.fields.items() if name not in NAMING}


@lru_cache(maxsize=2**10)
def _of_layout(layout: Layout) -> dict[str, str]:
    """Return what the tensors of a file show, less their numbers."""
    with_alpha = len(layout.alphas) / max(len(layout.modules), 1)
    fields = {
        "key style": " + ".join(sorted({layer.style for layer in layout.layers})),
        "dtype": " + ".join(sorted({layer.dtype for layer in layout.layers})),
        "alpha tensors": {0: "none", 1: "all"}.get(with_alpha, "some"),
    }
    return fields | {f"ignored: {name}": str(count) for name, count in layout.ignored.items() if name not in DORA}


def sources_of(file: IndexedFile) -> list[str]:
    """Return the sources of a file's scales, sorted."""
    return sorted({scale.source for scale, _ in file.scales})


def has_dora(file: IndexedFile) -> bool:
    """Return whether a file holds magnitudes of DoRA, or says that it is one."""
    if any(name in file.layout.ignored for name in DORA):
        return True
    says = [(config.get("use_dora"), config.get("fine_tune_type")) for _, config in _configs(file, plain_too=True)]
    return any(str(use).lower() == "true" or str(kind).lower() == "dora" for use, kind in says)


def _configs(file: IndexedFile, plain_too: bool = False) -> Iterator[tuple[str, dict]]:
    """Yield the configurations of a file's adapter, with the prefix of their fields' names."""
    if file.adapter_config:
        yield f"{CONFIG}: ", file.adapter_config
    for component, config in file.header.adapter_configs.items():
        yield f"{ADAPTER_METADATA}: {component}" + "." * bool(component), config
    if plain_too:
        yield "header: ", file.header.fields


# ----------------------------------------------------------------------------------------------------------------------
# Columns
# ----------------------------------------------------------------------------------------------------------------------


def recipe_columns(files: Sequence[IndexedFile], scales: np.ndarray | None = None) -> dict[str, list[str]]:
    """Return the fields of the recipe that could tell classes apart, with the value of each file, "" where it has none.

    A field has two values at least, and no more than half as many as there are LoRAs: ids, hashes and dates drop out.

    Args:
        files: The N files.
        scales: The scale of each module, float[N, P], where the weights have been read; else headers have the say.
    """
    values = None
    if scales is not None and np.size(scales):  # of layers without a whole pair there is none
        values = np.round(np.asarray(scales, float).mean(1), 6).tolist()

    def recipes() -> Iterator[dict[str, str]]:
        for row, file in enumerate(files):
            fields = recipe(file)
            yield fields if values is None else fields | {"scale": f"{values[row]:.6g}"}

    return _columns(len(files), recipes)


def header_columns(files: Sequence[IndexedFile]) -> dict[str, dict[str, str]]:
    """Return the fields of headers that every file has and some share, with the value of each file, by path.

    Of fields that divide the files alike the first is kept.
    """
    columns: dict[bytes, tuple[str, list[str]]] = {}
    for name, column in _columns(len(files), lambda: (file.header.fields for file in files)).items():
        _, first, group = np.unique(np.array(column, object), return_index=True, return_inverse=True)
        if "" not in column:
            columns.setdefault(first[group].tobytes(), (f"header: {name}", column))
    return {
        plain(name): {file.path: value for file, value in zip(files, column, strict=True)}
        for name, column in columns.values()
    }


def _columns(count: int, rows: Callable[[], Iterable[dict[str, str]]]) -> dict[str, list[str]]:
    """Return the columns of rows of fields that have 2 to N/2 values, of at most `MAX_COLUMNS` the commonest fields.

    The N rows are made twice, as to hold some hundred fields of each file would take gigabytes.
    """
    values: dict[str, set[str]] = defaultdict(set)
    held: Counter[str] = Counter()
    for row in rows():
        for name, value in row.items():
            values[name].add(value)
        held.update(row.keys())
    chosen = []
    for name, number in held.most_common():
        distinct = len(values[name] | ({""} if number < count else set()))
        if 2 <= distinct <= count / 2:
            chosen.append(name)
    columns: dict[str, list[str]] = {name: [] for name in sorted(chosen[:MAX_COLUMNS])}
    for row in rows():
        for name, column in columns.items():
            column.append(row.get(name, ""))
    return columns


# ----------------------------------------------------------------------------------------------------------------------
# Notices
# ----------------------------------------------------------------------------------------------------------------------


def header_notices(files: Sequence[IndexedFile]) -> list[Notice]:
    """Return what headers and configurations show of files that can be used but may mean something else."""
    return [*_mixed_scales(files), *_unused_fields(files), *_not_the_update(files)]


def _mixed_scales(files: Sequence[IndexedFile]) -> Iterator[Notice]:
    """Yield the notice of scales that come from different sources, or from none while others have one."""
    by_sources: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for file in files:
        by_sources[tuple(sources_of(file))].append(file.path)
    if len(by_sources) < 2 and not any(len(sources) > 1 and NONE in sources for sources in by_sources):
        return
    # The measure is the commonest, and where two are that, one that states all scales.
    common = max(by_sources, key=lambda sources: (len(by_sources[sources]), NONE not in sources, sources))
    counts = ", ".join(
        f"{_source_words(sources)} in {_some(paths)}"
        for sources, paths in sorted(by_sources.items(), key=lambda entry: -len(entry[1]))
    )
    files_without = sum(len(paths) for sources, paths in by_sources.items() if NONE in sources)
    if files_without:
        mend = (
            "Scales that nothing states are taken as 1: put an adapter_config.json with r and lora_alpha beside those"
            " LoRAs, or leave them out."
        )
    else:
        mend = "Features of updates may see that and not the concept: save all in one form, or leave the others out."
    others = sorted(path for sources, paths in by_sources.items() if sources != common for path in paths)
    message = f"scales of updates are not stated alike: {counts}. {mend}"
    yield Notice("scales", message, tuple(others or sorted(by_sources[common])))


def _unused_fields(files: Sequence[IndexedFile]) -> Iterator[Notice]:
    """Yield the notice of headers whose plain alpha and rank do not fit the tensors."""
    unused = [file.path for file in files if has_unused_fields(file.header, (scale for scale, _ in file.scales))]
    if unused:
        message = (
            f"alpha and rank in the header of {_some(unused)} do not fit the tensors, or not all of them, and give "
            "those no scale: it is taken as 1. Where it is not, put an adapter_config.json beside them."
        )
        yield Notice("scales", message, tuple(sorted(unused)))


def _source_words(sources: tuple[str, ...]) -> str:
    stating = " and ".join(source for source in sources if source != NONE)
    if NONE not in sources:
        return f"by {stating}"
    return f"by {stating} of some modules, and by nothing of others," if stating else "by nothing"


def _not_the_update(files: Sequence[IndexedFile]) -> Iterator[Notice]:
    """Yield notices of files in which up·down is not the change of W."""
    by_init: dict[str, list[str]] = defaultdict(list)
    dora = []
    for file in files:
        for init in {str(config.get("init_lora_weights", "")) for _, config in _configs(file, plain_too=True)}:
            if init.strip().lower() not in PLAIN_INITS:
                by_init[init].append(file.path)
        if has_dora(file):
            dora.append(file.path)
    kind = "not the whole update"
    for init, paths in sorted(by_init.items()):
        message = (
            f"init_lora_weights {plain(init[:MAX_SHOWN])} in {_some(paths)}: W itself was changed before the training, "
            "and up·down is not the change of W. Convert them to plain LoRAs where PEFT can, or leave them out."
        )
        yield Notice(kind, message, tuple(sorted(paths)))
    if dora:
        message = (
            f"DoRA magnitudes in {_some(dora)}, which are not read: up·down is not the whole change of W. Take "
            "results on updates as those of up·down alone, or leave them out."
        )
        yield Notice(kind, message, tuple(sorted(dora)))


def _some(paths: Sequence[str]) -> str:
    """Return how many files, and the first."""
    first = plain(min(paths))
    return f"{len(paths)} LoRAs ({first} ...)" if len(paths) > 1 else f"1 LoRA ({first})"


def scale_records(counts: Sequence[tuple[ScaleCount, ...]]) -> list[dict]:
    """Return the scales of a collection's files as ``inspect`` prints them, the commonest first.

    Each is a scale and its source, the number of modules that have it in a file, and of files of which that is so.
    """
    files = Counter(count for of_file in counts for count in of_file)
    order = sorted(files.items(), key=lambda entry: (-entry[1], entry[0].scale.source, entry[0].scale.value or 0.0))
    return [
        {"scale": scale.value, "source": scale.source, "modules": modules, "files": number}
        for (scale, modules), number in order
    ]
