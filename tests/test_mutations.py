"""Thousands of LoRA files by a grammar, most with something wrong in them: each is refused in words, or read as it is.

What is read is compared with a slow transcription of what the writers mean (slow_updates.py). The whole is
``pytest -m slow tests/test_mutations.py``: 100,000 files, and every truncation of some; the default run is a fiftieth.
"""

import random
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from limits import peak_of_memory
from lora_grammar import KINDS, Made, Sides, mutants, numbers_of, saved
from safetensors import safe_open
from slow_updates import slow_updates

from data import CollectionError, LoraFile, index_collection
from experiment import extraction
from loras.lora_files import LoraFileError
from representations import REPRESENTATIONS

MOST_SECONDS, MOST_MEMORY = 2.0, 2**30
FEATURES = [name for name, row in REPRESENTATIONS.items() if row.made == "computed"]


def read(root: Path, path: Path, made: Made) -> str:
    """Index and read a collection of this one file: "refused" or "accepted", anything else is an error."""
    write(path, made)
    start = time.perf_counter()
    try:
        (file,) = index_collection(root).files
        if made.later is not None:
            path.write_bytes(made.later)
        weights, scales, _ = extraction.read_file(root, file)
    except (CollectionError, LoraFileError) as error:
        assert str(error).isprintable() and len(str(error)) < 3000
        assert not made.sound, error
        outcome = "refused"
    else:
        outcome = "accepted"
    assert time.perf_counter() - start < MOST_SECONDS
    if outcome == "accepted":
        check_updates(path, file, weights, scales, made.config)
    return outcome


def write(path: Path, made: Made) -> None:
    with open(path, "r+b" if path.exists() else "wb") as file:  # "wb" alone waits for the disk, on some file systems
        file.write(made.contents)
        file.truncate(len(made.contents) + made.sparse)
    beside = path.with_name("adapter_config.json")
    if made.config is None:
        beside.unlink(missing_ok=True)
    else:
        beside.write_bytes(made.config)


def check_updates(path: Path, file: LoraFile, weights: np.ndarray, scales: dict, config: bytes | None) -> None:
    """The updates have the norms and the scales of the slow transcription, and every key of the file is counted."""
    expected, used = slow_updates(path, config)
    layout = file.layout
    assert sum(columns.stop - columns.start for columns in layout.columns) == len(weights)
    assert np.isfinite(weights).all() and np.isfinite(list(scales.values())).all()
    matrices = [
        weights[columns].reshape(layer.shape).astype(np.float64)
        for layer, columns in zip(layout.layers, layout.columns, strict=True)
    ]
    assert [layer.role for layer in layout.layers] == ["down", "up"] * len(layout.modules)
    norms = [np.linalg.norm(up @ down) for down, up in zip(matrices[::2], matrices[1::2], strict=True)]
    factors = [scales[module] for module in layout.modules]
    slack = 1e-6 * max((update.bound for update in expected), default=0) + 1e-37
    close(norms, [update.norm for update in expected], slack)
    known = [update.scale for update in expected]
    if None not in known:
        scaled = [abs(update.scale) * update.norm for update in expected]
        close([abs(s) * n for s, n in zip(factors, norms, strict=True)], scaled, slack * max(map(abs, known)))
        if all(update.norm for update in expected):
            close(factors, known, 0)
    assert sum(layout.ignored.values()) == count_of_keys(path) - used


def close(found: list[float], expected: list[float], slack: float) -> None:
    np.testing.assert_allclose(sorted(found), sorted(expected), rtol=2e-6, atol=slack)


def count_of_keys(path: Path) -> int:
    with safe_open(path, "np") as file:
        return len(file.keys())


@pytest.mark.parametrize(
    "count", [pytest.param(1_000, id="1,000"), pytest.param(100_000, id="100,000", marks=pytest.mark.slow)]
)
def test_a_file_of_the_grammar_is_refused_in_words_or_read_as_it_is(tmp_path, capsys, count):
    path = tmp_path / "zoo" / "a" / "x.safetensors"
    path.parent.mkdir(parents=True)
    outcomes, slowest, accepted = Counter(), 0.0, []
    with peak_of_memory() as added:
        for kind, made in mutants(seed=count, count=count):
            start = time.perf_counter()
            outcome = read(tmp_path / "zoo", path, made)
            slowest = max(slowest, time.perf_counter() - start)
            outcomes[kind, outcome] += 1
            if outcome == "accepted" and kind != "giant":
                accepted.append(made)
    refused = sum(number for (_, outcome), number in outcomes.items() if outcome == "refused")
    with capsys.disabled():
        print(f"\n{count} files: {refused} refused, {count - refused} read as they are, 0 tracebacks, the slowest")
        print(f"{slowest:.2f} s, {added.mebibytes:.0f} MiB; refused and read by kind:")
        kinds = dict.fromkeys(kind for kind, _ in outcomes)
        print("; ".join(f"{kind} {outcomes[kind, 'refused']} {outcomes[kind, 'accepted']}" for kind in kinds))
    assert added.bytes < MOST_MEMORY
    assert outcomes["truncated", "accepted"] == outcomes["sound", "refused"] == 0
    assert min(outcomes[kind, "refused"] for kind in kinds if kind not in ("sound", "giant")) > 0
    assert count - refused > count // 8
    for i, made in enumerate(random.Random(0).sample(accepted, min(10, len(accepted)))):
        write(path, made)
        found = extraction.extract(index_collection(tmp_path / "zoo"), FEATURES, tmp_path / f"{i}", torch.device("cpu"))
        assert all(np.isfinite(found.load(name)).all() for name in FEATURES)


@pytest.mark.parametrize(
    "kind", ["linear", *(pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS if kind != "linear")]
)
def test_every_truncation_is_refused_as_an_incomplete_download(tmp_path, kind):
    numbers = numbers_of(random.Random(0), "F32")
    made = Made(saved(KINDS[kind]("PEFT", 0, Sides(2, 4, 5), numbers)), sound=True)
    path = tmp_path / "a" / "x.safetensors"
    path.parent.mkdir()
    for length in range(len(made.contents)):
        path.write_bytes(made.contents[:length])
        with pytest.raises(CollectionError) as error:
            index_collection(tmp_path)
        assert error.value.findings[0].startswith(f"{path}: incomplete download: has {length} bytes, ")
    assert read(tmp_path, path, made) == "accepted"
