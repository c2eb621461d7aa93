"""Headers of safetensors files: read without any tensor, checked, and parsed once for all files of equal tensors.

A header is the text of a stranger. The library judges it, and never maps the file itself: what others may truncate at
any moment would end the process by a signal. What the library lets pass is checked where it is used.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO, NamedTuple

from safetensors import SafetensorError, safe_open

from loras.keys import LoraFileError
from loras.layouts import Layout
from loras.pairs import check_ranks, checked_entries, kept_places, parse_pairs, split_experts, stacked_layers
from loras.patterns import UNREADABLE, in_words, parameter_paths, path_of, rule_of
from loras.products import Places

MAX_HEADER_BYTES = 25_000_000  # the library allows 100 MB; a hostile header of that size took it 9 seconds and 1.4 GB
MAX_TENSORS_BYTES = 5_000_000  # of a header less its metadata: some 30,000 tensors
METADATA, ADAPTER_METADATA = "__metadata__", "lora_adapter_metadata"
# Fields of the metadata that may state a scale; of several the first counts. Kohya's stand beside alpha tensors.
ALPHA_FIELDS = ("ss_network_alpha", "lora_alpha", "alpha")
RANK_FIELDS = ("ss_network_dim", "lora_rank", "rank", "r")
CONFIG = "adapter_config.json"
_accepted: set[tuple[bytes, int]] = set()  # digests of headers that the library has accepted, with the file's size


def read_header(path: Path | str) -> bytes:
    """Read the JSON header of a safetensors file and check it against the file's size; no tensor is read.

    The size of a header is bounded before it is read.

    Raises:
        LoraFileError: The file is something else, or incomplete.
    """
    with open_file(path) as file:
        size = os.fstat(file.fileno()).st_size
        start = file.read(64)
        if start.startswith(b"version https://git-lfs"):
            raise LoraFileError("a Git LFS pointer, not weights. Fetch the weights with `git lfs pull`.")
        if start.lstrip().lower().startswith((b"<!doctype", b"<html")):
            raise LoraFileError("a web page saved as weights. Download the file itself.")
        if start.startswith(b"PK\x03\x04"):
            raise LoraFileError("a pickle checkpoint: never loaded. Convert it to safetensors.")
        if size < 8:
            raise LoraFileError(f"incomplete download: has {size} bytes, a header alone needs 8. Download it again.")
        length = int.from_bytes(start[:8], "little")
        if length > MAX_HEADER_BYTES and re.match(rb"\x80[\x02-\x05]", start):
            raise LoraFileError("a pickle checkpoint: never loaded. Convert it to safetensors.")
        if length > MAX_HEADER_BYTES:
            raise LoraFileError(f"not a safetensors file: its header would be {length} bytes. Download it again.")
        if 8 + length > size:
            raise _incomplete(size, 8 + length)
        header = start[8 : 8 + length]
        header += file.read(length - len(header))
    if len(header) != length:  # it was truncated meanwhile
        raise _incomplete(8 + len(header), 8 + length)
    known = (hashlib.sha256(header).digest(), size)
    if known not in _accepted:
        _check_header(header, size)
        if len(_accepted) >= 2**12:  # files of one collection mostly share their header to the byte
            _accepted.clear()
        _accepted.add(known)
    return header


@contextmanager
def open_file(path: Path | str) -> Iterator[BinaryIO]:
    """Open a file to read, and no pipe that nobody may ever write to.

    Raises:
        LoraFileError: It is something else than a file.
    """
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise LoraFileError("a pipe or a device, not a file. Remove it.")
        yield file


def _incomplete(size: int, promised: int) -> LoraFileError:
    return LoraFileError(f"incomplete download: has {size} bytes, header promises {promised}. Download it again.")


def _check_header(header: bytes, size: int) -> None:
    """Refuse a header that the library refuses; it checks that the tensors tile the data exactly.

    The library maps what it opens. It is given a copy of the header with a hole for the data, which nobody else has.
    """
    try:
        with _unnamed_file() as copy:
            copy.write(len(header).to_bytes(8, "little") + header)
            copy.flush()
            os.truncate(copy.fileno(), size)
            with safe_open(f"/dev/fd/{copy.fileno()}", "np"):
                return
    except (SafetensorError, ValueError) as error:
        fault = error
    try:
        entries = json.loads(header)
        data = max((entry["data_offsets"][1] for key, entry in entries.items() if key != METADATA), default=0)
        short = isinstance(data, int) and size < 8 + len(header) + data < 2**63
    except UNREADABLE:
        short = False
    if short:
        raise _incomplete(size, 8 + len(header) + data) from fault
    raise LoraFileError(f"not a readable safetensors file ({fault}). Download it again.") from fault


def _unnamed_file() -> BinaryIO:
    """Return an empty file without a name: in memory, where the system has such files."""
    if hasattr(os, "memfd_create"):
        return os.fdopen(os.memfd_create("header"), "w+b")
    return tempfile.TemporaryFile()


@dataclass(frozen=True, slots=True)
class Header:
    """The parsed header of a file: places, which files of equal tensors share, and what is its own.

    ``data_start`` is the byte of the file at which its data begin, ``digest`` stands for the bytes of the header.
    ``adapter_configs`` are what ``lora_adapter_metadata`` says of the adapter of each component, "" for none.
    """

    places: Places
    data_start: int
    digest: bytes
    adapter_configs: dict[str, dict] = field(default_factory=dict)
    field_names: tuple[str, ...] = ()
    field_values: tuple[str, ...] = ()

    @property
    def layout(self) -> Layout:
        """The layers that the header promises; equal layouts are mostly one object."""
        return self.places.layout

    @property
    def fields(self) -> dict[str, str]:
        """The short fields of the header's metadata."""
        return dict(zip(self.field_names, self.field_values, strict=True))

    def keeping(self, modules: frozenset[str]) -> Header:
        """Return the header with the layers of only these canonical modules, the others are not read."""
        return replace(self, places=kept_places(self.places, modules))


