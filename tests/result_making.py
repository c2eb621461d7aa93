"""Content of results.json with planted truth, for the tests of the report."""

import copy
import re
from functools import cache

import numpy as np
from planting import attended_of, mapped_of

from analysis import questions
from analysis.across_splits import SplitOutcome, across_splits
from analysis.cross_fitting import Choice, TrainedSets
from analysis.evidence import Evidence, Predictions
from analysis.removal_plan import Order, plan_controls
from loras.lora_files import Layer

LAYERS, TOP_K, RUNS, CLASSES, DRAWS = 12, 2, 3, 5, 500
PARTS = {"train": 60, "validation": 40, "test": 200}
TEST, SAMPLES = PARTS["test"], sum(PARTS.values())
CLASS_NAMES = ["cat", "dog", "<script>alert(1)</script>", "a & b", '"quoted"']
KNOWN = {  # share of test LoRAs that a classifier recognises, given which layers it sees (the first is the best)
    "redundant": lambda kept: 0.9,
    "distributed": lambda kept: 0.9 * kept.mean(),
    "localized": lambda kept: 0.9 if kept[:TOP_K].any() else 0.1,
    "undecided": lambda kept: 0.9 if kept[:TOP_K].any() else 0.45,
    "unseen": lambda kept: 0.9 if kept[:TOP_K].all() and kept.sum() == TOP_K else 0.0,
    "no signal": lambda kept: 0.0,
}


def described(depth: int) -> Layer:
    module = f"unet_down_blocks_{depth // 2}_attn{1 + depth // 2 % 2}_to_{'qk'[depth // 2 % 2]}"
    role = ("down", "up")[depth % 2]
    return Layer(f"{module}.{role}.weight", module, role, (1, 4), "F32", f"down {depth // 2}")


def guesses(truth: np.ndarray, shares: np.ndarray, seed: int) -> np.ndarray:
    """Predictions that are right for a share of the LoRAs of each class, and guessed for the others."""
    generator = np.random.default_rng(seed)
    shape = (*np.shape(shares), len(truth))
    known = np.arange(len(truth)) // CLASSES % 20 < np.round(20 * np.asarray(shares))[..., None]
    return np.where(known, truth, generator.integers(0, CLASSES, shape))


def evidence_of(kind: str, names: tuple[str, ...], top_k: int, split: int = 0) -> Evidence:
    """Predictions of every layer alone, and of representations of which each knows less than the one before."""
    y, seed = np.arange(SAMPLES) % CLASSES, 1000 * split
    parts = np.split(np.roll(np.arange(SAMPLES), 50 * split), np.cumsum([*PARTS.values()])[:-1])
    rows = {name: np.sort(part) for name, part in zip(PARTS, parts, strict=True)}
    held_out = np.concatenate([rows["validation"], rows["test"]])
    alone = np.linspace(0.7, 0.0, LAYERS) if kind != "no signal" else np.zeros(LAYERS)
    layers = {"predicted": guesses(y[held_out], np.repeat(alone[:, None], RUNS, 1), seed)}
    layers["log_loss"] = np.random.default_rng(8).random(layers["predicted"].shape).astype(np.float32)
    predictions = Predictions(held_out, y[held_out], layers, {"baseline": {}, "ablation": {}})
    whole, left = KNOWN[kind](np.ones(LAYERS)), KNOWN[kind](np.arange(LAYERS) >= top_k)
    for i, name in enumerate(names):
        for condition, share, start in (("baseline", whole, 1 + i), ("ablation", left, 50 + i)):
            predicted = guesses(y[held_out], np.full(RUNS, share * 0.8**i), seed + start)
            predictions.conditions[condition][name] = {"predicted": predicted}
    described_layers, ranking = [described(depth) for depth in range(LAYERS)], np.arange(LAYERS)
    return Evidence(
        described_layers, CLASS_NAMES, y, rows, None, ranking, top_k, predictions, 0, resamples=DRAWS,
        permutations=DRAWS,
    )  # fmt: skip


def cross_fitted(e: Evidence, kind: str, names: tuple[str, ...]) -> TrainedSets:
    """Return what is known without, or by, the top layers that folds of the test LoRAs choose."""
    chosen = np.stack([np.isin(np.arange(LAYERS), layers) for layers in Choice.of(e).sets])
    alone, without = ([KNOWN[kind](kept) for kept in masks] for masks in (chosen, ~chosen))
    removed = {
        name: guesses(e.truth, np.repeat(np.array(without)[:, None] * 0.8**i, RUNS, 1), 90 + i)
        for i, name in enumerate(names)
    }
    return TrainedSets(
        removed=removed,
        alone=guesses(e.truth, np.repeat(np.array(alone)[:, None], RUNS, 1), 80),
        all_layers=e.predicted("baseline", names[0]),
    )


