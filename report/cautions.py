"""What to bear in mind beside the answers, and how the controls came out, from the content of results.json."""

from __future__ import annotations

from collections.abc import Iterator

from analysis.evidence import ALPHA
from report.sentences import (
    BEYOND_REMOVAL,
    NO_CONTROLS,
    accuracy_text,
    bounds,
    by_whom,
    capital,
    correlation_text,
    listed,
    p_text,
    percent,
    ranges,
)

FEW = 50  # test LoRAs, below which intervals by resampling them promise too much


def warnings(results: dict) -> list[str]:
    """What belongs beside the answers, so that nobody takes them for more than they are."""
    found, config = results.get("analysis"), results["config"]
    lines = [_quick(config)] if config["quick"] else []
    if not found:
        return [*lines, NO_CONTROLS]
    tested = results["dataset"]["split_sizes"]["test"]
    if tested < FEW:
        lines.append(f"Only {tested} test LoRAs: intervals by drawing them again are narrower than they should be.")
    if config["rank_by"] == "test":
        lines.append(_chosen_on_test(config["top_k"]))
    above, total = found["layers"]["num_above_null"], len(found["layers"]["records"])
    if above < total:
        lines.append(
            f"{total - above} of {total} layers are undistinguishable from chance (family-wise p of {ALPHA} or more)."
        )
    silent = [name for name, one in found["robustness"].items() if one["verdict"] == "no signal"]
    if silent:
        lines.append(
            f"With all layers {listed(silent)} cannot be told from chance: what a removal does then means nothing."
        )
    for told in (_cheap, _not_run, _unused_groups, _merged, _shuffled):
        lines += told(found)
    return lines


def _quick(config: dict) -> str:
    classifier, autoencoder = config["classifier"], config["autoencoder"]
    return (
        f"All accuracies here, and all that is built on them, rest on --quick ({config['num_runs']} runs, at most "
        f"{classifier['max_epochs']} classifier and {autoencoder['max_epochs']} autoencoder epochs): not for "
        "reporting. Effective ranks, norms and clusters of layers do not depend on it."
    )


def _chosen_on_test(k: int) -> str:
    return (
        f"The top {k} {'were' if k > 1 else 'was'} chosen on the same test LoRAs that the drops are measured on: drops "
        "tend to look larger than they are, and their intervals and p do not pay for that choice. --rank-by=val avoids "
        "it."
    )


def _cheap(found: dict) -> Iterator[str]:
    for name in (found["cheap"] or {}).get("as_good", ()):
        cheap, weights = found["cheap"][name], by_whom(found["cheap"]["compared_with"])
        ahead = cheap["advantage_of_weights"]
        yield (
            f"Cheap explanation: {name} alone give {accuracy_text(cheap)}, and {weights} is "
            f"{'worse' if ahead[1] < 0 else 'not clearly better'}: its advantage is {bounds(ahead)} points. What is "
            "found may be no more than that."
        )


def _not_run(found: dict) -> Iterator[str]:
    for name, reason in found["controls_not_run"].items():
        if name == "grouped split" and found["groups"]:
            continue  # told with the columns
        what = name if name in BEYOND_REMOVAL else f"controls of {name}"
        yield f"{capital(what)} not run: {reason.rstrip('.')}."


def _unused_groups(found: dict) -> Iterator[str]:
    if not (groups := found["groups"]):
        return
    columns, name = groups["unused"], groups["representation"]
    told = f"Groups were not used, though there is a column for them: {listed(columns)}."
    if name is None:
        why = found["controls_not_run"].get("grouped split", groups["why"])
        yield f"{told} No split that keeps them together could be tried: {why.rstrip('.')}."
    else:
        yield (
            f"{told} A split that keeps the groups of {groups['column']} together gives {name} "
            f"{percent(groups['grouped_split'])} % "
            f"({bounds(groups['interval'])}), this one {percent(groups['random_split'])} %. "
            f"--group-column={groups['column']} uses it."
        )


def _merged(found: dict) -> Iterator[str]:
    structure = found["rank_structure"]
    same_rank = structure["tested"] is not None and not structure["answerable"]
    where = "At this rank" if same_rank else "In these LoRAs"
    for name, groups in structure["coinciding"].items():
        yield f"{where} features of {name} coincide: {'; '.join(' = '.join(group) for group in groups)}."
    for name, constant in structure["constant"].items():
        yield f"{where} features of {name} never vary: {ranges(constant)}."


def _shuffled(found: dict) -> Iterator[str]:
    if told := found["null_shuffles"]:
        most = told["p"] <= 1.001 / (1 + told["shuffles"])  # the true labels are ahead of all
        passed = "as it should be" if most or told["p"] < ALPHA else "no more than chance may give"
        least = f", the smallest that {told['shuffles']} can give" if most else ""
        yield (
            f"Ranked again on shuffled labels ({told['shuffles']} times, one run each), the best layer reaches "
            f"{percent(max(told['largest']))} % at most; with the true ones, in one run, {percent(told['observed'])} % "
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
        f"{len(layers['records'])} stays below {percent(layers['null_max'])} % in 95 of 100.",
        *_cheap_accuracies(found["cheap"]),
    ]
    if gradients := found["attribution"]:
        rho = None if gradients["spearman"] is None else gradients | {"r": gradients["spearman"]}
        lines.append(
            f"Gradient attribution ({gradients['representation']}) against the accuracies of single layers: Spearman "
            f"correlation {correlation_text(rho)}; {gradients['same_top_k']} of the top "
            f"{results['config']['top_k']} are the same."
        )
    return [*lines, *_not_run(found), *_unused_groups(found), *_shuffled(found)]


def _cheap_accuracies(cheap: dict | None) -> Iterator[str]:
    if not cheap:
        yield "Cheap explanations (norms, ranks and shapes, metadata) were not tried."
        return
    for name, one in cheap.items():
        if name in ("as_good", "compared_with"):
            continue
        if one is None:
            yield f"Cheap explanation by {name}: not there, or the same in every LoRA."
        else:
            yield (
                f"Cheap explanation by {name}: {accuracy_text(one)}, {p_text(one['p'])} against permuted labels "
                f"({one['classifier']}); the advantage of {by_whom(cheap['compared_with'])} is "
                f"{bounds(one['advantage_of_weights'])} points."
            )
