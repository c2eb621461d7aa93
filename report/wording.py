"""Numbers and lists of results.json as text.

Percentages have one decimal, differences of accuracies are in points, numbers in brackets are intervals. Zero is never
written with a minus sign.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Callable, Sequence
from itertools import groupby

DRAWN_P = 1e-4  # smaller p of draws are shown alike: 1 / 10,001 is the smallest that 10,000 permutations give
ROUNDED_P = 1e-9  # the bound for all other p: results.json keeps 9 decimals
NO_OTHERS = "too few others to draw from"


# ----------------------------------------------------------------------------------------------------------------------
# Numbers
# ----------------------------------------------------------------------------------------------------------------------


def percent(share: float) -> str:
    """Return a share in percent with one decimal.

    Example:
        >>> percent(0.4417), percent(-0.0001)
        ('44.2', '0.0')
    """
    return f"{round(100 * share, 1) + 0.0:.1f}"


def whole_percent(share: float) -> str:
    """Return a share in whole percent, where there is little room."""
    return str(round(100 * share))


def number(value: float) -> str:
    """Return a correlation or score with two decimals."""
    return f"{round(value, 2) + 0.0:.2f}"


def signed(difference: float) -> str:
    """Return a difference of shares in points with its sign, which 0.0 has not."""
    points = percent(difference)
    return points if points == "0.0" or points.startswith("-") else f"+{points}"


def p_text(p: float, least: float = DRAWN_P) -> str:
    """Return a p-value with two significant digits.

    Args:
        p: The value in results.json.
        least: Smaller values are shown as ``p < least``: ``DRAWN_P`` of permutations and the bootstrap, else
            ``ROUNDED_P``.

    Example:
        >>> p_text(1 / 10001), p_text(0.01234), p_text(1.0), p_text(0.0, ROUNDED_P)
        ('p < 0.0001', 'p = 0.012', 'p = 1', 'p < 1e-9')
    """
    text = f"p < {least:g}" if p < least else f"p = {p:.2g}"
    return text.replace("e-0", "e-")


def p_cell(p: float, least: float = DRAWN_P) -> str:
    """Return a p-value for a table column that is headed p."""
    return p_text(p, least).removeprefix("p ").removeprefix("= ")


def bounds(interval: Sequence[float], shown: Callable[[float], str] = percent) -> str:
    """Return an interval as text, each bound written by ``shown``."""
    return f"{shown(interval[0])} to {shown(interval[1])}"


def accuracy_text(estimate: dict) -> str:
    """Return an accuracy with its interval."""
    return f"{percent(estimate['accuracy'])} % ({bounds(estimate['interval'])})"


def needed_text(needed: float, chance: float) -> str:
    """Return what an accuracy would have to be to differ from chance, as the end of a sentence on it.

    Predictions that spread over the classes reach less on permuted labels than always guessing the largest class does,
    which is what ``chance`` is: the bound may lie below that.
    """
    if needed > 1 - 1e-9:
        return "would be indistinguishable from chance by so few test LoRAs even at 100 %"
    if needed < chance:
        return f"would have to exceed {percent(needed)} % to be distinguishable from permuted labels"
    return f"would have to exceed {percent(needed)} % to be distinguishable from chance"


def left_text(estimate: dict) -> str:
    """Return the accuracy under a removal with its interval; of nothing, which is not trained, that it is chance."""
    if estimate["interval"] is None:
        return f"nothing is left ({percent(estimate['accuracy'])} %, chance)"
    return accuracy_text(estimate)


def correlation_text(correlation: dict | None) -> str:
    """Return a correlation with its interval."""
    if correlation is None:
        return "not measured (too few, or constant)"
    return f"{number(correlation['r'])} ({bounds(correlation['interval'], number)})"


def change_text(drop: dict) -> str:
    """Return the effect of a removal: ``loses 1.2 points (0.3 to 2.1, p = 0.01)``, or ``gains``."""
    verb, sign = "loses", 1
    if percent(drop["drop"]).startswith("-"):
        verb, sign = "gains", -1
    interval = sorted(sign * bound for bound in drop["interval"])
    return f"{verb} {percent(sign * drop['drop'])} points ({bounds(interval)}, {p_text(drop['p'])})"


def gain_text(drop: dict) -> str:
    """Return the gain by a removal with its sign, interval and, where it is significant, a star."""
    low, high = (signed(-bound) for bound in reversed(drop["interval"]))
    star = " *" if drop["significant"] else ""
    return f"{signed(-drop['drop'])} ({low} to {high}){star}"


def spread_text(values: dict, unit: str = "%") -> str:
    """Return a mean over splits with its interval; with their range where there are too few splits for one."""
    around = f"range {bounds((values['min'], values['max']))}"
    if values["interval"]:
        around = bounds(values["interval"])
    elif percent(values["min"]) == percent(values["max"]):
        around = "on each" if len(values["values"]) > 1 else "on one"
    return f"{percent(values['mean'])} {unit} ({around})"


def top_layers(k: int) -> str:
    """Return the top k layers in words."""
    return "the top layer" if k == 1 else f"the top {k} layers"


def first_removed(count: int, section: dict) -> str:
    """Return the first units in the order of removal in words; where none is above chance, none is predictive."""
    unit = section["unit"]
    if not section["units_above"]:
        return f"first {unit} of the order" if count == 1 else f"first {count} {unit}s of the order"
    return f"most predictive {unit}" if count == 1 else f"{count} most predictive {unit}s"


def runs_text(results: dict, name: str) -> str:
    """Return ``3 of the 10 runs`` where a representation's controls have fewer runs than its accuracies, else none."""
    entry, runs = results["baseline_results"].get(name), results["analysis"]["robustness"][name]["runs"]
    total = len(entry["test_accuracy"]["runs"]) if entry else results["config"]["num_runs"]
    return f"{runs} of the {total} runs" if runs < total else ""


