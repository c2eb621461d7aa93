"""Make the eight collections whose sentences are tested, run the experiment on them, and keep what its analysis read.

    python tests/record_golden.py FOLDER [NAME ...]     makes and runs below FOLDER, writes tests/golden/NAME.npz
    python tests/record_golden.py --texts               writes tests/golden/NAME.txt anew from what is kept

A text that changes is to be read, as a student outside statistics would, before it is kept.
"""

import csv
import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

import golden_store
from making import module_names, write_lora
from torch import from_numpy

import ablation_experiment
from analysis import questions

MODULES, WIDTH = 8, 16
RESAMPLES = 2000


def written(
    root: Path, labels: list[str], weights: Callable[[int, np.random.Generator], dict], **columns: list
) -> Path:
    """Write a collection with a table of labels and other columns; ``weights`` gives factors by module."""
    generator, rows = np.random.default_rng(0), []
    for i, label in enumerate(labels):
        tensors = {}
        for module, (down, up) in zip(module_names(MODULES), weights(i, generator), strict=True):
            block = module.replace("down_blocks.0.attentions.", "down_blocks.")
            tensors[f"{block}.lora.down.weight"] = from_numpy(down.astype(np.float32))
            tensors[f"{block}.lora.up.weight"] = from_numpy(up.astype(np.float32))
        write_lora(root / f"{i:04}.safetensors", tensors)
        rows.append([f"{i:04}.safetensors", label, *(values[i] for values in columns.values())])
    with open(root / "metadata.csv", "w", newline="") as table:
        csv.writer(table).writerows([["file_name", "label", *columns], *rows])
    return root


def noise(generator: np.random.Generator) -> list[tuple[np.ndarray, np.ndarray]]:
    return [(generator.normal(size=(1, WIDTH)), generator.normal(size=(WIDTH, 1))) for _ in range(MODULES)]


def names_of(classes: int, count: int) -> list[str]:
    return [f"concept {i % classes:02}" for i in range(count)]


def nothing(root: Path) -> Path:
    return written(root, names_of(4, 160), lambda _, generator: noise(generator))


def one_layer(root: Path) -> Path:
    def weights(i: int, generator: np.random.Generator) -> list:
        factors = noise(generator)
        factors[3][1][:] *= 1.6 ** (i % 4)
        return factors

    return written(root, names_of(4, 160), weights)


def pairs_only(root: Path) -> Path:
    """Two modules hold a direction of the update, whose sign and size are shared out among the factors at random."""
    directions = np.random.default_rng(5).normal(size=(4, 2, 2, WIDTH))

    def weights(i: int, generator: np.random.Generator) -> list:
        factors = noise(generator)
        for place, module in enumerate((2, 5)):
            down, up = directions[i % 4, place] + 0.7 * generator.normal(size=(2, WIDTH))
            size = np.exp(generator.normal()) * generator.choice([-1, 1])
            factors[module] = (down[None] * size, up[:, None] / size)
        return factors

    return written(root, names_of(4, 160), weights)


def unbalanced(root: Path) -> Path:
    labels = np.repeat(["common", "rarer", "rare"], [140, 40, 20]).tolist()

    def weights(i: int, generator: np.random.Generator) -> list:
        factors = noise(generator)
        for module in (1, 6):
            factors[module][0][:] *= 1.25 ** ["common", "rarer", "rare"].index(labels[i])
        return factors

    return written(root, labels, weights)


def fifty_classes(root: Path) -> Path:
    def weights(i: int, generator: np.random.Generator) -> list:
        factors = noise(generator)
        concept = i % 50
        for module in range(MODULES):
            factors[module][0][:] *= 1 + 0.5 * (concept >> (module % 6) & 1)
        return factors

    return written(root, names_of(50, 300), weights)


def six_test_loras(root: Path) -> Path:
    def weights(i: int, generator: np.random.Generator) -> list:
        factors = noise(generator)
        factors[4][0][:] *= 1 + i % 2
        return factors

    return written(root, names_of(2, 30), weights)


def groups_explain(root: Path) -> Path:
    """Each artist has a style of its own and a single concept, which itself does nothing."""
    styles = np.exp(0.5 * np.random.default_rng(6).normal(size=(24, MODULES, 2)))

    def weights(i: int, generator: np.random.Generator) -> list:
        style = styles[i % 24]
        factors = zip(noise(generator), style, strict=True)
        return [(down * of_down, up * of_up) for (down, up), (of_down, of_up) in factors]

    artists = [f"artist {i % 24:02}" for i in range(192)]
    return written(root, [f"concept {i % 24 % 4:02}" for i in range(192)], weights, artist=artists)


COLLECTIONS = {
    "small_quick": (None, ["--dataset=small", "--quick", "--controls=basic"]),
    "small_full": (None, ["--dataset=small"]),
    "nothing": (nothing, ["--quick", "--controls=basic"]),
    "one_layer": (one_layer, ["--quick", "--controls=basic", "--top-k=1"]),
    "pairs_only": (pairs_only, ["--quick", "--controls=basic", "--top-k=2"]),
    "unbalanced": (unbalanced, ["--quick", "--controls=basic", "--top-k=3"]),
    "fifty_classes": (fifty_classes, ["--quick", "--controls=basic"]),
    "six_test_loras": (six_test_loras, ["--quick", "--controls=basic", "--top-k=2"]),
    "groups_explain": (groups_explain, ["--quick", "--controls=basic"]),
}


def record(name: str, folder: Path) -> None:
    """Run the experiment on a collection, and keep what its analysis reads and all else that is reported."""
    make, flags = COLLECTIONS[name]
    root, results = folder / name, folder / "results"
    if make and not root.exists():
        make(root)
    kept: dict = {}

    def analyse(evidence, names, statistics, updates, samples, controls):
        kept.update(evidence=evidence, names=list(names), statistics=statistics, updates=updates, samples=samples)
        kept.update(controls=controls)
        return original(evidence, names, statistics, updates, samples, controls)

    original, questions.analyse = questions.analyse, analyse
    target = results / f"ablation_{root.name if make else 'small'}"
    (target / "results.json").unlink(missing_ok=True)
    arguments = [*flags, "--output-dir", str(results)] + (["--dataset", str(root)] if make else [])
    code = ablation_experiment.main(arguments)
    questions.analyse = original
    assert code in (0, 3), code
    content = json.loads((target / "results.json").read_text())
    # Explanations without weights are trained, for a second or two: what they gave is kept.
    kept |= {name: content["analysis"][name] for name in ("controls_not_run", "cheap")}
    content["dataset"]["path"] = f"data/{name}"
    content["environment"] |= {"device": "CPU", "workers": 2, "host": "node", "date": "2026-11-26T12:00:00+00:00"}
    kept["results"] = {key: value for key, value in content.items() if key not in ("analysis", "timing")}
    golden_store.save(golden_store.FOLDER / f"{name}.npz", kept)


def texts() -> None:
    from report import text

    for path in sorted(golden_store.FOLDER.glob("*.npz")):
        results = golden_store.analysed(golden_store.load(path), RESAMPLES)
        path.with_suffix(".txt").write_text(text.render_text(results), encoding="utf-8")


if __name__ == "__main__":
    if sys.argv[1] == "--texts":
        texts()
    else:
        for asked in sys.argv[2:] or COLLECTIONS:
            record(asked, Path(sys.argv[1]))
        texts()