def parse_header(header: bytes, adapter_config: dict | None = None) -> Header:
    """Parse a safetensors header: layers, alphas, ignored tensors, where each lies, and the metadata of the writer.

    Places are mostly one object for files of equal tensors, layouts also where the order of keys differs.

    Args:
        header: The header, without its length.
        adapter_config: The content of adapter_config.json beside the file, by which stacked experts are told apart.

    Raises:
        LoraFileError: No LoRA pair, a missing partner, ranks that differ, two adapters, a family that is refused,
            stacked experts of which nothing tells the number, or metadata that cannot be read.
    """
    tensors, metadata = _split(header)
    places = _parse(tensors)
    configs = _adapter_configs(metadata.pop(ADAPTER_METADATA)) if ADAPTER_METADATA in metadata else _NO_CONFIGS
    stated = [_Stated(CONFIG, "", adapter_config)] if adapter_config else []
    stated += [_Stated(ADAPTER_METADATA, component, config) for component, config in configs.items()]
    for source, _, config in stated:
        _check_variant(source, config)
    places = _with_experts(places, [entry for entry in stated if entry.config.get("target_parameters")])
    check_ranks(places.layout)
    short = (name for name, value in metadata.items() if len(value) <= MAX_FIELD_LENGTH and value.isprintable())
    names = _kept_names(tuple(sorted(short)))  # safetensors writes them in any order
    values = tuple(sys.intern(metadata[name]) for name in names)
    return Header(places, 8 + len(header), hashlib.sha256(header).digest(), configs, names, values)


def _without_doubles(pairs: list[tuple[str, object]]) -> dict:
    """Return an object of a header; refuse a key that stands twice, as readers differ about which one counts."""
    entries = dict(pairs)
    if len(entries) != len(pairs):
        double, _ = Counter(key for key, _ in pairs).most_common(1)[0]
        raise LoraFileError(f"two tensors have the key {double}. Keep one.")
    return entries


