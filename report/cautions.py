"""Warnings beside the answers, and the outcome of the controls, in sentences, from the content of results.json."""

from __future__ import annotations

import shlex
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from report.wording import (
    accuracy_text,
    bounds,
    capital,
    classifier_name,
    correlation_text,
    counted,
    listed,
    needed_text,
    p_text,
    percent,
    ranges,
    sentence,
    top_layers,
)

BEYOND_REMOVAL = (  # controls that are not those of a representation
    *("null shuffles", "grouped split", "columns of groups", "features that coincide", "cheap explanations"),
    *("attribution", "attention", "map of the collection", "conditional importance"),
    "removal of layers that other test LoRAs choose",
)
BEYOND_REMOVAL += tuple(f"cheap explanation by {name}" for name in ("norms", "ranks and shapes", "metadata", "recipe"))
CHEAP = {  # of analysis.cheap: in words
    "norms": "norms",
    "ranks and shapes": "ranks and shapes",
    "metadata": "the numbers beside the weights",
    "recipe": "the facts of the trainer's file (its recipe)",
}
CJK = ("CJK", "HIRAGANA", "KATAKANA", "HANGUL", "BOPOMOFO", "IDEOGRAPHIC", "FULLWIDTH", "HALFWIDTH")  # of Unicode names
LETTERS = 20  # without a font, that are named
UNFINISHED = "the run ended before it was done, and the same command goes on with it"
NOT_TRAINED = (
    "was trained to compare with (--controls=none): --controls=basic removes other layers, and those that other test "
    "LoRAs choose."
)
TWINS = {  # of notices on a collection: in a few words, where --keep-twins leaves them on both sides of the split
    "copies": "copies of LoRAs may be on both sides of the split",
    "epochs": "epochs of one training may be on both sides of the split",
}
LABEL_BY = {  # what the trainer decided and the concept did not, as the end of a line
    "ranks and shapes": "ranks and shapes alone predict as well",
    "metadata": "the numbers beside the weights alone predict as well",
    "recipe": "the trainer's file alone predicts as well",
}
NOT_THE_CONCEPT = "What is recognised may not be the concept"
MOST_PARTS = 3  # of results that are missing, named in a line


@dataclass(frozen=True)
class Caution:
    """A warning beside the answers, so that nobody takes them for more than they are.

    Attributes:
        text: The warning, with its numbers.
        decides: Whether it decides how all else is to be read: then it comes first, in a few words.
        subject: Of one that decides: the beginning of its line among the first; those of one subject share a line.
        brief: Likewise: its part of that line.
    """

    text: str
    decides: bool = False
    subject: str = ""
    brief: str = ""


# ----------------------------------------------------------------------------------------------------------------------
# Warnings
# ----------------------------------------------------------------------------------------------------------------------


def warnings(results: dict) -> list[Caution]:
    """Return what belongs beside the answers, those that decide how they are read first."""
    analysis, config = results.get("analysis"), results["config"]
    cautions = [*_missing(results), *([_quick(config)] if config["quick"] else [])]
    if analysis:
        cautions += _few(results)
    cautions += [*_twins(results), *_similar_labels(results)]
    if analysis:
        for written in (_alternatives, _chosen_on_test, _layers_at_chance):
            cautions += written(results)
        cautions += map(Caution, [*_not_run(results), *letters_without_font(results)])
    return cautions


def first_lines(cautions: Sequence[Caution]) -> list[str]:
    """Return what to know before anything else is read: the warnings that decide, one line for each subject."""
    parts: dict[str, list[str]] = {}
    for caution in cautions:
        if caution.decides:
            parts.setdefault(caution.subject, []).append(caution.brief)
    return [f"{subject}: {'; '.join(briefs)}." for subject, briefs in parts.items()]


def _missing(results: dict) -> Iterator[Caution]:
    """Yield what is missing; the first of them names the others."""
    parts = list(results.get("not_done", {}))
    brief = f"missing {'is' if len(parts) == 1 else 'are'} {listed(parts)}" if parts else ""
    if len(parts) > MOST_PARTS:
        brief = f"missing are {', '.join(parts[:MOST_PARTS])} and {len(parts) - MOST_PARTS} more"
    for position, line in enumerate(missing(results)):
        decides = position == 0
        yield Caution(line, decides, *(("The results are not whole", brief) if decides else ()))


