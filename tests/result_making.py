"""Content of results.json with planted truth, for the tests of the report."""

import copy
from functools import cache

import numpy as np

from analysis import questions
from analysis.evidence import Evidence, Predictions
from analysis.removal_plan import Order, plan_controls
from loras.lora_files import Layer

LAYERS, TOP_K, RUNS, CLASSES, TEST = 12, 2, 3, 5, 200
CLASS_NAMES = ["cat", "dog", "<script>alert(1)</script>", "a & b", '"quoted"']
KNOWN = {  # share of test LoRAs that a classifier recognises, given which layers it sees (the first is the best)
    "redundant": lambda kept: 0.9,
    "distributed": lambda kept: 0.9 * kept.mean(),
    "localized": lambda kept: 0.9 if kept[:TOP_K].any() else 0.1,
    "no signal": lambda kept: 0.0,
}


def described(depth: int) -> Layer:
    module = f"unet_down_blocks_{depth // 4}_attn{1 + depth // 2 % 2}_to_{'qk'[depth // 2 % 2]}"
    return Layer(f"{module}.{('down', 'up')[depth % 2]}.weight", module, ("down", "up")[depth % 2], (1, 4), "F32")


def guesses(truth: np.ndarray, shares: np.ndarray, seed: int) -> np.ndarray:
    """Predictions that are right for a share of the LoRAs of each class, and guessed for the others."""
    generator = np.random.default_rng(seed)
    shape = (*np.shape(shares), len(truth))
    known = np.arange(len(truth)) // CLASSES % 20 < np.round(20 * np.asarray(shares))[..., None]
    return np.where(known, truth, generator.integers(0, CLASSES, shape))


@cache
def _made(kind: str, names: tuple[str, ...], answerable: bool) -> dict:
    """The content of results.json where the truth is planted."""
    y = np.arange(60 + 40 + TEST) % CLASSES
    rows = {"train": np.arange(60), "validation": np.arange(60, 100), "test": np.arange(100, len(y))}
    layers = [described(depth) for depth in range(LAYERS)]
    tested = np.concatenate([y[rows["validation"]], y[rows["test"]]])
    alone = np.linspace(0.7, 0.0, LAYERS) if kind != "no signal" else np.zeros(LAYERS)
    held_out, alone_guessed = np.arange(60, len(y)), guesses(tested, np.repeat(alone[:, None], RUNS, 1), 0)
    losses = np.random.default_rng(8).random(alone_guessed.shape).astype(np.float32)
    alone_guessed = {"predicted": alone_guessed, "log_loss": losses}
    predictions = Predictions(held_out, tested, alone_guessed, {"baseline": {}, "ablation": {}})
    whole, left = KNOWN[kind](np.ones(LAYERS)), KNOWN[kind](np.arange(LAYERS) >= TOP_K)
    for i, name in enumerate(names):
        for condition, share, seed in (("baseline", whole, 1 + i), ("ablation", left, 50 + i)):
            predicted = guesses(tested, np.full(RUNS, share * 0.8**i), seed)
            predictions.conditions[condition][name] = {"predicted": predicted}
    e = Evidence(layers, CLASS_NAMES, y, rows, None, np.arange(LAYERS), TOP_K, predictions, 0)
    conditions = plan_controls(Order.of_layers(e), runs=RUNS, draws=39, points=11, conditional=True, seed=0)
    taken = guesses(e.truth, np.array([[KNOWN[kind](kept) for kept in of] for of in conditions.kept]), 7)
    generator = np.random.default_rng(0)
    updates = 1 + generator.random((len(y), LAYERS // 2, 2)) + 0.2 * y[:, None, None]
    updates[..., 0] = updates[..., 0] if answerable else 1
    spectral = generator.random((30, LAYERS, 4))
    spectral[..., 1], spectral[..., 2:] = spectral[..., 0], 1
    controls = questions.Controls(
        "all",
        {"stats": (conditions, taken)},
        ("stats", generator.random((RUNS, LAYERS))),
        {"norms": generator.random((len(y), 3)), "ranks and shapes": None, "metadata": np.eye(CLASSES)[y]},
        ["artist"],
        ("artist", names[0], e.truth, np.arange(TEST) // 4, guesses(e.truth, np.full(RUNS, 0.5), 9)),
        generator.random((4, LAYERS)) * 0.3,
    )
    features = generator.random((len(y), LAYERS, 7)) + y[:, None, None]
    sample = {"spectral": (spectral, ["sigma_1", "gap_1", "sigma_2", "sigma_3"])} if not answerable else {}
    found = questions.analyse(e, list(names), features, updates, sample, controls) | {"controls_not_run": {}}
    return _results(e, names, found)


def _results(e: Evidence, names: tuple[str, ...], found: dict) -> dict:
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
         "val_accuracy": 0.5, "module": layer.module, "role": layer.role}
        for layer, of in zip(e.layers, correct, strict=True)
    ]  # fmt: skip
    training = {"max_epochs": 30, "patience": 5}
    return {
        "dataset": {"name": "zoo", "source": "files", "path": "data/zoo", "num_samples": len(e.y), "num_classes": 5,
                    "classes": CLASS_NAMES, "class_counts": dict.fromkeys(CLASS_NAMES, 60), "num_layers": LAYERS,
                    "split_sizes": {name: len(rows) for name, rows in e.rows.items()}, "skipped": [], "ignored": {},
                    "num_layers_selected": LAYERS, "label_source": "class folders", "group_column": None,
                    "num_groups": None, "findings": []},
        "config": {"top_k": TOP_K, "num_runs": RUNS, "rank_by": "test", "seed": 0, "quick": False, "device": "cpu",
                   "layers": None, "classifier": training, "autoencoder": training},
        "environment": {"torch": "2", "device": "CPU", "threads": 2, "date": "2026-11-25T02:10:03+00:00"},
        "timing": {"total": 1.5},
        "chance": {"accuracy": e.chance, "f1": 0.07},
        "layer_ranking": ranking,
        "top_layers": [record["layer"] for record in ranking[:TOP_K]],
        "baseline_results": entries("baseline"),
        "ablation_results": entries("ablation"),
        "representations_not_run": [],
        "splits": None,
        "analysis": found,
    }  # fmt: skip


def made(kind="redundant", names=("stats", "spectral", "ensemble"), answerable=True) -> dict:
    """A copy that a test may change."""
    return copy.deepcopy(_made(kind, names, answerable))


def without_pairs() -> dict:
    """Of a run in which no module has both of its layers, as `analysis.rank_structure` tells it."""
    results = made()
    found = results["analysis"]["rank_structure"]
    found |= {"answerable": False, "tested": None, "modules": [], "num_significant": 0,
              "why": "no module has both of its layers among those looked at"}  # fmt: skip
    for one in found["complexity"]["by_class"]:
        one |= {"effective_rank": None, "norm": None}
    found["complexity"] |= {"spearman_spread": None, "spearman_recall": None}
    (record,) = (record for record in results["analysis"]["hypotheses"] if record["question"] == "rank_structure")
    record |= {"outcome": "not answerable", "number": None, "interval": None, "why": found["why"]}
    return results


def unwrapped(text: str) -> str:
    return " ".join(text.split())