def _split(header: bytes) -> tuple[str, dict[str, str]]:
    """Return the header without ``__metadata__``, and that.

    Writers mostly put it first, and kohya fills it differently for each file. Where it stands elsewhere, it is left in.
    """
    try:
        text = header.decode()
    except UnicodeDecodeError as error:
        raise LoraFileError(f"not a readable safetensors file ({error}). Download it again.") from error
    if match := _METADATA.match(text):
        tensors, metadata = "{" + text[match.end() :], _readable(METADATA, match[1])
    else:
        named = '"__metadata__"' in text or "\\" in text  # JSON may escape any letter of a name
        elsewhere = named and len(text) <= MAX_TENSORS_BYTES
        tensors, metadata = text, _readable("header", text).get(METADATA) if elsewhere else None
    fields = metadata if isinstance(metadata, dict) else {}
    return tensors, {name: value for name, value in fields.items() if isinstance(value, str)}


def _readable(name: str, text: str, **hooks: Callable) -> dict:
    """Return a JSON object; ``null`` is an empty one.

    Raises:
        LoraFileError: It is none.
    """
    try:
        document = json.loads(text, **hooks)
    except LoraFileError:
        raise
    except UNREADABLE as error:
        raise LoraFileError(f"its {name} is not readable as JSON ({error}). Mend or remove it.") from error
    if document is not None and not isinstance(document, dict):
        raise LoraFileError(f"its {name} holds no JSON object. Mend or remove it.")
    return document or {}