def _twins(results: dict) -> Iterator[Caution]:
    """Yield that copies and epochs of a training may be on both sides of the split, where they are kept there."""
    if not results["config"].get("keep_twins"):
        return  # else they are on one side, which a note on the collection says
    for finding in results["dataset"]["findings"]:
        if brief := TWINS.get(finding["kind"]):
            yield Caution(sentence(finding["message"]), True, NOT_THE_CONCEPT, brief)


def _similar_labels(results: dict) -> Iterator[Caution]:
    """Yield that labels differ in nothing but how they are written, as the notice of them says."""
    for finding in results["dataset"]["findings"]:
        if finding["kind"] == "similar labels":
            yield Caution(sentence(finding["message"]), True, NOT_THE_CONCEPT, "some labels differ in spelling alone")


def missing(results: dict) -> list[str]:
    """Return what was asked for and is not part of the results, and why."""
    return [missing_line(part, reason) for part, reason in results.get("not_done", {}).items()]


def missing_line(part: str, reason: str) -> str:
    """Return why a part of the results is missing."""
    return sentence(f"{part} missing: {reason}")


def letters_without_font(results: dict) -> Iterator[str]:
    """Yield which letters of names the figures have no font for, and which fonts do."""
    letters = results.get("figures", {}).get("letters_without_font", "")
    if letters:
        shown = f"{letters[:LETTERS]} and {len(letters) - LETTERS} others" if len(letters) > LETTERS else letters
        yield (
            f"No font of the machine has {shown}: PNG and PDF figures show boxes in their place, SVG figures and this "
            f"text show them where they are opened with such a font. Install {listed(to_install(letters))}, and the "
            "same command draws the figures anew."
        )


def to_install(letters: str) -> list[str]:
    """Return names of fonts that have the letters: of Noto, which has a free font for each script."""
    return list(dict.fromkeys(map(_noto, letters)))


def _noto(letter: str) -> str:
    script, category = unicodedata.name(letter, "?").split()[0], unicodedata.category(letter)
    if script in CJK:
        return "Noto Sans CJK"
    if category in ("So", "Sk"):
        return "Noto Emoji"
    return f"Noto Sans {script.title()}" if category[0] in "LMN" else "Noto Sans Symbols"


def _alternatives(results: dict) -> Iterator[Caution]:
    """Yield what else than the weights, or than the concept, the results may be about."""
    analysis = results["analysis"]
    yield from _cheap(analysis)
    groups = analysis["groups"]
    for line in _unused_groups(analysis):
        if groups["may_be_groups"]:
            yield Caution(line, True, NOT_THE_CONCEPT, f"it may be the {groups['column']}")
        else:
            yield Caution(line)
    yield from map(Caution, _shuffled(analysis))


def _few(results: dict) -> Iterator[Caution]:
    analysis = results["analysis"]
    if not analysis["few_test_loras"]:
        return
    section, test = analysis["layers"], results["dataset"]["split_sizes"]["test"]
    single = analysis["permuted"] == "LoRAs" or analysis["units"] == test
    units = "test LoRAs" if single else "groups of test LoRAs"
    line = f"Only {analysis['units']} {units}: intervals are wide, and small effects cannot be seen."
    if section["num_above_null"]:  # else the first answer says it
        line += (
            f" Among {len(section['records'])} layers, the first {needed_text(section['needed'], section['chance'])}."
        )
    intervals = [record["interval"] for record in section["records"]]
    if crossed := (analysis["cross_fitted"] or {}).get("first"):
        intervals.append(crossed["interval"])
    widest = max(high - low for low, high in intervals)
    brief = f"a layer's interval is up to {round(100 * widest)} points wide, so only large differences can be seen"
    compared = analysis["representations"]
    families = {"a layer": section, "a representation": compared and compared["conditions"]["baseline"]}
    if out_of_reach := [name for name, family in families.items() if family and family["needed"] > 1 - 1e-9]:
        brief = f"even 100 % of {listed(out_of_reach)} could not be told from chance"
    yield Caution(line, True, f"Only {analysis['units']} {units}", brief)


