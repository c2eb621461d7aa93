"""What figures are made of: text that fits, colours that can be seen in the light and in the dark."""

import re

import matplotlib
import numpy as np
import pytest

from report import drawing, rendering


def test_names_are_cut_in_the_middle_and_told_apart():
    assert drawing.cut("short", 1.0) == "short"
    cut = drawing.cut("a" * 100 + "z" * 100, 1.0)
    assert cut.startswith("aaa") and "…" in cut and cut.endswith("zzz")
    assert drawing.width_of(cut, drawing.SIZE) <= 1.0
    assert drawing.cut("a cat and\n\x00dog", 2.0) == "a cat and □dog"


def test_titles_are_wrapped_to_the_width_with_each_percent_sign_at_its_number():
    lines = drawing.in_lines("from 12.0 % to 95.5 % and " * 12).split("\n")
    assert len(lines) > 2
    assert max(drawing.width_of(line, drawing.TITLE) for line in lines) <= drawing.WIDTH
    assert not any(line.startswith("%") for line in lines)


def ticks_above(blocks, inches):
    """Return where names of blocks stand above axes, and the names."""
    with drawing.new_figure("test", "A title") as figure:
        ax = figure.subplots()
        drawing.mark_blocks(ax, blocks, inches)
        (top,) = ax.child_axes
        return top.get_xticks().tolist(), [label.get_text() for label in top.get_xticklabels()]


def test_blocks_are_named_as_briefly_as_they_can_be():
    names = ["TE layer 0", "TE layer 1", "IN01", "IN02", "MID", None, "OUT03", "double 0", "double 1", "single 0"]
    ticks, labels = ticks_above([name for name in names for _ in range(2)], 20)
    assert labels == ["TE layer 0", "1", "IN01", "02", "MID", "OUT03", "double 0", "1", "single 0"]
    assert ticks == [0.5, 2.5, 4.5, 6.5, 8.5, 12.5, 14.5, 16.5, 18.5]


MIXED = [*(f"TE layer {i}" for i in range(12)), "IN01", "IN02", "IN04", "IN05", "MID", None,
         *(f"OUT{i:02}" for i in range(12)), *(f"a part with a name {i}" for i in range(3))]  # fmt: skip


@pytest.mark.parametrize("inches", [1, 2.3, 6.5, 40])
@pytest.mark.parametrize("names", [MIXED, [f"layer {i}" for i in range(57)], [f"layer {i}" for i in range(800)]])
def test_of_many_blocks_as_many_are_named_as_there_is_room_for(names, inches):
    ticks, labels = ticks_above(names, inches)
    halves = [drawing.width_of(label, drawing.SMALL) / 2 for label in labels]
    assert (np.diff(ticks) / len(names) * inches > np.add(halves[1:], halves[:-1])).all()
    kind = None  # of the last whole name
    for tick, label in zip(ticks, labels, strict=True):
        whole = names[round(tick)]
        kind = whole if label == whole else kind
        assert label == whole or (whole.endswith(label) and whole.rstrip("0123456789") == kind.rstrip("0123456789"))
    assert len(labels) >= min(inches, len(names) / 60) and labels[0] == names[0]
    if inches == 40 and len(names) < 60:
        assert len(labels) >= len(names) - 2  # None, and one more beside it


@pytest.mark.parametrize(("inches", "step"), [(30, 1), (6.5, 2), (2.8, 5), (2.1, 5)])
def test_the_numbers_of_many_blocks_are_evenly_spaced(inches, step):
    """Compare the numbers with multiples of a step; those near a whole name, which takes more room, may be left out."""
    blocks = [*(f"double {i}" for i in range(19)), *(f"single {i}" for i in range(38))]
    _, labels = ticks_above(blocks, inches)
    second = labels.index("single 0")
    for shown, count in ((labels[1:second], 19), (labels[second + 1 :], 38)):
        numbers = [int(label) for label in shown]
        every = range(step, count, step)
        assert set(numbers) <= set(every) and len(numbers) >= len(every) - 2
    assert labels[0] == "double 0"


# -- colours --------------------------------------------------------------------------------------------


def luminance(color: str) -> float:
    """Relative luminance as WCAG 2.2 defines it."""
    shares = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [share / 12.92 if share <= 0.04045 else ((share + 0.055) / 1.055) ** 2.4 for share in shares]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(color: str, ground: str) -> float:
    low, high = sorted((luminance(color), luminance(ground)))
    return (high + 0.05) / (low + 0.05)


def test_contrast_by_hand():
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    assert contrast("#767676", "#ffffff") == pytest.approx(4.54, abs=0.01)  # the usual example of 4.5


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_and_marks_can_be_seen_in_the_light_and_in_the_dark(scheme):
    shown = {color: color if scheme == "light" else dark for color, dark in drawing.ON_DARK.items()}
    ground = shown[drawing.GROUND]
    for color, least in (
        *((text, 7.0) for text in (drawing.INK, drawing.SOFT)),  # small text
        *((mark, 3.0) for mark in (drawing.BLUE, drawing.ORANGE, drawing.GREY)),
    ):
        assert contrast(shown[color], ground) >= least, color
    assert contrast(shown[drawing.INK], shown[drawing.PALE]) >= 7  # lines over the band of chance
    for color in (drawing.PALE, drawing.FAINT):
        assert contrast(shown[color], ground) >= 1.25, color


def test_numbers_in_the_cells_of_a_map_can_be_read_on_every_screen():
    values = np.linspace(0, 80, 81)
    with drawing.new_figure("test", "A title") as figure:
        ax = figure.subplots()
        drawing.write_numbers(ax, values[:, None], 80, 1, 1)
        for value, text in zip(values, ax.texts, strict=True):
            cell = matplotlib.colors.to_hex(matplotlib.colormaps["YlGnBu"](value / 80))
            assert contrast(text.get_color(), cell) >= 4.4, value
        drawing.write_numbers(ax, np.array([[-0.04]]), 1, 1, 1, digits=1)
        assert ax.texts[-1].get_text() == "0.0"
    assert not set(drawing.ON_CELLS) & set(drawing.ON_DARK)


def test_every_colour_of_a_figure_has_one_for_the_dark():
    with drawing.new_figure("test", "A title") as figure:
        ax = figure.subplots()
        ax.plot([0, 1], [0, 1], "o-", color=drawing.BLUE, mec=drawing.INK, label="line")
        ax.axhspan(0, 1, fc=drawing.PALE, ec=drawing.FAINT, hatch="////", lw=0)
        ax.set_title("of the axes")
        figure.legend()
        svg = rendering.saved(figure, "svg", "A title").decode()
    style, drawn = svg.split("</style>")
    colors = set(re.findall(r"(?:fill|stroke)(?:: |=\")(#[0-9a-f]{6})", drawn))
    assert colors == {drawing.GROUND, drawing.INK, drawing.BLUE, drawing.PALE, drawing.FAINT}
    rules = style.split("@media screen and (prefers-color-scheme: dark)")[1]
    for light, dark in drawing.ON_DARK.items():
        assert f'[style*="fill: {light}"] {{fill: {dark} !important}}' in rules
        assert f'[style*="stroke: {light}"] {{stroke: {dark} !important}}' in rules
