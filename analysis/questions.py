"""The five questions in their order, each with its hypothesis, and what else ``analysis`` of results.json holds.

A question is one row of ``QUESTIONS``. Shape letters as in evidence.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from analysis.attention import Attended, attention
from analysis.chance import ChanceTest
from analysis.collection_map import Mapped, collection_map
from analysis.comparison import (
    CHALLENGED,
    CHALLENGERS,
    best_on_validation,
    cheap_explanations,
    compare_representations,
    grouped_split,
    null_shuffles,
)
from analysis.cross_fitting import TrainedSets, cross_fitted
from analysis.draws import ALPHA, LEVEL, parts_of
from analysis.evidence import LEAST_CORRELATED, Evidence, choose_rows
from analysis.layers import COARSE_CLASSES, attribution, concepts, layer_information, layer_ranking, recalls
from analysis.rank_structure import coinciding, rank_structure
from analysis.removal import LEAST_UNITS, conditional_importance, robustness, settle
from analysis.removal_plan import Conditions

FEATURE_NUMBERS = 2**24  # of features that descriptions only (CKA, clusters, spread) read, at most
CLIP = 10.0  # standard deviations beyond which a feature is an outlier of a heavy tail, as in training
FEW_TEST_LORAS = 50  # (or groups) below which only large effects can be seen
NAMES = {  # of sections, where they could not be answered
    "cheap": "cheap explanations",
    "groups": "grouped split",
    "null_shuffles": "null shuffles",
    "collection_map": "map of the collection",
}
STEEP = 0.5  # of the accuracy above chance, which is lost with a tenth of the layers where degradation is not graceful

Attempt = Callable[[str, Callable], object]


@dataclass(frozen=True)
class Controls:
    """Results to compare with; each may be empty or None.

    Attributes:
        level: As --controls gives it.
        conditions: By representation, the conditions and the predicted classes of the test LoRAs, int[K, R, T].
        attributed: Representation, and shares of its gradient attribution, float[R, L].
        cheap: Features of explanations without weights, float[N, F] or None each.
        unused: Columns that look like groups and were not used.
        grouped: Of a split by the first of them that allows one: the column, representation, and truth int[m], groups
            int[m] and predictions int[R, m] of its m test LoRAs.
        shuffled: Accuracy of each layer on shuffled labels, one run, float[shuffles, L].
        cross_fitted: Without the layers that folds of the test LoRAs chose.
        attended: Attention of trained classifiers over modules.
        mapped: Kernels of the LoRAs, by which they are laid out in the plane.
    """

    level: str
    conditions: dict[str, tuple[Conditions, np.ndarray]] = field(default_factory=dict)
    attributed: tuple[str, np.ndarray] | None = None
    cheap: dict[str, np.ndarray | None] = field(default_factory=dict)
    unused: Sequence[str] = ()
    grouped: tuple[str, str, np.ndarray, np.ndarray, np.ndarray] | None = None
    shuffled: np.ndarray | None = None
    cross_fitted: TrainedSets = field(default_factory=TrainedSets)
    attended: Attended | None = None
    mapped: Sequence[Mapped] = ()


@dataclass(frozen=True)
class Material:
    """All that the questions are answered from.

    Attributes:
        evidence: The evidence.
        layers_test: Of the L layers, each alone.
        names: Representations that were run with and without the top layers.
        features: Statistics of each layer, standardised, float64[M, L, F].
        described: The LoRAs that they are of, int[M].
        updates: Effective rank and Frobenius norm of each update, float[N, P, 2 or more].
        samples: Features of some LoRAs by representation, float[., L, F], with their names.
        controls: Results to compare with.
        best: The best representation on validation rows; None where none was run.
        best_predicted: Its predictions of the test LoRAs, int[R, T]; where there is none, those of the first layer.
    """

    evidence: Evidence
    layers_test: ChanceTest
    names: Sequence[str]
    features: np.ndarray
    described: np.ndarray
    updates: np.ndarray
    samples: dict[str, tuple[np.ndarray, Sequence[str]]]
    controls: Controls
    best: str | None
    best_predicted: np.ndarray


@dataclass(frozen=True)
class Question:
    """One of the five questions.

    Attributes:
        key: Of its section in ``analysis`` of results.json.
        answer: Gives the section.
        hypothesis: Decides the hypothesis that belongs to it, given all sections.
    """

    key: str
    answer: Callable[[Material], object]
    hypothesis: Callable[[dict], dict]


def analyse(
    evidence: Evidence,
    names: Sequence[str],
    statistics: np.ndarray,
    updates: np.ndarray,
    samples: dict[str, tuple[np.ndarray, Sequence[str]]],
    controls: Controls,
    attempt: Attempt = lambda _, do: do(),
) -> dict:
    """Answer the five questions: ``analysis`` of results.json.

    Args:
        evidence: The evidence.
        names: Representations that were run with and without the top layers.
        statistics: Statistics of each layer, float[N, L, 7].
        updates: Effective rank and Frobenius norm of each update, float[N, P, 2 or more]; see `rank_structure`.
        samples: Features of some LoRAs by representation, float[., L, F], with their names.
        controls: Results to compare with.
        attempt: Of a name and a function: gives what that returns, or None where it fails, which it notes. What
            answers none of the five questions may fail.
    """
    # By validation: what is compared with explanations without weights must not be chosen by what it is tested on.
    best = best_on_validation(evidence, "baseline", names)
    first_layer = evidence.ranking[0]
    best_predicted = evidence.predicted("baseline", best) if best else evidence.layer_predictions()[first_layer]
    described = choose_rows(evidence.y, FEATURE_NUMBERS // math.prod(statistics.shape[1:]), evidence.seed)
    features = standardised(statistics[described])
    layers_test = ChanceTest.of(evidence, list(evidence.layer_predictions()))
    material = Material(
        evidence, layers_test, names, features, described, updates, samples, controls, best, best_predicted
    )
    sections = {question.key: question.answer(material) for question in QUESTIONS}
    crossed, compared = cross_fitted(evidence, controls.cross_fitted), sections["representations"]
    any_above = bool(compared and compared["conditions"]["baseline"]["above_null"])
    chosen_by = "validation LoRAs" if controls.cross_fitted.why else "other test LoRAs"
    sections["robustness"] = settle(sections["robustness"], crossed["top_alone"], any_above, chosen_by)
    sections["cross_fitted"] = crossed
    hypotheses = [{"question": question.key, **question.hypothesis(sections)} for question in QUESTIONS]
    return plain(
        _settings(material) | sections | _other_sections(material, sections, attempt) | {"hypotheses": hypotheses}
    )


def _settings(material: Material) -> dict:
    """Return what the analysis was done with."""
    evidence = material.evidence
    return {
        "controls": material.controls.level,
        "level": LEVEL,
        "alpha": ALPHA,
        "resamples": evidence.resamples,
        "permutations": evidence.permutations,
        "permuted": "LoRAs" if evidence.groups is None else "groups",
        "units": evidence.draws.units,
        "unequal_classes": evidence.unequal,
        "few_test_loras": evidence.draws.units < FEW_TEST_LORAS,
        "rows_described": len(material.described),
    }


def _other_sections(material: Material, sections: dict, attempt: Attempt) -> dict:
    """Return the sections that answer none of the five questions; None where there is nothing to answer from."""
    evidence, controls = material.evidence, material.controls
    result: dict[str, object] = {"concepts": concepts(evidence, material.names)}
    for conditions, predicted in controls.conditions.values():
        if any(name.startswith("plus ") for name in conditions.names) and "conditional" not in result:
            added = attempt("conditional importance", partial(conditional_importance, evidence, conditions, predicted))
            result |= {"conditional": added} if added else {}
    accuracy = np.array([record["accuracy"] for record in sections["layers"]["records"]])
    cheap, tried = (evidence, controls.cheap, material.best_predicted, attempt), controls.level != "none"
    answers = {  # what there is to answer from, and who answers
        "attribution": (controls.attributed, lambda given: attribution(evidence, *given, accuracy)),
        "cheap": (controls.cheap, lambda _: cheap_explanations(*cheap) | {"compared_with": material.best}),
        "groups": (controls.unused, lambda given: grouped_split(evidence, given, controls.grouped, tried)),
        "null_shuffles": (controls.shuffled, partial(null_shuffles, evidence)),
        "attention": (controls.attended, partial(attention, evidence)),
        "collection_map": (controls.mapped, partial(collection_map, evidence)),
    }
    for name, (given, answer) in answers.items():
        answerable = given is not None and (isinstance(given, np.ndarray | Attended) or len(given) > 0)
        result[name] = attempt(NAMES.get(name, name), partial(answer, given)) if answerable else None
    return result


def standardised(features: np.ndarray) -> np.ndarray:
    """Scale each feature of each layer to mean 0 and variance 1, then clip it: float[M, L, F] -> float64[M, L, F].

    A constant feature is 0: one whose standard deviation is at most 1e-6 of its largest magnitude.
    """
    scaled = features.astype(np.float64)
    for part in parts_of(scaled.shape[1], scaled[:, 0].size):
        layers = scaled[:, part]
        std, largest = layers.std(0), np.abs(layers).max(0)
        layers -= layers.mean(0)
        scaled[:, part] = np.divide(layers, std, out=np.zeros_like(layers), where=std > 1e-6 * largest)
    return np.clip(scaled, -CLIP, CLIP, out=scaled)


def plain(value: object) -> object:
    """Convert to JSON's types: lists for arrays, Python's numbers, rounded to 9 decimals (a p of 0 is less).

    Raises:
        ValueError: A number is not finite.
    """
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, np.ndarray | list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, bool | np.bool_):
        return bool(value)
    if isinstance(value, int | np.integer):
        return int(value)
    if isinstance(value, float | np.floating):
        if not math.isfinite(value):
            raise ValueError("a number of the analysis is not finite")
        return round(float(value), 9) + 0.0  # never -0.0
    return value


# ----------------------------------------------------------------------------------------------------------------------
# Answers
# ----------------------------------------------------------------------------------------------------------------------


def _which_layers(material: Material) -> dict:
    return layer_ranking(material.evidence, material.layers_test)


def _is_robust(material: Material) -> dict:
    measured = material.controls.conditions
    return {name: robustness(material.evidence, *conditions) for name, conditions in measured.items()}


def _best_representation(material: Material) -> dict | None:
    return compare_representations(material.evidence, material.names) if material.names else None


def _different_information(material: Material) -> dict:
    return layer_information(material.evidence, material.layers_test, material.features, material.described)


def _rank_matters(material: Material) -> dict:
    recall = recalls(material.evidence, material.best_predicted)
    section = rank_structure(material.evidence, material.updates, material.features, material.described, recall)
    section["complexity"]["recall_by"] = material.best
    merged = {name: coinciding(*sample) for name, sample in material.samples.items()}
    return section | {
        "coinciding": {name: groups for name, (groups, _) in merged.items() if groups},
        "constant": {name: constant for name, (_, constant) in merged.items() if constant},
    }


# ----------------------------------------------------------------------------------------------------------------------
# Hypotheses: each confirmed, refuted, undecided or not answerable
# ----------------------------------------------------------------------------------------------------------------------


def _later_layers_predict_more(sections: dict) -> dict:
    depth = sections["layers"]["depth"]
    record = _unanswered("later layers are more predictive", "Spearman correlation of depth and accuracy over blocks")
    if depth["why"]:
        return record | {"why": depth["why"]}
    return _decided(record, depth["r"], depth["interval"], _sign(depth["p"], depth["interval"]))


def _degradation_is_graceful(sections: dict) -> dict:
    # The first control is that of the representation by which the layers are ranked, unless it was not run.
    section = next(iter(sections["robustness"].values()), None)
    steepest = section["steepest"] if section else None
    record = _unanswered(
        "degradation is graceful",
        "largest part of the accuracy above chance that a tenth of the layers takes, until half are removed",
    )
    if steepest is None:
        why = section["why"] if section else "no removal was compared with others"
        if section and section["units"] < LEAST_UNITS:
            why = f"fewer than {LEAST_UNITS} {section['unit']}s"
        return record | {"why": why}
    low, high = steepest["interval"]
    outcome = "undecided"
    if high <= STEEP:
        outcome = "confirmed"
    elif low > STEEP and section["verdict"] != "redundant":  # else the fall is from more than all layers have
        outcome = "refuted"
    decided = _decided(record, steepest["share"], steepest["interval"], outcome)
    return decided | {"why": f"graceful is at most {100 * STEEP:.0f} %"}


def _better_than_stats(sections: dict) -> dict:
    """Decide by the better of ensemble and spectral, in the family of all comparisons with all layers."""
    compared = sections["representations"]
    record = _unanswered("ensemble or spectral outperforms stats", "difference of test accuracies")
    pairs = []
    for pair in compared["conditions"]["baseline"]["comparisons"] if compared else ():
        if {pair["a"], pair["b"]} in ({CHALLENGED, challenger} for challenger in CHALLENGERS):
            sign, name = (1, pair["a"]) if pair["b"] == CHALLENGED else (-1, pair["b"])
            bounds = sorted(sign * np.asarray(pair["interval"]))
            pairs.append(pair | {"name": name, "difference": sign * pair["difference"], "interval": bounds})
    if not pairs:
        return record | {"why": "stats was not run together with ensemble or spectral"}
    better = max(pairs, key=lambda pair: pair["difference"])
    outcome = "undecided"
    if any(pair["significant"] and pair["interval"][0] > 0 for pair in pairs):
        outcome = "confirmed"
    elif len(pairs) == len(CHALLENGERS) and all(pair["significant"] and pair["interval"][1] < 0 for pair in pairs):
        outcome = "refuted"
    why = f"{better['name']} minus stats"
    if len(pairs) > 1:
        why = f"{better['name']}, the better of the two, minus stats"
    return _decided(record, better["difference"], better["interval"], outcome) | {"why": why}


def _top_layers_separate_clusters(sections: dict) -> dict:
    """Decide by both parts: the top layers are better at clusters, and the others at concepts within them."""
    section = sections["layer_information"]["coarse"]
    record = _unanswered(
        "top layers separate clusters of concepts, other layers the concepts within them",
        "lesser of the top layers' lead in separating clusters and the other layers' lead within them",
    )
    if section is None:
        return record | {"why": f"no clusters of concepts (these need {COARSE_CLASSES} classes or more)"}
    if section["why"]:
        return record | {"why": section["why"]}
    parts = [section["coarse"], section["fine"]]
    outcome = "undecided"
    if all(part["interval"][0] > 0 for part in parts):
        outcome = "confirmed"
    elif all(part["interval"][1] < 0 for part in parts):
        outcome = "refuted"
    lesser = min(parts, key=lambda part: part["difference"])
    why = "decided only where both leads are above 0, or both below" if outcome == "undecided" else ""
    return _decided(record, lesser["difference"], lesser["interval"], outcome) | {"why": why}


def _rank_goes_with_complexity(sections: dict) -> dict:
    structure = sections["rank_structure"]
    spread = structure["complexity"]["spearman_spread"]
    record = _unanswered(
        "effective rank correlates with the complexity of the concept",
        "Spearman correlation over concepts of effective rank and spread of features",
    )
    if not structure["answerable"]:
        return record | {"why": structure["why"].removeprefix("not answerable ")}
    if spread is None:
        return record | {"why": f"fewer than {LEAST_CORRELATED} classes, or none that differ"}
    return _decided(record, spread["r"], spread["interval"], _sign(spread["p"], spread["interval"]))


def _unanswered(hypothesis: str, measure: str) -> dict:
    """Return the record of a hypothesis that is not answerable, but for the reason."""
    return {
        "hypothesis": hypothesis,
        "outcome": "not answerable",
        "measure": measure,
        "number": None,
        "interval": None,
        "why": "",
    }


def _decided(record: dict, number: float, bounds: Sequence[float], outcome: str) -> dict:
    """Return the record of `_unanswered` with its number, interval and outcome."""
    return record | {"outcome": outcome, "number": number, "interval": bounds}


def _sign(p: float, bounds: Sequence[float]) -> str:
    """Decide that a number is above 0, below, or neither; an interval of few numbers may be narrower than p allows."""
    low, high = bounds
    if p >= ALPHA or low <= 0 <= high:
        return "undecided"
    return "confirmed" if low > 0 else "refuted"


QUESTIONS = (
    Question("layers", _which_layers, _later_layers_predict_more),
    Question("robustness", _is_robust, _degradation_is_graceful),
    Question("representations", _best_representation, _better_than_stats),
    Question("layer_information", _different_information, _top_layers_separate_clusters),
    Question("rank_structure", _rank_matters, _rank_goes_with_complexity),
)
