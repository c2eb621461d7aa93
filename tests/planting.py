"""Evidence whose predictions are guessed or planted, and the analysis of it."""

import json

import numpy as np

from analysis.attention import Attended
from analysis.collection_map import Mapped
from analysis.evidence import Evidence, Predictions
from analysis.questions import Controls, analyse
from analysis.removal_plan import Order, plan_controls
from loras.lora_files import Layer

FEWER_DRAWS = 2000, 2000


def evidence_of(
    *, layers=12, classes=6, each=40, tested=20, runs=2, top_k=3, names=("stats", "spectral"), groups=None, seed=0
) -> Evidence:
    """Return evidence whose predictions are guessed: of each class ``each`` LoRAs, ``tested`` of them test rows."""
    y = np.arange(classes * each) % classes
    places = np.arange(len(y)) // classes  # of a LoRA among those of its class
    last, validated = each - tested, max(1, (each - tested) // 4)
    parts = {"train": places < last - validated, "test": places >= last}
    rows = {part: np.flatnonzero(where) for part, where in parts.items()}
    rows["validation"] = np.flatnonzero(~parts["train"] & ~parts["test"])
    described = [Layer(f"layer {d}", f"m_{d // 2}_to_q", ("down", "up")[d % 2], (2, 4), "F32") for d in range(layers)]
    generator, held_out = np.random.default_rng(1), np.concatenate([rows["validation"], rows["test"]])

    def guessed(*shape: int) -> dict[str, np.ndarray]:
        return {"predicted": generator.integers(0, classes, (*shape, len(held_out)), dtype=np.int32)}

    layers_alone = guessed(layers, runs)
    layers_alone["log_loss"] = generator.random(layers_alone["predicted"].shape).astype(np.float32)
    predictions = Predictions(held_out, y[held_out], layers_alone)
    for condition in ("baseline", "ablation"):
        predictions.conditions[condition] = {name: guessed(runs) for name in names}
    labels = [f"class {c}" for c in range(classes)]
    return Evidence(described, labels, y, rows, groups, np.arange(layers), top_k, predictions, seed, *FEWER_DRAWS)


def all_tested(y: np.ndarray, groups: np.ndarray | None = None, *, draws=300, seed=0) -> Evidence:
    """Return evidence all of whose LoRAs are test rows, to test predictions that are simulated."""
    rows = {"train": np.arange(0), "validation": np.arange(0), "test": np.arange(len(y))}
    classes = [f"class {c}" for c in range(y.max() + 1)]
    return Evidence([], classes, y, rows, groups, np.arange(0), 1, Predictions(rows["test"], y), seed, draws, draws)


def held_out(evidence: Evidence) -> np.ndarray:
    return evidence.y[np.concatenate([evidence.rows["validation"], evidence.rows["test"]])]


def plant(
    evidence: Evidence,
    knows: np.ndarray,
    condition: str | None = None,
    name: str = "stats",
    says: np.ndarray | None = None,
) -> None:
    """Let predictions be right (or say something else) where ``knows``, and leave them guessed elsewhere.

    Those of the layers without a condition, else of a representation.
    """
    arrays = evidence.predictions.layers if condition is None else evidence.predictions.conditions[condition][name]
    right = held_out(evidence) if says is None else says
    arrays["predicted"] = np.where(knows, right, arrays["predicted"]).astype(np.int32)


def all_predictions(evidence: Evidence) -> list[dict[str, np.ndarray]]:
    return [
        evidence.predictions.layers,
        *(arrays for named in evidence.predictions.conditions.values() for arrays in named.values()),
    ]


def share(evidence: Evidence, size: float | np.ndarray) -> np.ndarray:
    """Return a mask of a share of the held-out LoRAs, the same of each class, for each run where ``size`` has runs.

    Of the first few, which are the validation LoRAs, it is about that share too.
    """
    order = 7 * (np.arange(len(held_out(evidence))) // len(evidence.classes))
    return order % 20 < 20 * np.asarray(size)[..., None]


def features_of(evidence: Evidence, width: int = 7, seed: int = 2) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(len(evidence.y), len(evidence.layers), width)).astype(np.float32)


def updates_of(evidence: Evidence, modules: int | None = None, rank_one: bool = False) -> np.ndarray:
    modules = len(evidence.layers) // 2 if modules is None else modules
    updates = np.random.default_rng(3).uniform(1, 4, (len(evidence.y), modules, 2)).astype(np.float32)
    if rank_one:
        updates[..., 0] = 1
    return updates


def controls_of(evidence: Evidence, cheap: bool = False) -> Controls:
    """Return controls for all sections, guessed; cheap explanations take a second, so only where asked for."""
    generator, layers, n = np.random.default_rng(4), len(evidence.layers), len(evidence.truth)
    planned = plan_controls(Order.of_layers(evidence), runs=2, draws=5, points=11, conditional=True, seed=0)
    predicted = generator.integers(0, len(evidence.classes), (len(planned.names), 2, n))
    return Controls(
        level="all",
        conditions={"stats": (planned, predicted)},
        attributed=("stats", generator.random((2, layers))),
        cheap={"norms": generator.normal(size=(len(evidence.y), 3)), "metadata": None} if cheap else {},
        unused=["artist"],
        grouped=("artist", "stats", evidence.truth, np.arange(n) // 2, evidence.predicted("baseline", "stats")),
        shuffled=generator.random((3, layers)),
    )


def attended_of(
    classes: int,
    truth: np.ndarray,
    modules: list[str],
    *,
    runs: int = 2,
    planted: tuple[int, ...] = (),
    trainings: int = 19,
    seed: int = 5,
    draw: int = 0,
) -> Attended:
    """Return attention whose planted modules have most of it and tell the class, in turn; the others are alike.

    Another ``draw`` gives other LoRAs and runs of the same truth.
    """
    total, loras = len(modules), len(truth)
    generator = np.random.default_rng((seed, draw))
    strength = np.zeros(total)
    strength[list(planted)] = 4
    logits = strength + generator.normal(size=(runs, loras, total)) / 2 + generator.normal(size=(runs, 1, total)) / 5
    attention = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    knows = np.zeros((classes, total))
    for i, module in enumerate(planted):
        knows[i % classes :: max(1, len(planted)), module] = 6
    contribution = attention * (knows[truth] + generator.normal(size=attention.shape) / 4)
    counts = np.unique(np.linspace(0, total - 1, min(total, 9)).astype(int))
    ranking = np.argsort(-strength, kind="stable")
    orders = {"attention": ranking, "layers": ranking[::-1] if not planted else np.roll(ranking, 1)}
    orders |= {f"random {i}": np.random.default_rng(i).permutation(total) for i in range(1, 21)}
    value = (1 + 9 * (strength > 0)) / (1 + 9 * (strength > 0)).sum()
    deletion = {}
    for name, order in orders.items():
        left = np.array([1 - value[order[:count]].sum() for count in counts])
        right = 1 / classes + (0.95 - 1 / classes) * left  # accuracy with so many masked
        deletion[name] = generator.random((runs, 1, loras)) < right[:, None]
    uniform = generator.dirichlet(np.full(total, 20.0), trainings)
    return Attended(
        modules=modules,
        blocks=[f"block {i // 4}" for i in range(total)],
        projections=["q" if i % 2 else "v" for i in range(total)],
        tested=np.arange(loras),
        attention=attention,
        contribution=contribution,
        gradients=generator.dirichlet(1 + 5 * strength, runs),
        ranks_of_ranking=np.roll(ranking, 1),
        deletion=deletion,
        counts=counts,
        permuted=uniform if trainings else None,
    )


def mapped_of(y: np.ndarray, train: np.ndarray, layers: dict[str, float], seed: int = 6) -> list[Mapped]:
    """Return linear kernels of LoRAs around class means, at this distance from each other in noise of variance 1."""
    panels = []
    for name, distance in layers.items():
        generator = np.random.default_rng((seed, len(panels)))
        means = generator.normal(size=(int(y.max()) + 1, 2)) * distance
        features = np.concatenate([means[y], np.zeros((len(y), 6))], axis=1) + generator.normal(size=(len(y), 8))
        kernel = (features @ features[train].T).astype(np.float32)
        panels.append(Mapped(name, "" if name == "all" else "block 0", kernel, train))
    return panels


def analysed(evidence: Evidence, controls: Controls | None = None, **more) -> dict:
    """Return the analysis, which strict JSON must give back as it is."""
    names = list(evidence.predictions.conditions["baseline"])
    inputs = {"statistics": features_of(evidence), "updates": updates_of(evidence), "samples": {}} | more
    result = analyse(evidence, names, controls=controls or Controls("basic"), **inputs)
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    return result


def outcome(result: dict, part: str) -> dict:
    (record,) = (record for record in result["hypotheses"] if part in record["hypothesis"])
    return record
