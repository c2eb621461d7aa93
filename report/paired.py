"""Sentences on pairs of representations that differ in one thing, which question 3 asks by name.

They are compared on the same test LoRAs and runs, in one family with the comparisons with the best.
"""

from __future__ import annotations

from collections.abc import Iterator

from report.wording import bounds, listed, p_text, signed

LEARNED_PROJECTIONS = "update_learned"
FIXED_PROJECTIONS = {
    "update_frozen": "the same network with fixed ones (update_frozen)",
    "update_sketch": "update_sketch",
}
OF_INPUTS, OF_DIRECTIONS = "update_response", "update_sketch"
OUTCOMES = {  # of the pair, by the sign of a significant difference
    1: "the recorded inputs tell more",
    -1: "the random directions tell more",
    0: "neither is shown to be better",
}


def paired_sentences(results: dict) -> Iterator[str]:
    """Yield what learning projections of updates is worth, and what recorded inputs are; nothing of what was not run.

    Args:
        results: Content of results.json.
    """
    parts = []
    for name, fixed in FIXED_PROJECTIONS.items():
        parts += [f"{change} against {fixed}" for change, _ in _changes(results, LEARNED_PROJECTIONS, name)]
    if parts:
        yield f"With learned projections ({LEARNED_PROJECTIONS}) accuracy changes {listed(parts)}."
    for change, better in _changes(results, OF_INPUTS, OF_DIRECTIONS):
        yield (
            f"With inputs that the base model sees ({OF_INPUTS}) in place of random directions ({OF_DIRECTIONS}) "
            f"accuracy changes {change}: {OUTCOMES[better]}."
        )


def _changes(results: dict, name: str, other: str) -> Iterator[tuple[str, int]]:
    """Yield the change of accuracy from another representation to one, in words, and its sign; 0: not significant.

    Nothing where the two are not compared.
    """
    for record in results["analysis"]["representations"]["conditions"]["baseline"]["comparisons"]:
        if {record["a"], record["b"]} == {name, other}:
            sign = 1 if record["a"] == name else -1
            interval, difference = sorted(sign * bound for bound in record["interval"]), sign * record["difference"]
            change = f"by {signed(difference)} points ({bounds(interval)}, {p_text(record['p'])})"
            yield change, (1 if difference > 0 else -1) if record["significant"] else 0
