"""What figures are made of: text that fits, trees, colours that can be seen in the light and in the dark."""

import re

import matplotlib
import numpy as np
import pytest
from scipy.cluster import hierarchy

from report import drawing


def test_the_tree_is_scipys():
    linkage = hierarchy.linkage(np.random.default_rng(0).random((40, 3)), "average")
    told = hierarchy.dendrogram(linkage, no_plot=True)
    links = drawing.tree_lines(linkage.tolist(), told["leaves"])
    ours = np.concatenate([10 * links[..., 0] + 5, links[..., 1]], axis=1)
    scipys = np.concatenate([told["icoord"], told["dcoord"]], axis=1)
    assert ours[np.lexsort(ours.T)] == pytest.approx(scipys[np.lexsort(scipys.T)])


def test_names_are_cut_in_the_middle_and_told_apart():
    assert drawing.cut("short", 1.0) == "short"
    cut = drawing.cut("a" * 100 + "z" * 100, 1.0)
    assert cut.startswith("aaa") and "…" in cut and cut.endswith("zzz")
    assert drawing.width_of(cut, drawing.SIZE) <= 1.0
    assert drawing.cut("猫 and\ndog", 2.0) == "□ and dog"
    same = drawing.cut_labels(["猫", "犬", "cat"], 1.0, 8)
    assert same == ["1: □", "2: □", "cat"]


def test_titles_are_wrapped_to_the_width_with_each_percent_sign_at_its_number():
    lines = drawing.in_lines("from 12.0 % to 95.5 % and " * 12).split("\n")
    assert len(lines) > 2
    assert max(drawing.width_of(line, drawing.TITLE) for line in lines) <= drawing.WIDTH
    assert not any(line.startswith("%") for line in lines)


def test_blocks_are_named_as_briefly_as_they_can_be():
    words = {
        "down_blocks_0": ("down", "0"),
        "mid_block": ("mid", ""),
        "transformer_blocks_3": ("block", "3"),
        "single_transformer_blocks_12": ("single", "12"),
        "layers_7": ("layers", "7"),
    }
    assert {block: drawing.block_words(block) for block in words} == words


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
        svg = drawing.saved(figure, "svg", "A title").decode()
    style, drawn = svg.split("</style>")
    colors = set(re.findall(r"(?:fill|stroke)(?:: |=\")(#[0-9a-f]{6})", drawn))
    assert colors == {drawing.GROUND, drawing.INK, drawing.BLUE, drawing.PALE, drawing.FAINT}
    rules = style.split("@media screen and (prefers-color-scheme: dark)")[1]
    for light, dark in drawing.ON_DARK.items():
        assert f'[style*="fill: {light}"] {{fill: {dark} !important}}' in rules
        assert f'[style*="stroke: {light}"] {{stroke: {dark} !important}}' in rules