def _layers_at_chance(results: dict) -> Iterator[Caution]:
    section = results["analysis"]["layers"]
    below, total = len(section["records"]) - section["num_above_null"], len(section["records"])
    if 0 < below < total:
        verb, they = ("is", "it holds") if below == 1 else ("are", "they hold")
        yield Caution(
            f"{below} of {total} layers {verb} indistinguishable from chance, which does not show that {they} nothing "
            "of the concept."
        )


def _quick(config: dict) -> Caution:
    runs, classifier, autoencoder = counted(config["num_runs"], "run"), config["classifier"], config["autoencoder"]
    return Caution(
        f"All accuracies here, and everything derived from them, rest on --quick ({runs}, at most "
        f"{classifier['max_epochs']} classifier and {autoencoder['max_epochs']} autoencoder epochs): not for "
        "reporting. Effective ranks, norms and clusters of layers do not depend on it.",
        True,
        "A --quick run",
        "fewer runs and epochs than the experiment is defined with, not for reporting",
    )


def _chosen_on_test(results: dict) -> Iterator[Caution]:
    if results["config"]["rank_by"] != "test":
        return
    k, crossed = results["config"]["top_k"], results["analysis"]["cross_fitted"]
    verb = "was" if k == 1 else "were"
    beside = "the numbers where other test LoRAs choose stand beside them"
    if crossed["why"]:
        beside = f"numbers where other test LoRAs choose are not known ({crossed['why']})"
        beside += "; --rank-by=val chooses on the validation LoRAs"
    elif not crossed["drops"]:
        beside = "--controls=basic adds drops where other test LoRAs choose, and --rank-by=val chooses on the "
        beside += "validation LoRAs"
    yield Caution(
        f"{capital(top_layers(k))} {verb} chosen by the same test LoRAs that the ordinary accuracies and drops are "
        f"measured on, which tends to make both too large: {beside}."
    )


def _cheap(analysis: dict) -> Iterator[Caution]:
    compared = analysis["representations"]
    nothing = compared is not None and compared["conditions"]["baseline"]["best"] is None
    for name in (analysis["cheap"] or {}).get("as_good", ()):
        cheap, weights = analysis["cheap"][name], classifier_name(analysis["cheap"]["compared_with"])
        compared = "better" if cheap["weights_worse"] else "not significantly worse"
        basis = "the trainer's file" if name == "recipe" else CHEAP[name]
        # Where the weights are indistinguishable from chance, there is no prediction to rest on anything.
        rest = "Whatever is predicted" if nothing else "The prediction"
        text = (
            f"Cheap explanation: {CHEAP[name]} alone reach {accuracy_text(cheap)}, {compared} than {weights} (whose "
            f"advantage is {bounds(cheap['advantage_of_weights'])} points). {rest} may rest on {basis} and not "
            "on the concept."
        )
        # Norms are of the weights themselves: a concept may show in them.
        yield Caution(text, True, NOT_THE_CONCEPT, LABEL_BY[name]) if name in LABEL_BY else Caution(text)


def _not_run(results: dict) -> Iterator[str]:
    analysis = results["analysis"]
    for name, reason in analysis["controls_not_run"].items():
        if name == "grouped split" and analysis["groups"]:
            continue  # its reason stands with the columns
        subject = name if name in BEYOND_REMOVAL else f"controls of {name}"
        yield sentence(f"{subject} not run: {reason}")
    for name, reason in analysis["cross_fitted"]["not_run"].items():
        yield sentence(f"{name} where other test LoRAs choose the layers not run: {reason}")
    for name, reason in (results["splits"] or {"not_run": {}})["not_run"].items():
        yield sentence(f"{name} over several splits left out: {reason}")
    for number, reason in (results["splits"] or {"splits_not_run": {}})["splits_not_run"].items():
        yield sentence(f"split {number} left out: {reason}")


def _unused_groups(analysis: dict) -> Iterator[str]:
    if not (groups := analysis["groups"]):
        return
    name, noun = groups["representation"], "column" if len(groups["unused"]) == 1 else "columns"
    unused = f"Groups were not used, although the {noun} {listed(groups['unused'])} may name some."
    if name is None and analysis["controls"] == "none":
        yield (
            f"{unused} What is predicted may be these and not the concept: --controls=basic tries a split that keeps "
            f"them together. {use_of(groups['unused'][0])}"
        )
        return
    if name is None:
        why = analysis["controls_not_run"].get("grouped split", groups["why"])
        yield sentence(f"{unused} No split that keeps them together could be tried: {why}")
        return
    meaning = (
        f" What is predicted may be the {groups['column']} and not the concept." if groups["may_be_groups"] else ""
    )
    yield (
        f"{unused} On a split that keeps the groups of {groups['column']} together {name} reaches "
        f"{percent(groups['grouped_split'])} % ({bounds(groups['interval'])}; chance {percent(groups['chance'])} %), "
        f"on this one {percent(groups['random_split'])} %.{meaning} {use_of(groups['column'])}"
    )