# Names and values are texts, as the library has checked; nothing is matched twice, so time is linear in the length.
_METADATA = re.compile(
    r"""\{\s*"__metadata__"\s*:\s*(null|\{(?:[^"{}]++|"(?:[^"\\]++|\\.)*+")*+\})[\s,]*+""", re.DOTALL
)
# Trainers write some hundred fields; a longer text is a list, or prose.
MAX_FIELDS, MAX_FIELD_LENGTH, MAX_NAME_LENGTH = 500, 200, 100
MAX_CONFIG_LENGTH = 2**20
# What is kept of PEFT's configuration of an adapter, which diffusers writes into the header.
CONFIG_FIELDS = (
    *("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "init_lora_weights"),
    *("target_parameters", "use_qalora", "use_bdlora", "kasa_config"),
)
# Fields of PEFT's configuration of a LoRA, by which up·down of its tensors as they are is not the update.
REFUSED_VARIANTS = {"use_qalora": "QA-LoRA", "use_bdlora": "BD-LoRA", "kasa_config": "KaSA"}
_NO_CONFIGS: dict[str, dict] = {}


@lru_cache(maxsize=2**8)
def _kept_names(names: tuple[str, ...]) -> tuple[str, ...]:
    """Return the names of fields that may be of use, of no more than any trainer writes."""
    kept = [name for name in names if name.isprintable() and len(name) <= MAX_NAME_LENGTH]
    stating = [name for name in kept[MAX_FIELDS:] if name in (*ALPHA_FIELDS, *RANK_FIELDS)]
    return tuple(map(sys.intern, kept[:MAX_FIELDS] + stating))


def _adapter_configs(text: str) -> dict[str, dict]:
    """Return the configuration of each component's adapter, less what is not used: ``unet.r`` is r of ``unet``.

    Raises:
        LoraFileError: The text is no JSON object, or larger than any that belongs to a LoRA.
    """
    if len(text) > MAX_CONFIG_LENGTH:
        raise LoraFileError(f"its {ADAPTER_METADATA} has {len(text)} characters. Mend or remove it.")
    document = _readable(ADAPTER_METADATA, text)
    configs: dict[str, dict] = {}
    for key, value in document.items():
        component, _, name = key.rpartition(".")
        if name in CONFIG_FIELDS and value is not None:
            configs.setdefault(component, {})[name] = value
    try:
        json.dumps(configs, ensure_ascii=False).encode()  # no half of a surrogate pair, which no file can hold
        return _shared_configs(json.dumps(configs))
    except UNREADABLE as error:
        raise LoraFileError(f"its {ADAPTER_METADATA} is not readable ({error}). Mend or remove it.") from error


_shared_configs = lru_cache(maxsize=2**8)(json.loads)  # writers list the rest, as target modules, in any order


@lru_cache(maxsize=64)
def _parse(header: str) -> Places:
    """Parse a header without metadata."""
    if len(header) > MAX_TENSORS_BYTES:
        raise LoraFileError(f"its header describes tensors in {len(header)} bytes, more than any LoRA has. Is it one?")
    entries = _readable("header", header, object_pairs_hook=_without_doubles)
    entries.pop(METADATA, None)
    return parse_pairs(checked_entries(entries))


class _Stated(NamedTuple):
    """A configuration of an adapter: its source, the component of which it is ("" for none), and its content."""

    source: str
    component: str
    config: dict


def _check_variant(source: str, config: dict) -> None:
    """Refuse a configuration of a LoRA of which up·down, as they are in the file, is not the update."""
    for name, variant in REFUSED_VARIANTS.items():
        if str(config.get(name) or "").strip().lower() not in ("", "false", "0", "no", "none", "null"):
            raise LoraFileError(
                f"a {variant} adapter ({source} has {name}), which cannot be read. Convert it or leave it out."
            )


def _with_experts(places: Places, stated: list[_Stated]) -> Places:
    """Return places in which the experts that PEFT has stacked are modules each.

    The file does not tell their number: it is the rank of the whole by the one that a configuration states.

    Raises:
        LoraFileError: A configuration cannot be used, or none names a module of stacked experts.
    """
    ranks, known = [], set()
    for entry in stated:
        with in_words(entry.source):
            of_config = _ranks_of_experts(places.layout, entry, whole=len(stated) == 1)
        ranks += [(module, rank) for module, rank in of_config.items() if rank is not None and module not in known]
        known |= of_config.keys()
    for layer in stacked_layers(places.layout):
        if layer.module not in known:
            raise LoraFileError(
                f"{layer.name} has stacked experts, whose number the file does not tell. Put its adapter_config.json, "
                "with r and target_parameters, beside it."
            )
    return split_experts(places, tuple(ranks)) if ranks else places


def _ranks_of_experts(layout: Layout, stated: _Stated, whole: bool) -> dict[str, int | None]:
    """Return the rank of each expert by module, None of a parameter that is no stack; ``whole``: of all components.

    Raises:
        LoraFileError, ValueError: The rank is not one that the tensors can have, or the parameters of a module differ.
    """
    rule = rule_of(stated.config, "rank_pattern", "r")
    ranks: dict[str, int | None] = {}
    experts_of: dict[str, float] = {}
    front = f"{stated.component}." if stated.component else ""
    for layer in layout.layers[::2]:  # a module's down stands before its up
        path = path_of(layer.name)
        if not layer.style.startswith("PEFT") or not (whole or path.startswith(front)):
            continue
        if not (paths := parameter_paths(path.removeprefix(front), stated.config)):
            continue
        rule.check(paths)
        of_paths, module = {rule.value(path) for path in paths}, paths[0].rpartition(".")[0]
        if len(of_paths) > 1:
            raise ValueError(f"several ranks for the parameters of {module}")
        if not (rank := of_paths.pop()):
            continue
        if rank < 0 or not rank.is_integer() or layer.rank % rank:
            fault = f"{stated.source} says rank {rank:g} for {module}, where the file has {layer.rank}"
            raise LoraFileError(f"{fault}. Mend or remove it.")
        ranks[layer.module] = int(rank) if rank < layer.rank else None
        if rank < layer.rank and experts_of.setdefault(module, layer.rank // rank) != layer.rank // rank:
            raise ValueError(f"rank {rank:g} gives the parameters of {module} unequal numbers of experts")
    return ranks
