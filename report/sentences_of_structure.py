"""The answers to questions 4 and 5, on the information in layers and on rank structure, in sentences.

From the content of results.json, as those in sentences.py, which gathers all five.
"""

from __future__ import annotations

from collections.abc import Iterator

from report.wording import (
    accuracy_text,
    bounds,
    capital,
    classifier_name,
    correlation_text,
    counted,
    number,
    percent,
    sentence,
    signed,
)

# ----------------------------------------------------------------------------------------------------------------------
# 4. Do layers carry different information?
# ----------------------------------------------------------------------------------------------------------------------


def different_information(results: dict) -> Iterator[str]:
    """Yield how far layers differ in what they predict and in their features, and what the top ones know together."""
    section, k = results["analysis"]["layer_information"], results["config"]["top_k"]
    clusters, total = section["clusters"], len(results["layer_ranking"])
    layers = results["analysis"]["layers"]
    if (known := layers["num_above_null"]) < 2:
        alone = "No single layer is" if known == 0 else f"Only 1 of {total} layers is"
        by = " by accuracy" if (layers["num_above_null_f1"] or 0) > known else ""
        yield f"Not shown: {alone.lower()} distinguishable from chance{by}, and layers at chance differ by chance."
    yield (
        f"Two layers predict different classes for {percent(section['disagreement']['mean'])} % of the test LoRAs on "
        f"average (kappa {number(section['kappa']['mean'])}; 0 is agreement by chance)."
    )
    if k > 1:
        yield from _together(results)
    similar = f"linear CKA of at least {number(1 - clusters['threshold'])}"
    if clusters["count"] == total:
        yield f"No two of {total} layers have similar features ({similar})."
    else:
        yield (
            f"By their features ({similar} within a cluster) the {total} layers form "
            f"{counted(clusters['count'], 'cluster')}."
        )


def _together(results: dict) -> Iterator[str]:
    """Yield what the top layers know together that the first does not know alone."""
    analysis, k = results["analysis"], results["config"]["top_k"]
    union, crossed = analysis["layer_information"]["union"], analysis["cross_fitted"]
    yield (
        f"A vote of the top {k} is right on {percent(union['vote'])} % of the test LoRAs, the first alone on "
        f"{percent(union['best_alone'])} %: a difference of {signed(union['vote_gain'])} points "
        f"({bounds(union['vote_interval'])})."
    )
    if crossed["why"]:
        yield f"At least one of the top {k} is right on {percent(union['any_of_top_k'])} %, which chance raises too."
        return
    together = crossed["union"]
    yield (
        f"Where other test LoRAs choose the layers, the vote is right on {accuracy_text(crossed['vote'])}, the first "
        f"alone on {accuracy_text(crossed['first'])}, and at least one of the top {k} on {accuracy_text(together)}, "
        f"against {percent(together['by_chance'])} % on shuffled labels."
    )


# ----------------------------------------------------------------------------------------------------------------------
# 5. Does rank structure matter?
# ----------------------------------------------------------------------------------------------------------------------


def rank_matters(results: dict) -> Iterator[str]:
    """Yield in how many modules the rank, or the norm, differs between concepts, and what it goes with."""
    section = results["analysis"]["rank_structure"]
    complexity, tested = section["complexity"], section["tested"]
    if tested is None:
        yield sentence(section["why"])
        return
    if not section["answerable"]:
        yield f"{capital(section['why']).rstrip('.')}; the {tested} is tested instead."
    yield (
        f"The {tested} differs significantly between concepts in {section['num_significant'] or 'none'} of "
        f"{counted(len(section['modules']), 'module')} (Kruskal-Wallis, false discovery rate "
        f"{100 * results['analysis']['alpha']:.0f} %)."
    )
    concepts = len(complexity["by_class"])
    known = sum(record["recall"] is not None for record in complexity["by_class"])
    if complexity["spearman_spread"] is None and complexity["spearman_recall"] is None:
        yield (
            f"Its correlations over the {concepts} concepts, with the spread of their features and with their recall, "
            "are not measured (too few, or constant)."
        )
        return
    over = "" if known == concepts else f", over the {known} with test LoRAs,"
    yield (
        f"Over the {concepts} concepts its Spearman correlation with the spread of a concept's features is "
        f"{correlation_text(complexity['spearman_spread'])}, with the recall of the concept by "
        f"{classifier_name(complexity['recall_by'])}{over} {correlation_text(complexity['spearman_recall'])}."
    )
