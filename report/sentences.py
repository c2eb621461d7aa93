"""The short answers to the experiment's questions, from the content of results.json, and how numbers are told.

Made once for results.txt (report.py) and report.html (page.py). Percentages have one decimal, differences of accuracies
are in points, numbers in brackets are 95 % intervals.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

from analysis.evidence import ALPHA

DRAWN_P = 1e-4  # p of draws below this are not told apart: 1 / 10,001 is the smallest that 10,000 permutations give
ROUNDED_P = 1e-9  # and other p below this: results.json keeps 9 decimals
QUESTIONS = {  # anchor in report.html -> question
    "layers": "Which layers predict?",
    "robustness": "Is prediction robust to removing them?",
    "representations": "Which representation is best?",
    "information": "Do layers carry different information?",
    "rank": "Does rank structure matter?",
}
VERDICTS = {
    "localized": "few layers carry the concept, which lives in specific components of the network",
    "distributed": "many layers contribute, and what was learned is spread over the network",
    "redundant": "the same information is there many times, and the concept is encoded robustly throughout",
    "no signal": "all layers together cannot be told from chance, so there is nothing that could survive a removal",
    "undecided": "these LoRAs and runs do not tell the verdicts apart; more test LoRAs would narrow the intervals",
}
BEYOND_REMOVAL = ("null shuffles", "grouped split")  # controls that are not those of a representation
NO_OTHERS = "no other layers of the same roles"  # to draw random ones from
NO_CONTROLS = "No controls were run, so what the differences mean is open; --controls=basic compares them with chance."


@dataclass(frozen=True)
class Answer:
    """One of the five questions, answered.

    Attributes:
        anchor: Of its section in report.html.
        question: As it is asked.
        sentences: The answer, with its numbers; the first two say what matters most.
        hypothesis: What was expected, and ``outcome`` (confirmed, refuted, undecided or not answerable), and the
            number and interval it rests on (``evidence``).
    """

    anchor: str
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


def signed(difference: float) -> str:
    """A difference of shares in points with its sign, of 0.0 without one."""
    told = percent(difference)
    return told if told == "0.0" or told.startswith("-") else f"+{told}"


def p_text(p: float, least: float = DRAWN_P) -> str:
    """A p with two significant digits.

    Args:
        p: As results.json holds it.
        least: Below it p are not told apart: ``DRAWN_P`` of permutations and the bootstrap, else ``ROUNDED_P``.

    Example:
        >>> p_text(1 / 10001), p_text(0.01234), p_text(1.0), p_text(0.0, ROUNDED_P)
        ('p < 0.0001', 'p = 0.012', 'p = 1', 'p < 1e-9')
    """
    told = f"p < {least:g}" if p < least else f"p = {p:.2g}"
    return told.replace("e-0", "e-")


def p_cell(p: float, least: float = DRAWN_P) -> str:
    """A p in a table, under its name."""
    return p_text(p, least).removeprefix("p ").removeprefix("= ")


def bounds(interval: Sequence[float], shown: Callable[[float], str] = percent) -> str:
    """An interval in words."""
    return f"{shown(interval[0])} to {shown(interval[1])}"


def accuracy_text(found: dict) -> str:
    """An accuracy with its interval."""
    return f"{percent(found['accuracy'])} % ({bounds(found['interval'])})"


def correlation_text(found: dict | None) -> str:
    """A correlation with its interval."""
    if found is None:
        return "not measured (too few, or constant)"
    return f"{number(found['r'])} ({bounds(found['interval'], number)})"


def change_text(found: dict) -> str:
    """What the removal does, given its drop: ``loses 1.2 points (0.3 to 2.1, p = 0.01)``, or ``gains``."""
    verb, sign = ("gains", -1) if percent(found["drop"]).startswith("-") else ("loses", 1)
    interval = sorted(sign * bound for bound in found["interval"])
    return f"{verb} {percent(sign * found['drop'])} points ({bounds(interval)}, {p_text(found['p_holm'])})"


def runs_text(results: dict, name: str) -> str:
    """Of how many runs a representation's controls are, where its accuracies are of more: ``3 of the 10 runs``."""
    entry, runs = results["baseline_results"].get(name), results["analysis"]["robustness"][name]["runs"]
    total = len(entry["test_accuracy"]["runs"]) if entry else results["config"]["num_runs"]
    return f"{runs} of the {total} runs" if runs < total else ""


def metric(values: dict) -> str:
    """Mean and deviation in percent, 13 characters wide."""
    return f"{100 * values['mean']:>6.1f} ± {100 * values['std']:<4.1f}"


