"""The short answers to the experiment's questions, from the content of results.json, and how numbers are told.

Made once for results.txt (report.py) and report.html (page.py). Percentages have one decimal, differences of accuracies
are in points, numbers in brackets are 95 % intervals.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

SMALLEST_P = 1e-4  # p below this are not told apart: 1 / 10,001 is the smallest that 10,000 permutations give
ALPHA = 0.05  # of all tests, as in the analysis
QUESTIONS = {  # anchor in report.html, name of the picture -> question
    ("layers", "layer_importance"): "Which layers predict?",
    ("robustness", "ablation_curves"): "Is prediction robust to removing them?",
    ("representations", "representations"): "Which representation is best?",
    ("information", "layer_clusters"): "Do layers carry different information?",
    ("rank", "rank_structure"): "Does rank structure matter?",
}
VERDICTS = {
    "localized": "few layers carry the concept, which lives in specific components of the network",
    "distributed": "many layers contribute, and what was learned is spread over the network",
    "redundant": "the same information is there many times, and the concept is encoded robustly throughout",
    "no signal": "all layers together do not predict the concept, so there is nothing that could survive a removal",
    "undecided": "these LoRAs and runs do not tell the verdicts apart; more test LoRAs would narrow the intervals",
}
NO_CONTROLS = "No controls were run, so what the differences mean is open; --controls=basic compares them with chance."


@dataclass(frozen=True)
class Answer:
    """One of the five questions, answered.

    Attributes:
        anchor: Of its section in report.html.
        picture: Name of the picture that shows it, without the ending.
        question: As it is asked.
        sentences: The answer, with its numbers; the first two say what matters most.
        hypothesis: What was expected, and ``outcome`` (confirmed, refuted, undecided or not answerable), and the
            number and interval it rests on (``evidence``).
    """

    anchor: str
    picture: str
    question: str
    sentences: list[str]
    hypothesis: str
    outcome: str
    evidence: str


# ----------------------------------------------------------------------------------------------------------------------
# Numbers as text
# ----------------------------------------------------------------------------------------------------------------------


def percent(share: float) -> str:
    """A share in percent with one decimal, never -0.0.

    Example:
        >>> percent(0.4417), percent(-0.0001)
        ('44.2', '0.0')
    """
    return f"{round(100 * share, 1) + 0.0:.1f}"


def number(value: float) -> str:
    """A correlation or score with two decimals, never -0.00."""
    return f"{round(value, 2) + 0.0:.2f}"


def p_text(p: float) -> str:
    """A p with two significant digits.

    Example:
        >>> p_text(1 / 10001), p_text(0.01234), p_text(1.0)
        ('p < 0.0001', 'p = 0.012', 'p = 1')
    """
    return f"p < {SMALLEST_P:.4f}" if p < SMALLEST_P else f"p = {p:.2g}"


def p_cell(p: float) -> str:
    """A p in a table, under its name."""
    return p_text(p).removeprefix("p ").removeprefix("= ")


def bounds(interval: Sequence[float], shown: Callable[[float], str] = percent) -> str:
    """An interval in words."""
    return f"{shown(interval[0])} to {shown(interval[1])}"


def _accuracy(found: dict) -> str:
    return f"{percent(found['accuracy'])} % ({bounds(found['interval'])})"


def _correlation(found: dict | None) -> str:
    return "not measured (too few, or constant)" if found is None else f"{number(found['r'])} ({_two(found)})"


def _two(found: dict) -> str:
    return bounds(found["interval"], number)


def metric(values: dict) -> str:
    """Mean and deviation in percent, 13 characters wide."""
    return f"{100 * values['mean']:>6.1f} ± {100 * values['std']:<4.1f}"


def kept_together(text: str) -> str:
    """Text in which no line ends between a number and its sign: with a no-break space there."""
    return re.sub(r"(?<=[\dp=<]) (?=[%=<\d])", "\N{NO-BREAK SPACE}", text)


def listed(words: Sequence[str]) -> str:
    """Words in a row, the last two joined by "and"."""
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def _ranges(names: Sequence[str]) -> str:
    """Names in a row, those that are numbered one after the other as a range: sigma_5 to sigma_10."""
    told = []
    split = [re.fullmatch(r"(.*?)(\d+)", name) for name in names]
    keyed = [(m[1], int(m[2]) - i) if m else (name, None) for i, (m, name) in enumerate(zip(split, names, strict=True))]
    for _, run in groupby(zip(keyed, names, strict=True), key=lambda one: one[0]):
        run = [name for _, name in run]
        told += [f"{run[0]} to {run[-1]}"] if len(run) > 2 else run
    return ", ".join(told)


# ----------------------------------------------------------------------------------------------------------------------
# The short answers
# ----------------------------------------------------------------------------------------------------------------------


def answers(results: dict) -> list[Answer]:
    """The five questions answered from the content of results.json; none where no analysis was made.

    Args:
        results: The content of results.json.

    Returns:
        One answer for each of ``QUESTIONS``, in their order, or none.
    """
    found = results.get("analysis")
    if not found:
        return []
    told = (_which_layers, _is_robust, _best_representation, _different_information, _rank_matters)
    units = ("", "%", "points", "", "")
    return [
        Answer(anchor, picture, question, list(tell(results, found)), *_hypothesis(hypothesis, unit))
        for ((anchor, picture), question), tell, hypothesis, unit in zip(
            QUESTIONS.items(), told, found["hypotheses"], units, strict=True
        )
    ]


def _hypothesis(found: dict, unit: str) -> tuple[str, str, str]:
    """What was expected, how it came out, and what that rests on."""
    why = found["why"]
    if found["number"] is None:
        evidence = why
    else:
        shown = percent if unit else number
        value = f"{shown(found['number'])} {unit}".rstrip()
        evidence = f"{found['measure']} {value} ({bounds(found['interval'], shown)})" + (f"; {why}" if why else "")
    return capital(found["hypothesis"]), found["outcome"], f"{capital(evidence)}."


def capital(text: str) -> str:
    """The text with a capital first letter, as a sentence begins."""
    return text[:1].upper() + text[1:]


def _which_layers(results: dict, a: dict) -> Iterator[str]:
    found, ranking, k = a["layers"], results["layer_ranking"], results["config"]["top_k"]
    record_of = {record["layer"]: record for record in found["records"]}
    first, total, above = record_of[ranking[0]["layer"]], len(ranking), found["num_above_null"]
    reached = f"{first['layer']}, reaches {_accuracy(first)[:-1]}, {p_text(first['p_family'])})"
    if above == 0:
        yield f"None of the {total} layers can be told from chance ({percent(found['chance'])} %)."
        yield (
            f"The first of the ranking, {reached}; chance alone takes the best of so many up to "
            f"{percent(found['null_max'])} %."
        )
    else:
        yield (
            f"{above} of {total} layers are above chance ({percent(found['chance'])} %; p < {ALPHA}, family-wise over "
            f"all layers). The first of the ranking, {reached}."
        )
    roles = found["groups"].get("role", {})
    if len(roles) == 2:
        means = [f"{name} factors {percent(of['mean'])} % ({bounds(of['interval'])})" for name, of in roles.items()]
        yield f"On average {listed(means)}."
    shares = sorted(record_of[record["layer"]]["top_k_share"] for record in ranking[:k])
    again = f"{percent(shares[0])} to {percent(shares[-1])} %" if k > 1 else f"{percent(shares[0])} %"
    yield (
        f"Stability: {_stability(found, k)}; with the test LoRAs drawn again, each of the top {k} is among the top {k} "
        f"in {again} of the draws."
    )


def _stability(found: dict, k: int) -> str:
    concordance, agree = found["stability"], found["rankings"]
    parts = []
    if concordance["kendall_w"] is not None:
        parts.append(f"Kendall's W over {concordance['runs']} runs is {number(concordance['kendall_w'])}")
    if agree["kendall_tau"] is not None:
        parts.append(f"the rankings by test and by validation agree with tau {number(agree['kendall_tau'])}")
    return ", ".join([*parts, f"their top {k} have {agree['same_top_k']} in common"])


def _is_robust(results: dict, a: dict) -> Iterator[str]:
    k, total = results["config"]["top_k"], len(results["layer_ranking"])
    compared = a["robustness"]
    verdicts = list(dict.fromkeys(found["verdict"] for found in compared.values()))
    names_of = {verdict: [name for name in compared if compared[name]["verdict"] == verdict] for verdict in verdicts}
    if compared:
        yield " ".join(
            f"{capital(verdict)} by {listed(names)}: {VERDICTS[verdict]}." for verdict, names in names_of.items()
        )
    for name, found in compared.items():
        random = found["without_random"]
        yield (
            f"{name}: {found['why']}. With all {total} layers {_accuracy(found['all'])}, without the top {k} "
            f"{_accuracy(found['without_top'])}; without {k} random ones {percent(random['mean'])} % (mean of "
            f"{random['draws']} draws, which range from {percent(random['min'])} to {percent(random['max'])}), with "
            f"the top {k} alone {_accuracy(found['top_alone'])}."
        )
    if not compared:
        yield "No verdict: no representation was trained with other layers removed, which it would be compared with."
        if a["representations"]:
            best = a["representations"]["best"]
            yield f"Removing the top {k} of {total} layers costs {best} {_drop(a['representations']['drops'][best])}."


def _drop(found: dict, p: str = "p_holm") -> str:
    return f"{percent(found['drop'])} points ({bounds(found['interval'])}, {p_text(found[p])})"


def _best_representation(results: dict, a: dict) -> Iterator[str]:
    compared, k = a["representations"], results["config"]["top_k"]
    if not compared:
        yield "No representation was run."
        return
    best, near = compared["best"], compared["indistinguishable_from_best"]
    means = {name: entry["test_accuracy"]["mean"] for name, entry in results["baseline_results"].items()}
    left = {name: entry["test_accuracy"]["mean"] for name, entry in results["ablation_results"].items()}
    reached = f"{percent(means[best])} % ({bounds(compared['intervals']['baseline'][best])})"
    if len(means) == 1:
        yield f"{best} reaches {reached} with all layers; chance is {percent(results['chance']['accuracy'])} %."
        yield f"It is the only one that was run, so it is compared with none. {_lost(compared, best, k)}"
        return
    yield f"{best}, with {reached} on all layers; chance is {percent(results['chance']['accuracy'])} %."
    if near:
        yield f"Not to be told from it by these LoRAs (Holm-corrected): {listed(near)}."
    second = max((name for name in means if name != best), key=means.get)
    one = next(one for one in compared["pairs"]["baseline"] if {one["a"], one["b"]} == {best, second})
    low, high = sorted((1 if one["a"] == best else -1) * bound for bound in one["interval"])
    ahead = f"{percent(abs(one['difference']))} points ({bounds((low, high))}, {p_text(one['p_holm'])})"
    yield f"It is ahead of the next, {second}, by {ahead}{'' if near else ', and of all others significantly'}."
    losers = [name for name, found in compared["drops"].items() if found["p_holm"] < ALPHA and found["drop"] > 0]
    yield (
        f"{_lost(compared, best, k)} Significant losses: {len(losers)} of {len(means)} representations. The best "
        f"without these layers is {max(left, key=left.get)}, with {percent(max(left.values()))} %."
    )


def _lost(compared: dict, name: str, k: int) -> str:
    return f"Without the top {k} it loses {_drop(compared['drops'][name])}."


def _different_information(results: dict, a: dict) -> Iterator[str]:
    found, k = a["layer_information"], results["config"]["top_k"]
    union, clusters = found["union"], found["clusters"]
    yield (
        f"Two layers give different answers on {percent(found['disagreement']['mean'])} % of the test LoRAs on average "
        f"(kappa {number(found['kappa']['mean'])})."
    )
    if k > 1:
        yield (
            f"The first of the top {k} is right on {percent(union['best_alone'])} % of them, what most of the top {k} "
            f"say on {percent(union['vote'])} %: a gain of {percent(union['vote_gain'])} points "
            f"({bounds(union['vote_interval'])}). At least one is right on {percent(union['any_of_top_k'])} %; on "
            f"labels drawn anew it would be {percent(union['any_by_chance'])} %."
        )
    total = len(results["layer_ranking"])
    yield (
        f"By their features (linear CKA of at least {number(1 - clusters['threshold'])} within a cluster) the {total} "
        f"layers form {clusters['count']} {'cluster' if clusters['count'] == 1 else 'clusters'}"
        f"{': each stands alone' if clusters['count'] == total else ''}."
    )


def _rank_matters(results: dict, a: dict) -> Iterator[str]:
    found = a["rank_structure"]
    complexity = found["complexity"]
    if not found["answerable"]:
        yield f"{capital(found['why'])}; the {found['tested']} is tested instead."
    yield (
        f"The {found['tested']} differs between concepts in {found['num_significant']} of {len(found['modules'])} "
        f"modules (Kruskal-Wallis, false discovery rate {100 * ALPHA:.0f} %)."
    )
    yield (
        f"Over the {len(complexity['by_class'])} concepts its Spearman correlation with the spread of a concept's "
        f"features is {_correlation(complexity['spearman_spread'])}, with how well the concept is recognised "
        f"{_correlation(complexity['spearman_recall'])}."
    )


def concept_lines(results: dict) -> list[str]:
    """Which concepts are told best and worst, by one layer and by the best representation; none without an analysis."""
    if not (a := results.get("analysis")):
        return []
    found, compared = a["concepts"], a["representations"]
    classes = range(len(found["classes"]))
    alone = [max(of[c] for of in found["recall"]) for c in classes]
    lines = [f"A single layer recognises {_ends(found['classes'], alone)}."]
    if compared:
        recall, drop = (found[key][compared["best"]] for key in ("baseline", "drop"))
        most = max(classes, key=drop.__getitem__)
        lines.append(
            f"With all layers {compared['best']} recognises {_ends(found['classes'], recall)}; removing the top "
            f"{results['config']['top_k']} takes most from {found['classes'][most]} ({percent(drop[most])} points)."
        )
    return lines


def _ends(names: Sequence[str], recall: Sequence[float]) -> str:
    best, worst = (pick(range(len(names)), key=recall.__getitem__) for pick in (max, min))
    return f"{names[best]} best ({percent(recall[best])} %) and {names[worst]} worst ({percent(recall[worst])} %)"


# ----------------------------------------------------------------------------------------------------------------------
# What to bear in mind
# ----------------------------------------------------------------------------------------------------------------------


def warnings(results: dict) -> list[str]:
    """What belongs beside the answers, so that nobody takes them for more than they are."""
    found = results.get("analysis")
    lines = [_quick(results["config"])] if results["config"]["quick"] else []
    if not found:
        return [*lines, NO_CONTROLS]
    above, total = found["layers"]["num_above_null"], len(found["layers"]["records"])
    if above < total:
        lines.append(
            f"{total - above} of {total} layers are undistinguishable from chance (family-wise p of {ALPHA} or more)."
        )
    silent = [name for name, one in found["robustness"].items() if one["verdict"] == "no signal"]
    if silent:
        lines.append(f"With all layers {listed(silent)} cannot be told from chance: its figures mean nothing more.")
    best = found["representations"]["best"] if found["representations"] else "the first layer"
    for name in (found["cheap"] or {}).get("as_good", ()):
        cheap = found["cheap"][name]
        lines.append(
            f"Cheap explanation: {name} alone predict as well as the weights do: {_accuracy(cheap)}; the advantage of "
            f"{best} is {bounds(cheap['advantage_of_weights'])} points. What is found may be no more than that."
        )
    return [*lines, *_unused_groups(found), *_merged(found["rank_structure"]), *_shuffled(found)]


def _quick(config: dict) -> str:
    classifier, autoencoder = config["classifier"], config["autoencoder"]
    return (
        f"All accuracies here, and all that is built on them, rest on --quick ({config['num_runs']} runs, at most "
        f"{classifier['max_epochs']} classifier and {autoencoder['max_epochs']} autoencoder epochs): not for "
        "reporting. Effective ranks, norms and clusters of layers do not depend on it."
    )


def _unused_groups(found: dict) -> Iterator[str]:
    if groups := found["groups"]:
        columns, name = listed(groups["unused"]), groups["representation"]
        yield (
            f"Groups were not used, though there is a column for them: {columns}. A split that keeps the groups of "
            f"{groups['unused'][0]} together gives {name} {percent(groups['grouped_split'])} % "
            f"({bounds(groups['interval'])}), this one {percent(groups['random_split'])} %. "
            f"--group-column={groups['unused'][0]} uses it."
        )


def _merged(structure: dict) -> Iterator[str]:
    for name, groups in structure["coinciding"].items():
        same = "; ".join(" = ".join(group) for group in groups)
        yield f"At this rank features of {name} coincide: {same}."
    for name, constant in structure["constant"].items():
        yield f"At this rank features of {name} never vary: {_ranges(constant)}."


def _shuffled(found: dict) -> Iterator[str]:
    if told := found["null_shuffles"]:
        largest = max(told["largest"])
        passed = "as it should be" if largest < told["observed"] else "no more than chance gives"
        least = (
            f", the smallest that {told['shuffles']} can give" if told["p"] <= 1.001 / (1 + told["shuffles"]) else ""
        )
        yield (
            f"Ranked again on shuffled labels ({told['shuffles']} times), the best layer reaches "
            f"{percent(largest)} % at most; with the true ones {percent(told['observed'])} % "
            f"({p_text(told['p'])}{least}): {passed}."
        )


def checks(results: dict) -> list[str]:
    """How the controls came out, whatever they say: chance, cheap explanations, groups, attribution."""
    found = results.get("analysis")
    if not found:
        return []
    layers, moved = found["layers"], "whole groups" if found["permuted"] == "groups" else "LoRAs"
    lines = [
        f"Chance: the predictions of all layers against {found['permutations']:,} permutations of the test labels "
        f"({moved} moved). A single layer then reaches {bounds(layers['null_band'])} %; the best of "
        f"{len(layers['records'])} stays below {percent(layers['null_max'])} % in 95 of 100."
    ]
    for name, one in (found["cheap"] or {}).items():
        if name == "as_good":
            continue
        if one is None:
            lines.append(f"Cheap explanation by {name}: not there, or the same in every LoRA.")
        else:
            lines.append(
                f"Cheap explanation by {name}: {_accuracy(one)}, {p_text(one['p'])} against permuted labels "
                f"({one['classifier']}); the weights are ahead by {bounds(one['advantage_of_weights'])} points."
            )
    if not found["cheap"]:
        lines.append("Cheap explanations (norms, ranks and shapes, metadata) were not tried.")
    if gradients := found["attribution"]:
        rho = None if gradients["spearman"] is None else gradients | {"r": gradients["spearman"]}
        lines.append(
            f"Gradient attribution ({gradients['representation']}) against the accuracies of single layers: Spearman "
            f"correlation {_correlation(rho)}; {gradients['same_top_k']} of the top "
            f"{results['config']['top_k']} are the same."
        )
    return [*lines, *_unused_groups(found), *_shuffled(found)]