def mean_text(mean: float, std: float, runs: int) -> str:
    """Return a mean and the deviation over runs in percent, 13 characters wide; of one run there is no deviation."""
    deviation = f" ± {100 * std:<4.1f}" if runs > 1 else " " * 7
    return f"{100 * mean:>6.1f}{deviation}"


def metric(values: dict) -> str:
    """Return mean and deviation in percent, 13 characters wide."""
    return mean_text(values["mean"], values["std"], len(values["runs"]))


def counted(count: int, noun: str) -> str:
    """Return a number with its noun, in the plural unless it is 1."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


# ----------------------------------------------------------------------------------------------------------------------
# Lists and lines
# ----------------------------------------------------------------------------------------------------------------------


def capital(text: str) -> str:
    """Return the text with a capital first letter, as a sentence begins."""
    return text[:1].upper() + text[1:]


def sentence(text: str) -> str:
    """Return the text with a capital first letter and one full stop."""
    return f"{capital(text).rstrip('.')}."


def listed(words: Sequence[str]) -> str:
    """Return words in a row, the last two joined by "and"."""
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def ranges(names: Sequence[str]) -> str:
    """Return names in a row; three or more with successive numbers become a range.

    Example:
        >>> ranges(["mean", "sigma_5", "sigma_6", "sigma_7"])
        'mean, sigma_5 to sigma_7'
    """
    keys = []
    for position, name in enumerate(names):
        match = re.fullmatch(r"(.*?)(\d+)", name)
        keys.append((match[1], int(match[2]) - position) if match else (name, None))  # alike in a run of numbers
    parts = []
    for _, run in groupby(zip(keys, names, strict=True), key=lambda pair: pair[0]):
        members = [name for _, name in run]
        parts += [f"{members[0]} to {members[-1]}"] if len(members) > 2 else members
    return ", ".join(parts)


def kept_together(text: str) -> str:
    """Return the text with a no-break space between a number and its sign, where no line may end."""
    return re.sub(r"(?<=[\dp=<]) (?=[%=<\d])", "\N{NO-BREAK SPACE}", text)


def wrapped(text: str, width: int, first: str = "", rest: str = "") -> list[str]:
    """Return the text in lines of at most ``width`` characters, after these indents; names are never cut."""
    indents = {"initial_indent": first, "subsequent_indent": rest}
    lines = textwrap.wrap(kept_together(text), width, **indents, break_long_words=False, break_on_hyphens=False)
    return [line.replace("\N{NO-BREAK SPACE}", " ") for line in lines]


def classifier_name(representation: str | None) -> str:
    """Return the representation that a number comes from; without any it is the first layer of the ranking."""
    return representation or "the best single layer"