def kept_together(text: str) -> str:
    """Text in which no line ends between a number and its sign: with a no-break space there."""
    return re.sub(r"(?<=[\dp=<]) (?=[%=<\d])", "\N{NO-BREAK SPACE}", text)


def wrapped(text: str, width: int, first: str = "", rest: str = "") -> list[str]:
    """Text in lines of so many characters, which begin with ``first`` and ``rest``; names are never cut."""
    indents = {"initial_indent": first, "subsequent_indent": rest}
    lines = textwrap.wrap(kept_together(text), width, **indents, break_long_words=False, break_on_hyphens=False)
    return [line.replace("\N{NO-BREAK SPACE}", " ") for line in lines]


def listed(words: Sequence[str]) -> str:
    """Words in a row, the last two joined by "and"."""
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def ranges(names: Sequence[str]) -> str:
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
        Answer(anchor, question, list(tell(results, found)), *_hypothesis(hypothesis, unit))
        for (anchor, question), tell, hypothesis, unit in zip(
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
    reached = f"{first['layer']}, reaches {accuracy_text(first)[:-1]}, {p_text(first['p_family'])})"
    if above == 0:
        yield f"None of the {total} layers can be told from chance ({percent(found['chance'])} %)."
        yield (
            f"The first of the ranking, {reached}; in 95 of 100 permutations chance alone takes the best of so many no "
            f"further than {percent(found['null_max'])} %."
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
    shares = [record_of[record["layer"]]["top_k_share"] for record in ranking[:k]]
    again = " to ".join(dict.fromkeys((percent(min(shares)), percent(max(shares)))))
    yield (
        f"Stability: {_stability(found, k)}; with the test LoRAs drawn again, each of the top {k} is among the top {k} "
        f"in {again} % of the draws."
    )


def _stability(found: dict, k: int) -> str:
    concordance, agree = found["stability"], found["rankings"]
    parts = []
    if concordance["kendall_w"] is not None:
        parts.append(f"Kendall's W over {concordance['runs']} runs is {number(concordance['kendall_w'])}")
    if agree["kendall_tau"] is not None:
        parts.append(f"Kendall's tau of the rankings by test and by validation {number(agree['kendall_tau'])}")
    return ", ".join([*parts, f"their top {k} have {agree['same_top_k']} in common"])


def _is_robust(results: dict, a: dict) -> Iterator[str]:
    compared = a["robustness"]
    if not compared:
        yield from _no_verdict(results, a)
        return
    verdicts = dict.fromkeys(found["verdict"] for found in compared.values())
    names_of = {verdict: [name for name in compared if compared[name]["verdict"] == verdict] for verdict in verdicts}
    yield " ".join(
        f"{capital(verdict)} by {listed(names)}: {VERDICTS[verdict]}." for verdict, names in names_of.items()
    )
    k, total = results["config"]["top_k"], len(results["layer_ranking"])
    for name, found in compared.items():
        random, runs = found["without_random"], runs_text(results, name)
        drawn = f"{NO_OTHERS} can be removed instead"
        if random["draws"]:
            drawn = (
                f"without {k} random ones {percent(random['mean'])} % (mean of {random['draws']} draws, which range "
                f"from {bounds((random['min'], random['max']))})"
            )
        yield (
            f"{name}{f' (in {runs})' if runs else ''}: {found['why']}. With all {total} layers "
            f"{accuracy_text(found['all'])}, without the top {k} {accuracy_text(found['without_top'])}; {drawn}, with "
            f"the top {k} alone {accuracy_text(found['top_alone'])}."
        )


def _no_verdict(results: dict, a: dict) -> Iterator[str]:
    """Why there is none, and what the removal does to the best representation."""
    if failed := [name for name in a["controls_not_run"] if name not in BEYOND_REMOVAL]:
        yield f"No verdict: the controls of {listed(failed)}, which it would rest on, could not be run."
    else:
        yield "No verdict: no representation was trained with other layers removed, which it would be compared with."
    if a["representations"]:
        k, best = results["config"]["top_k"], a["representations"]["best"]
        drop = a["representations"]["drops"][best]
        yield f"Without the top {k} of {len(results['layer_ranking'])} layers {best} {change_text(drop)}."


def _best_representation(results: dict, a: dict) -> Iterator[str]:
    compared, k = a["representations"], results["config"]["top_k"]
    if not compared:
        yield "No representation was run."
        return
    best, near = compared["best"], compared["indistinguishable_from_best"]
    means = {name: entry["test_accuracy"]["mean"] for name, entry in results["baseline_results"].items()}
    left = {name: entry["test_accuracy"]["mean"] for name, entry in results["ablation_results"].items()}
    reached = f"{percent(means[best])} % ({bounds(compared['intervals']['baseline'][best])})"
    chance, only = f"{percent(results['chance']['accuracy'])} %", len(means) == 1
    if not compared["best_above_chance"]:
        none, first = (f"{best} cannot", "it") if only else (f"None of the {len(means)} can", f"the first, {best},")
        p = p_text(compared["p_family"][best])
        yield f"{none} be told from chance ({chance}) with all layers: {first} reaches {reached}, {p}."
        yield _lost(compared, best, k)
        return
    yield f"{best}, with {reached} on all layers; chance is {chance}."
    if only:
        yield f"It is the only one that was run, so it is compared with none. {_lost(compared, best, k)}"
        return
    if near:
        yield f"Not to be told from it by these LoRAs (Holm-corrected): {listed(near)}."
    second = max((name for name in means if name != best), key=means.get)
    one = next(one for one in compared["pairs"]["baseline"] if {one["a"], one["b"]} == {best, second})
    low, high = sorted((1 if one["a"] == best else -1) * bound for bound in one["interval"])
    ahead = f"{percent(abs(one['difference']))} points ({bounds((low, high))}, {p_text(one['p_holm'])})"
    beyond = "" if near else ", and of all others significantly"
    yield f"It is ahead of the next, {second}, by {ahead}{beyond}."
    losers = [name for name, found in compared["drops"].items() if found["p_holm"] < ALPHA and found["drop"] > 0]
    yield (
        f"{_lost(compared, best, k)} Significant losses: {len(losers)} of {len(means)} representations. The best "
        f"without these layers is {max(left, key=left.get)}, with {percent(max(left.values()))} %."
    )


def _lost(compared: dict, name: str, k: int) -> str:
    return f"Without the top {k} it {change_text(compared['drops'][name])}."


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
            f"say on {percent(union['vote'])} %, a difference of {signed(union['vote_gain'])} points "
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
    if found["tested"] is None:
        yield f"{capital(found['why'])}."
        return
    if not found["answerable"]:
        yield f"{capital(found['why'])}; the {found['tested']} is tested instead."
    yield (
        f"The {found['tested']} differs between concepts in {found['num_significant']} of {len(found['modules'])} "
        f"modules (Kruskal-Wallis, false discovery rate {100 * ALPHA:.0f} %)."
    )
    recall = [one["recall"] for one in complexity["by_class"] if one["recall"] is not None]
    some = "" if len(recall) == len(complexity["by_class"]) else f", over the {len(recall)} with test LoRAs,"
    yield (
        f"Over the {len(complexity['by_class'])} concepts its Spearman correlation with the spread of a concept's "
        f"features is {correlation_text(complexity['spearman_spread'])}, with the recall of the concept by "
        f"{by_whom(complexity['recall_by'])}{some} {correlation_text(complexity['spearman_recall'])}."
    )


def by_whom(representation: str | None) -> str:
    """The representation that something is taken from; without any the first layer of the ranking."""
    return representation or "the best single layer"


def concept_lines(results: dict) -> list[str]:
    """Which concepts are told best and worst, by one layer and by the best representation; none without an analysis."""
    if not (a := results.get("analysis")):
        return []
    found, compared, k = a["concepts"], a["representations"], results["config"]["top_k"]
    names = found["classes"]
    alone = {
        name: max(of) for name, of in zip(names, zip(*found["recall"], strict=True), strict=True) if None not in of
    }
    lines = [f"The best single layer for each concept recognises {_ends(alone)}."]
    if compared:
        best = compared["best"]
        recall, drop = (dict(zip(names, found[key][best], strict=True)) for key in ("baseline", "drop"))
        most = max(alone, key=lambda name: drop[name])  # those that a test LoRA is there of
        lost = f"takes most from {most} ({percent(drop[most])} points)" if drop[most] > 0 else "costs none of them"
        ends = _ends({name: recall[name] for name in alone})
        lines.append(f"With all layers {best} recognises {ends}; removing the top {k} {lost}.")
    return lines


def _ends(recall: dict[str, float]) -> str:
    """The concepts of the highest and the lowest recall."""
    best, worst = max(recall, key=recall.get), min(recall, key=recall.get)
    if recall[best] == recall[worst]:
        return f"all alike ({percent(recall[best])} %)"
    return f"{best} best ({percent(recall[best])} %) and {worst} worst ({percent(recall[worst])} %)"