@cache
def _made(kind: str, names: tuple[str, ...], answerable: bool, top_k: int) -> dict:
    """The content of results.json where the truth is planted."""
    e, generator = evidence_of(kind, names, top_k), np.random.default_rng(0)
    conditions = plan_controls(Order.of_layers(e), runs=RUNS, draws=39, points=11, conditional=True, seed=0)
    taken = guesses(e.truth, np.array([[KNOWN[kind](kept) for kept in of] for of in conditions.kept]), 7)
    updates = 1 + generator.random((SAMPLES, LAYERS // 2, 2)) + 0.2 * e.y[:, None, None]
    updates[..., 0] = updates[..., 0] if answerable else 1
    spectral = generator.random((30, LAYERS, 4))
    spectral[..., 1], spectral[..., 2:] = spectral[..., 0], 1
    cheap: dict[str, np.ndarray | None] = dict.fromkeys(("norms", "ranks and shapes", "metadata"))
    if kind == "redundant" and answerable and len(names) > 1:  # their forests take longer than all else together
        cheap |= {"norms": generator.random((SAMPLES, 3)), "metadata": np.eye(CLASSES)[e.y]}
    controls = questions.Controls(
        "all",
        {"stats": (conditions, taken)},
        ("stats", generator.random((RUNS, LAYERS))),
        cheap,
        ["artist"],
        ("artist", names[0], e.truth, np.arange(TEST) // 4, guesses(e.truth, np.full(RUNS, 0.5), 9)),
        generator.random((19, LAYERS)) * 0.3,
        cross_fitted(e, kind, names),
        attended_of(CLASSES, e.truth, [described(depth).module for depth in range(0, LAYERS, 2)], planted=(1, 4)),
        mapped_of(e.y, e.rows["train"], {"all": 9.0, described(2).module: 1.5, described(8).module: 0.0}),
    )
    features = generator.random((SAMPLES, LAYERS, 7)) + e.y[:, None, None]
    sample = {"spectral": (spectral, ["sigma_1", "gap_1", "sigma_2", "sigma_3"])} if not answerable else {}
    analysis = questions.analyse(e, list(names), features, updates, sample, controls) | {"controls_not_run": {}}
    return _results(e, names, analysis)


@cache
def _over_splits(kind: str, names: tuple[str, ...], top_k: int, count: int) -> dict:
    outcomes = [SplitOutcome.of(evidence_of(kind, names, top_k, split), names) for split in range(count)]
    layers = [described(depth).name for depth in range(LAYERS)]
    return questions.plain(across_splits(outcomes, layers, top_k, {}, {}))


def _results(e: Evidence, names: tuple[str, ...], analysis: dict) -> dict:
    """Return what results.json holds beside the analysis."""

    def metric(condition: str, name: str) -> dict:
        runs = (e.predicted(condition, name) == e.truth).mean(-1)
        return {"mean": float(runs.mean()), "std": float(runs.std(ddof=1)), "runs": runs.tolist()}

    def entries(condition: str) -> dict:
        metrics = {name: metric(condition, name) for name in names}
        return {name: {"num_features": 84, "test_accuracy": of, "test_f1": of} for name, of in metrics.items()}

    correct = e.layer_predictions() == e.truth
    ranking = [
        {"layer": layer.name, "accuracy": float(of.mean()), "accuracy_std": float(of.mean(1).std(ddof=1)),
         "val_accuracy": 0.5, "module": layer.module, "role": layer.role, "block": layer.block}
        for layer, of in zip(e.layers, correct, strict=True)
    ]  # fmt: skip
    training = {"max_epochs": 30, "patience": 5}
    return {
        "dataset": {"name": "zoo", "source": "files", "path": "data/zoo", "num_samples": SAMPLES, "num_classes": 5,
                    "classes": CLASS_NAMES, "class_counts": dict.fromkeys(CLASS_NAMES, 60), "num_layers": LAYERS,
                    "split_sizes": dict(PARTS), "skipped": [], "ignored": {}, "num_layers_selected": LAYERS,
                    "label_source": "class folders", "group_column": None, "num_groups": None,
                    "findings": [{"kind": "outlier", "message": "1 LoRA is far larger than the others: see outlier",
                                  "count": 1, "files": ["cat/0001.safetensors"], "groups": []}]},
        "config": {"top_k": e.top_k, "num_runs": RUNS, "rank_by": "test", "seed": 0, "quick": False, "device": "cpu",
                   "splits": 1, "layers": None, "left_out": {}, "classifier": training, "autoencoder": training},
        "environment": {"torch": "2", "device": "CPU", "workers": 2, "host": "n", "date": "2026-11-25T02:10:03+00:00"},
        "timing": {"total": 1.5},
        "chance": {"accuracy": e.chance, "f1": 0.07},
        "layer_ranking": ranking,
        "top_layers": [record["layer"] for record in ranking[: e.top_k]],
        "baseline_results": entries("baseline"),
        "ablation_results": entries("ablation"),
        "representations_not_run": [],
        "splits": None,
        "analysis": analysis,
    }  # fmt: skip


def made(
    kind="redundant", names=("stats", "spectral", "ensemble"), answerable=True, splits=1, top_k=TOP_K
) -> dict:  # fmt: skip
    """A copy that a test may change, of so many splits."""
    results = copy.deepcopy(_made(kind, names, answerable, top_k))
    if splits > 1:
        results["config"]["splits"] = splits
        results["splits"] = copy.deepcopy(_over_splits(kind, names, top_k, splits))
    return results


def without_pairs() -> dict:
    """Of a run in which no module has both of its layers, as `analysis.rank_structure` gives it."""
    results = made()
    section = results["analysis"]["rank_structure"]
    section |= {"answerable": False, "tested": None, "modules": [], "num_significant": 0,
                "why": "no module has both of its layers among those looked at"}  # fmt: skip
    for record in section["complexity"]["by_class"]:
        record |= {"effective_rank": None, "norm": None}
    section["complexity"] |= {"spearman_spread": None, "spearman_recall": None}
    (record,) = (record for record in results["analysis"]["hypotheses"] if record["question"] == "rank_structure")
    record |= {"outcome": "not answerable", "number": None, "interval": None, "why": section["why"]}
    return results


def unwrapped(text: str) -> str:
    return " ".join(text.split())


def faults(text: str) -> list[str]:
    """Words that no reader should see: a missing number, and a plural of one. "None" may begin a sentence."""
    one = r"(?<![\d.])1 (?:layer|module|concept|run|draw|split|representation|other|cluster|LoRA|group|time)s\b"
    return re.findall(rf"(?<![.?:] )(?<!^)\bNone\b|\bnan\b|\binf\b|-0\.0+\b|{one}", unwrapped(text))
