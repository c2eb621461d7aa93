"""The answers to the experiment's questions, warnings beside them, and the outcome of the controls, in sentences.

Written once for results.txt (text.py) and report.html (page.py), from the content of results.json.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from report.wording import (
    NO_OTHERS,
    accuracy_text,
    bounds,
    capital,
    change_text,
    classifier_name,
    correlation_text,
    counted,
    listed,
    number,
    p_text,
    percent,
    ranges,
    runs_text,
    sentence,
    signed,
)

VERDICTS = {
    "localized": "few layers carry the concept, which lives in specific components of the network",
    "distributed": "many layers contribute, and what was learned is spread over the network",
    "redundant": "the same information is present many times, and the concept is encoded robustly throughout",
    "no signal": "all layers together are indistinguishable from chance, so nothing can survive a removal",
    "undecided": "these LoRAs and runs do not separate the verdicts; more test LoRAs would narrow the intervals",
}
BEYOND_REMOVAL = ("null shuffles", "grouped split")  # controls that are not those of a representation
NO_CONTROLS = "No controls were run, so what the differences mean is open; --controls=basic compares them with chance."


@dataclass(frozen=True)
class Question:
    """A question of the experiment, a row of ``QUESTIONS``.

    Attributes:
        key: Name of its section in ``analysis``, which its hypothesis names too.
        anchor: Name of its section in report.html.
        text: The question.
        sentences: Function of the results that yields the answer; its first two sentences say what matters most.
        unit: Unit of the number that its hypothesis rests on: ``%``, ``points`` or none.
    """

    key: str
    anchor: str
    text: str
    sentences: Callable[[dict], Iterator[str]]
    unit: str


@dataclass(frozen=True)
class Answer:
    """The answer to a question, and the outcome of its hypothesis.

    Attributes:
        anchor: Name of its section in report.html.
        question: The question.
        sentences: The answer, with its numbers; the first two say what matters most.
        hypothesis: What was expected.
        outcome: confirmed, refuted, undecided or not answerable.
        evidence: The number and interval that the outcome rests on, or why there is none.
    """

    anchor: str
    question: str
    sentences: list[str]
    hypothesis: str
    outcome: str
    evidence: str


def answers(results: dict) -> list[Answer]:
    """Return an answer to each of ``QUESTIONS``, in their order; none where no analysis was made."""
    if not (analysis := results.get("analysis")):
        return []
    hypothesis_of = {hypothesis["question"]: hypothesis for hypothesis in analysis["hypotheses"]}
    return [_answer(results, question, hypothesis_of[question.key]) for question in QUESTIONS]


def _answer(results: dict, question: Question, hypothesis: dict) -> Answer:
    return Answer(
        anchor=question.anchor,
        question=question.text,
        sentences=list(question.sentences(results)),
        hypothesis=capital(hypothesis["hypothesis"]),
        outcome=hypothesis["outcome"],
        evidence=_evidence(hypothesis, question.unit),
    )


def _evidence(hypothesis: dict, unit: str) -> str:
    why = hypothesis["why"].rstrip(".")
    if hypothesis["number"] is None:
        return sentence(why)
    shown = percent if unit else number
    value = f"{shown(hypothesis['number'])} {unit}".rstrip()
    evidence = f"{hypothesis['measure']} {value} ({bounds(hypothesis['interval'], shown)})"
    return sentence(f"{evidence}; {why}" if why else evidence)


# ----------------------------------------------------------------------------------------------------------------------
# 1. Which layers predict?
# ----------------------------------------------------------------------------------------------------------------------


def _which_layers(results: dict) -> Iterator[str]:
    section, ranking, k = results["analysis"]["layers"], results["layer_ranking"], results["config"]["top_k"]
    record_of = {record["layer"]: record for record in section["records"]}
    first, total, above = record_of[ranking[0]["layer"]], len(ranking), section["num_above_null"]
    chance = f"{percent(section['chance'])} %"
    reached = f"{first['layer']}, reaches {accuracy_text(first)[:-1]}, {p_text(first['p_family'])})"
    if above == 0:
        yield f"Each of the {total} layers is indistinguishable from chance ({chance})."
        limit = f"{percent(section['null_max'])} %"
        yield (
            f"The first of the ranking, {reached}; in 95 of 100 permutations of the labels the best of so many layers "
            f"reaches no more than {limit}."
        )
    else:
        alpha = results["analysis"]["alpha"]
        yield (
            f"{above} of {total} layers are above chance ({chance}; p < {alpha}, family-wise over all layers). The "
            f"first of the ranking, {reached}."
        )
    roles = section["groups"].get("role", {})
    if len(roles) == 2:
        means = [
            f"{role} factors {percent(group['mean'])} % ({bounds(group['interval'])})" for role, group in roles.items()
        ]
        yield f"On average {listed(means)}."
    shares = [record_of[record["layer"]]["top_k_share"] for record in ranking[:k]]
    redrawn = " to ".join(dict.fromkeys((percent(min(shares)), percent(max(shares)))))
    yield (
        f"Stability: {_stability(section, k)}; with the test LoRAs resampled, each of the top {k} is among the top {k} "
        f"in {redrawn} % of the draws."
    )


def _stability(section: dict, k: int) -> str:
    concordance, rankings = section["stability"], section["rankings"]
    parts = []
    if concordance["kendall_w"] is not None:
        parts.append(f"Kendall's W over {concordance['runs']} runs is {number(concordance['kendall_w'])}")
    if rankings["kendall_tau"] is not None:
        parts.append(f"Kendall's tau of the rankings by test and by validation {number(rankings['kendall_tau'])}")
    return ", ".join([*parts, f"their top {k} have {rankings['same_top_k']} in common"])


# ----------------------------------------------------------------------------------------------------------------------
# 2. Is prediction robust to removing them?
# ----------------------------------------------------------------------------------------------------------------------


def _is_robust(results: dict) -> Iterator[str]:
    sections = results["analysis"]["robustness"]
    if not sections:
        yield from _no_verdict(results)
        return
    names_of: dict[str, list[str]] = {}
    for name, section in sections.items():
        names_of.setdefault(section["verdict"], []).append(name)
    meanings = [f"{capital(verdict)} by {listed(names)}: {VERDICTS[verdict]}." for verdict, names in names_of.items()]
    yield " ".join(meanings)
    k, total = results["config"]["top_k"], len(results["layer_ranking"])
    for name, section in sections.items():
        random, runs = section["without_random"], runs_text(results, name)
        others = f"{NO_OTHERS} can be removed instead"
        if random["draws"]:
            others = (
                f"without {k} random ones {percent(random['mean'])} % (mean of {random['draws']} draws, which range "
                f"from {bounds((random['min'], random['max']))})"
            )
        in_runs = f" (in {runs})" if runs else ""
        yield (
            f"{name}{in_runs}: {section['why'].rstrip('.')}. With all {total} layers {accuracy_text(section['all'])}, "
            f"without the top {k} {accuracy_text(section['without_top'])}; {others}, with the top {k} alone "
            f"{accuracy_text(section['top_alone'])}."
        )


def _no_verdict(results: dict) -> Iterator[str]:
    """Yield why there is no verdict, and the effect of the removal on the best representation."""
    analysis = results["analysis"]
    if failed := [name for name in analysis["controls_not_run"] if name not in BEYOND_REMOVAL]:
        yield f"No verdict: the controls of {listed(failed)}, on which it would rest, could not be run."
    else:
        yield "No verdict: no representation was trained with other layers removed, to compare it with."
    if compared := analysis["representations"]:
        k, total, best = results["config"]["top_k"], len(results["layer_ranking"]), compared["best"]
        yield f"Without the top {k} of {total} layers {best} {change_text(compared['drops'][best])}."


# ----------------------------------------------------------------------------------------------------------------------
# 3. Which representation is best?
# ----------------------------------------------------------------------------------------------------------------------


def _best_representation(results: dict) -> Iterator[str]:
    compared = results["analysis"]["representations"]
    if not compared:
        yield "No representation was run."
        return
    best, drops = compared["best"], compared["drops"]
    accuracy = percent(results["baseline_results"][best]["test_accuracy"]["mean"])
    reached = f"{accuracy} % ({bounds(compared['intervals']['baseline'][best])})"
    chance = f"{percent(results['chance']['accuracy'])} %"
    lost = f"Without the top {results['config']['top_k']} it {change_text(drops[best])}."
    if not compared["best_above_chance"]:
        all_of, subject = f"All {len(drops)} representations are", f"the first, {best},"
        if len(drops) == 1:
            all_of, subject = f"{best} is", "it"
        yield (
            f"{all_of} indistinguishable from chance ({chance}) with all layers: {subject} reaches {reached}, "
            f"{p_text(compared['p_family'][best])}."
        )
        yield lost
        return
    yield f"{best}, with {reached} on all layers; chance is {chance}."
    if len(drops) == 1:
        yield f"It is the only representation that was run, so it is compared with none. {lost}"
        return
    yield from _lead(results)
    left = {name: results["ablation_results"][name]["test_accuracy"]["mean"] for name in drops}
    best_left = max(left, key=left.get)
    yield (
        f"{lost} Significant losses: {len(compared['significant_losses'])} of {len(drops)} representations. The best "
        f"without these layers is {best_left}, with {percent(left[best_left])} %."
    )


def _lead(results: dict) -> Iterator[str]:
    """Yield how far the best representation is ahead of the others."""
    compared = results["analysis"]["representations"]
    best, similar = compared["best"], compared["indistinguishable_from_best"]
    if similar:
        yield f"Not significantly worse than {best} (Holm-corrected): {listed(similar)}."
    others = {name: results["baseline_results"][name]["test_accuracy"]["mean"] for name in compared["drops"]}
    del others[best]
    second = max(others, key=others.get)
    pair = next(pair for pair in compared["pairs"]["baseline"] if {pair["a"], pair["b"]} == {best, second})
    sign = 1 if pair["a"] == best else -1
    interval = sorted(sign * bound for bound in pair["interval"])
    ahead = f"{percent(abs(pair['difference']))} points ({bounds(interval)}, {p_text(pair['p_holm'])})"
    beyond = "" if similar else "; it is significantly better than every other"
    yield f"It is ahead of the next, {second}, by {ahead}{beyond}."


# ----------------------------------------------------------------------------------------------------------------------
# 4. Do layers carry different information?  5. Does rank structure matter?
# ----------------------------------------------------------------------------------------------------------------------


def _different_information(results: dict) -> Iterator[str]:
    section, k = results["analysis"]["layer_information"], results["config"]["top_k"]
    union, clusters, total = section["union"], section["clusters"], len(results["layer_ranking"])
    yield (
        f"Two layers predict different classes for {percent(section['disagreement']['mean'])} % of the test LoRAs on "
        f"average (kappa {number(section['kappa']['mean'])})."
    )
    if k > 1:
        yield (
            f"The first of the top {k} is right on {percent(union['best_alone'])} % of them, a vote of the top {k} on "
            f"{percent(union['vote'])} %, a difference of {signed(union['vote_gain'])} points "
            f"({bounds(union['vote_interval'])}). At least one layer is right on {percent(union['any_of_top_k'])} %; "
            f"with labels drawn at random it would be {percent(union['any_by_chance'])} %."
        )
    alone = ", each a single layer" if clusters["count"] == total else ""
    yield (
        f"By their features (linear CKA of at least {number(1 - clusters['threshold'])} within a cluster) the {total} "
        f"layers form {counted(clusters['count'], 'cluster')}{alone}."
    )


def _rank_matters(results: dict) -> Iterator[str]:
    section = results["analysis"]["rank_structure"]
    complexity, tested = section["complexity"], section["tested"]
    if tested is None:
        yield sentence(section["why"])
        return
    if not section["answerable"]:
        yield f"{capital(section['why']).rstrip('.')}; the {tested} is tested instead."
    yield (
        f"The {tested} differs between concepts in {section['num_significant']} of {len(section['modules'])} modules "
        f"(Kruskal-Wallis, false discovery rate {100 * results['analysis']['alpha']:.0f} %)."
    )
    concepts = len(complexity["by_class"])
    known = sum(record["recall"] is not None for record in complexity["by_class"])
    over = "" if known == concepts else f", over the {known} with test LoRAs,"
    yield (
        f"Over the {concepts} concepts its Spearman correlation with the spread of a concept's features is "
        f"{correlation_text(complexity['spearman_spread'])}, with the recall of the concept by "
        f"{classifier_name(complexity['recall_by'])}{over} {correlation_text(complexity['spearman_recall'])}."
    )


QUESTIONS = (
    Question("layers", "layers", "Which layers predict?", _which_layers, ""),
    Question("robustness", "robustness", "Is prediction robust to removing them?", _is_robust, "%"),
    Question("representations", "representations", "Which representation is best?", _best_representation, "points"),
    Question("layer_information", "information", "Do layers carry different information?", _different_information, ""),
    Question("rank_structure", "rank", "Does rank structure matter?", _rank_matters, ""),
)


# ----------------------------------------------------------------------------------------------------------------------
# Concepts
# ----------------------------------------------------------------------------------------------------------------------


def concept_lines(results: dict) -> list[str]:
    """Return which concepts are recognised best and worst, and which lose most; none without an analysis."""
    if not (analysis := results.get("analysis")):
        return []
    section, compared, k = analysis["concepts"], analysis["representations"], results["config"]["top_k"]
    names = section["classes"]
    alone = {  # of the concepts that have a test LoRA
        name: max(recall)
        for name, recall in zip(names, zip(*section["recall"], strict=True), strict=True)
        if None not in recall
    }
    lines = [f"The best single layer for each concept recognises {_ends(alone)}."]
    if compared:
        best = compared["best"]
        recall, drop = (dict(zip(names, section[key][best], strict=True)) for key in ("baseline", "drop"))
        most = max(alone, key=lambda name: drop[name])
        lost = f"takes most from {most} ({percent(drop[most])} points)" if drop[most] > 0 else "costs none of them"
        ends = _ends({name: recall[name] for name in alone})
        lines.append(f"With all layers {best} recognises {ends}; removing the top {k} {lost}.")
    return lines


def _ends(recall: dict[str, float]) -> str:
    """Return the concepts of the highest and the lowest recall."""
    best, worst = max(recall, key=recall.get), min(recall, key=recall.get)
    if recall[best] == recall[worst]:
        return f"all equally well ({percent(recall[best])} %)"
    return f"{best} best ({percent(recall[best])} %) and {worst} worst ({percent(recall[worst])} %)"


# ----------------------------------------------------------------------------------------------------------------------
# Warnings
# ----------------------------------------------------------------------------------------------------------------------


def warnings(results: dict) -> list[str]:
    """Return what belongs beside the answers, so that nobody takes them for more than they are."""
    analysis, config = results.get("analysis"), results["config"]
    lines = [_quick(config)] if config["quick"] else []
    if not analysis:
        return [*lines, NO_CONTROLS]
    if analysis["few_test_loras"]:
        tested = results["dataset"]["split_sizes"]["test"]
        lines.append(f"Only {tested} test LoRAs: intervals by resampling so few are narrower than they should be.")
    if config["rank_by"] == "test":
        lines.append(_chosen_on_test(config["top_k"]))
    above, total = analysis["layers"]["num_above_null"], len(analysis["layers"]["records"])
    if above < total:
        lines.append(
            f"{total - above} of {total} layers are indistinguishable from chance (family-wise p of "
            f"{analysis['alpha']} or more)."
        )
    silent = [name for name, section in analysis["robustness"].items() if section["verdict"] == "no signal"]
    if silent:
        verb = "is" if len(silent) == 1 else "are"
        lines.append(
            f"With all layers {listed(silent)} {verb} indistinguishable from chance: the effect of a removal then "
            "means nothing."
        )
    for written in (_cheap, _not_run, _unused_groups, _degenerate_features, _shuffled):
        lines += written(analysis)
    return lines


def _quick(config: dict) -> str:
    classifier, autoencoder = config["classifier"], config["autoencoder"]
    return (
        f"All accuracies here, and everything derived from them, rest on --quick ({config['num_runs']} runs, at most "
        f"{classifier['max_epochs']} classifier and {autoencoder['max_epochs']} autoencoder epochs): not for "
        "reporting. Effective ranks, norms and clusters of layers do not depend on it."
    )


def _chosen_on_test(k: int) -> str:
    verb = "was" if k == 1 else "were"
    return (
        f"The top {k} {verb} chosen on the same test LoRAs that the drops are measured on: drops tend to look larger "
        "than they are, and their intervals and p are not corrected for that choice. --rank-by=val avoids it."
    )


def _cheap(analysis: dict) -> Iterator[str]:
    for name in (analysis["cheap"] or {}).get("as_good", ()):
        cheap, weights = analysis["cheap"][name], classifier_name(analysis["cheap"]["compared_with"])
        advantage = cheap["advantage_of_weights"]
        compared = "worse" if cheap["weights_worse"] else "not significantly better"
        yield (
            f"Cheap explanation: {name} alone give {accuracy_text(cheap)}, and {weights} is {compared}: its advantage "
            f"is {bounds(advantage)} points. The results may reflect no more than that."
        )


def _not_run(analysis: dict) -> Iterator[str]:
    for name, reason in analysis["controls_not_run"].items():
        if name == "grouped split" and analysis["groups"]:
            continue  # its reason stands with the columns
        subject = name if name in BEYOND_REMOVAL else f"controls of {name}"
        yield sentence(f"{subject} not run: {reason}")


def _unused_groups(analysis: dict) -> Iterator[str]:
    if not (groups := analysis["groups"]):
        return
    name, noun = groups["representation"], "column" if len(groups["unused"]) == 1 else "columns"
    unused = f"Groups were not used, although the {noun} {listed(groups['unused'])} may name some."
    if name is None:
        why = analysis["controls_not_run"].get("grouped split", groups["why"])
        yield sentence(f"{unused} No split that keeps them together could be tried: {why}")
    else:
        yield (
            f"{unused} A split that keeps the groups of {groups['column']} together gives {name} "
            f"{percent(groups['grouped_split'])} % ({bounds(groups['interval'])}), this one "
            f"{percent(groups['random_split'])} %. --group-column={groups['column']} uses it."
        )


def _degenerate_features(analysis: dict) -> Iterator[str]:
    """Yield which features are equal to others, or constant."""
    structure = analysis["rank_structure"]
    same_rank = structure["tested"] is not None and not structure["answerable"]
    where = "At this rank" if same_rank else "In these LoRAs"
    for name, groups in structure["coinciding"].items():
        yield f"{where} features of {name} coincide: {'; '.join(' = '.join(group) for group in groups)}."
    for name, constant in structure["constant"].items():
        yield f"{where} features of {name} never vary: {ranges(constant)}."


def _shuffled(analysis: dict) -> Iterator[str]:
    if not (null := analysis["null_shuffles"]):
        return
    least = f", the smallest that {null['shuffles']} can give" if null["ahead_of_all"] else ""
    outcome = "as expected" if null["as_expected"] else "indistinguishable from chance"
    yield (
        f"Ranked again on shuffled labels ({null['shuffles']} times, one run each), the best layer reaches at most "
        f"{percent(max(null['largest']))} %; with the true ones, in one run, {percent(null['observed'])} % "
        f"({p_text(null['p'])}{least}): {outcome}."
    )


# ----------------------------------------------------------------------------------------------------------------------
# Controls
# ----------------------------------------------------------------------------------------------------------------------


def checks(results: dict) -> list[str]:
    """Return the outcome of the controls: chance, cheap explanations, groups, attribution; none without an analysis."""
    if not (analysis := results.get("analysis")):
        return []
    layers, moved = analysis["layers"], "whole groups" if analysis["permuted"] == "groups" else "LoRAs"
    lines = [
        f"Chance: the predictions of all layers against {analysis['permutations']:,} permutations of the test labels "
        f"({moved} moved). A single layer then reaches {bounds(layers['null_band'])} %; the best of "
        f"{len(layers['records'])} stays below {percent(layers['null_max'])} % in 95 of 100.",
        *_cheap_accuracies(analysis["cheap"]),
    ]
    if gradients := analysis["attribution"]:
        rho = None if gradients["spearman"] is None else gradients | {"r": gradients["spearman"]}
        lines.append(
            f"Gradient attribution ({gradients['representation']}) against the accuracies of single layers: Spearman "
            f"correlation {correlation_text(rho)}; {gradients['same_top_k']} of the top "
            f"{results['config']['top_k']} are the same."
        )
    return [*lines, *_not_run(analysis), *_unused_groups(analysis), *_shuffled(analysis)]


def _cheap_accuracies(cheap: dict | None) -> Iterator[str]:
    if not cheap:
        yield "Cheap explanations (norms, ranks and shapes, metadata) were not tried."
        return
    for name, explanation in cheap.items():
        if name in ("as_good", "compared_with"):
            continue
        if explanation is None:
            yield f"Cheap explanation by {name}: not available, or the same in every LoRA."
        else:
            yield (
                f"Cheap explanation by {name}: {accuracy_text(explanation)}, {p_text(explanation['p'])} against "
                f"permuted labels ({explanation['classifier']}); the advantage of "
                f"{classifier_name(cheap['compared_with'])} is {bounds(explanation['advantage_of_weights'])} points."
            )