def use_of(column: str) -> str:
    """Return how groups of a column are used; those of a header's field are to be written into a table first."""
    if column.startswith("header: "):
        return "A table (--labels) with that field as a column, and --group-column, use it."
    return f"--group-column={shlex.quote(column)} uses it."


def _degenerate_features(results: dict) -> Iterator[str]:
    """Yield which features are equal to others, or constant."""
    structure = results["analysis"]["rank_structure"]
    same_rank = structure["tested"] is not None and not structure["answerable"]
    where = "At this rank" if same_rank else "In these LoRAs"
    for name, groups in structure["coinciding"].items():
        yield f"{where} features of {name} coincide: {'; '.join(' = '.join(group) for group in groups)}."
    for name, constant in structure["constant"].items():
        yield f"{where} features of {name} never vary: {ranges(constant)}."


def _shuffled(analysis: dict) -> Iterator[str]:
    if not (null := analysis["null_shuffles"]):
        return
    known, total = analysis["layers"]["num_above_null"], len(analysis["layers"]["records"])
    times = "once" if null["shuffles"] == 1 else f"{null['shuffles']} times"
    if null["p"] is None:
        outcome = "so few shuffles decide nothing"
    elif null["significant"]:
        outcome = f"more than on shuffled labels ({p_text(null['p'])})"
        if not known:
            outcome += ", which all runs together do not confirm"
    else:
        outcome = f"indistinguishable from shuffled labels ({p_text(null['p'])})"
        if known:
            outcome += f", where all runs together show {known} of {total} layers to be distinguishable from chance"
    yield (
        f"Ranked again on shuffled labels ({times}, one run each), the best layer reaches at most "
        f"{percent(max(null['largest']))} %; with the true ones, in one run, {percent(null['observed'])} %: {outcome}."
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
        f"({moved} moved). By chance a single layer reaches {bounds(layers['null_band'])} %; the first among "
        f"{len(layers['records'])} {needed_text(layers['needed'], layers['chance'])}.",
        *_cheap_accuracies(analysis["cheap"]),
    ]
    if analysis["controls"] == "none":
        only = "Nothing but the ranking on shuffled labels" if analysis["null_shuffles"] else "Nothing"
        lines.insert(0, f"{only} {NOT_TRAINED}")
    if gradients := analysis["attribution"]:
        rho = None if gradients["spearman"] is None else gradients | {"r": gradients["spearman"]}
        k, same = results["config"]["top_k"], gradients["same_top_k"]
        common = f"{same} of the top {k} in common"
        if k == 1:
            common = "the same first layer" if same else "another first layer"
        lines.append(
            f"Gradient attribution ({gradients['representation']}) against the accuracies of single layers: Spearman "
            f"correlation {correlation_text(rho)}; {common}."
        )
    lines += [*_not_run(results), *_unused_groups(analysis), *_shuffled(analysis)]
    return [*lines, *_degenerate_features(results)]


def _cheap_accuracies(cheap: dict | None) -> Iterator[str]:
    if not cheap:
        yield f"Cheap explanations ({listed(list(CHEAP.values()))}) were not tried."
        return
    explanations = {name: explanation for name, explanation in cheap.items() if name in CHEAP}
    for name, explanation in explanations.items():
        if explanation is not None:
            yield (
                f"Cheap explanation by {CHEAP[name]}: {accuracy_text(explanation)}, {p_text(explanation['p'])} against "
                f"permuted labels ({explanation['classifier']}); the advantage of "
                f"{classifier_name(cheap['compared_with'])} is {bounds(explanation['advantage_of_weights'])} points."
            )
    if missing := [CHEAP[name] for name, explanation in explanations.items() if explanation is None]:
        yield f"Cheap explanation by {listed(missing)}: not available, or the same in every LoRA."
