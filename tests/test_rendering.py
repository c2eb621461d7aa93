"""Files of figures: text that stays text, the same bytes, colours that all can distinguish, dark screens, columns."""

import base64
import io
import itertools
import re
import shutil
import subprocess
import zlib
from functools import cache

import numpy as np
import pytest
from matplotlib import colormaps
from matplotlib.colors import to_hex
from PIL import Image
from test_drawing import contrast

from report import drawing, rendering

VISION = {  # linear RGB -> what the colour-blind see: Machado, Oliveira and Fernandes 2009, severity 1
    "all colours": np.eye(3),
    "no red": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "no green": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "no blue": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}
pytestmark = pytest.mark.filterwarnings("error")
WEIGHTS = (0.2126, 0.7152, 0.0722)  # of luminance


def lightness(color, vision="all colours"):
    """CIE L* of a colour, 0 to 100, as seen with that colour vision."""
    shares = np.array([int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    linear = np.where(shares <= 0.04045, shares / 12.92, ((shares + 0.055) / 1.055) ** 2.4)
    luminance = np.clip(np.asarray(VISION[vision]) @ linear, 0, 1) @ WEIGHTS
    return 116 * np.cbrt(luminance) - 16 if luminance > 216 / 24389 else 24389 / 27 * luminance


@cache
def drawn(kind, style="report", width=drawing.WIDTH):
    """A file of a figure with text, a hatch, points and a map."""
    with drawing.new_figure("test", "A title" if style == "report" else "", style=style, width=width) as figure:
        drawing.set_height(figure, 3)
        left, right = figure.subplots(1, 2)
        left.plot([0, 1], [0, 1], "o-", color=drawing.BLUE, mec=drawing.INK, label="a line of $x_1^2 & <b>")
        left.axhspan(0, 1, fc=drawing.PALE, ec=drawing.FAINT, hatch="////", lw=0)
        image = right.imshow(np.arange(12).reshape(3, 4), cmap=drawing.MAP, interpolation="nearest", vmax=11)
        drawing.write_numbers(right, np.arange(12.0).reshape(3, 4), 11, 1, 1)
        figure.legend(handles=[*left.lines, *drawing.map_legend(image, "of it")], loc="outside lower center", ncols=4)
        drawing.lay_out(figure)
        return kind(figure) if callable(kind) else rendering.saved(figure, kind, "A title")


# ----------------------------------------------------------------------------------------------------------------------
# Files
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", rendering.KINDS)
def test_equal_figures_are_equal_bytes_without_a_date(kind):
    content = drawn(kind)
    assert content == drawn.__wrapped__(kind)
    assert not re.search(rb"CreationDate|Producer|dc:date|matplotlib v", content)


def test_text_is_text_in_svg_and_pdf():
    svg, pdf = drawn("svg").decode(), drawn("pdf")
    assert ">a line of $x_1^2 &amp; &lt;b&gt;</text>" in svg
    assert "font-family: 'DejaVu Sans', Verdana, sans-serif" in svg
    streams = [zlib.decompress(data) for data in re.findall(rb"stream\r?\n(x.*?)\r?\nendstream", pdf, re.DOTALL)]
    assert b"/FontFile2" in pdf and b"/Type3" not in pdf  # TrueType
    assert any((b"BT" in stream and b"Tj" in stream) or b"TJ" in stream for stream in streams)


def test_a_paper_has_no_title_and_no_ground():
    assert ">A title</text>" in drawn("svg").decode() and ">A title</text>" not in drawn("svg", "paper").decode()
    ground = f'style="fill: {drawing.GROUND}"'
    assert ground in drawn("svg").decode() and ground not in drawn("svg", "paper").decode()
    assert Image.open(io.BytesIO(drawn("png", "paper"))).convert("RGB").getpixel((1, 1)) == (255, 255, 255)


def test_a_column_is_as_wide_as_one_and_what_is_too_wide_is_broken_into_lines():
    image = Image.open(io.BytesIO(drawn("png", "paper", drawing.COLUMN)))
    assert image.width == 300 * drawing.COLUMN
    for width, readable in ((drawing.WIDTH, True), (drawing.COLUMN, True), (0.8, False)):
        assert drawn(rendering.is_readable, "paper", width) is readable
    with drawing.new_figure("test", "", style="paper", width=drawing.COLUMN) as figure:
        axes = figure.subplots(1, 2)
        axes[0].set_title("a title that is too wide for these axes", loc="left")
        axes[0].set_title("and one beside it", loc="right")
        axes[1].set_title("short")
        axes[1].set_xlabel("a label that is too wide for these axes")
        drawing.lay_out(figure)
        assert rendering.is_readable(figure)
        assert axes[0].get_title("left").count("\n") >= 2 and axes[0].get_title("right") == ""
        assert axes[1].get_title("left") == "short" and "\n" in axes[1].get_xlabel()
        axes[1].text(-1.2, 0.5, "on the other axes")
        axes[1].text(-1.25, 0.5, "on the other axes")
        assert not rendering.is_readable(figure)


# ----------------------------------------------------------------------------------------------------------------------
# Colours
# ----------------------------------------------------------------------------------------------------------------------


def test_lightness_by_hand():
    assert lightness("#ffffff") == pytest.approx(100, abs=0.01) and lightness("#000000") == 0
    assert lightness("#777777") == pytest.approx(50, abs=0.2)
    for vision in VISION:  # grey looks alike to all
        assert lightness("#777777", vision) == pytest.approx(lightness("#777777"), abs=0.1)
    assert lightness("#ff0000", "no red") < lightness("#ff0000") - 10  # a dark red, as is known


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("vision", VISION)
def test_colours_of_groups_differ_in_lightness_for_all_eyes_and_in_grey(vision, scheme):
    colors = [drawing.INK, drawing.BLUE, drawing.ORANGE, drawing.GROUND]
    if scheme == "dark":
        colors = [drawing.ON_DARK[color] for color in colors]
    for first, second in itertools.combinations(colors, 2):
        assert abs(lightness(first, vision) - lightness(second, vision)) >= 14, (first, second)


@pytest.mark.parametrize("vision", VISION)
def test_maps_are_ordered_by_lightness_for_all_eyes(vision):
    for colors, sign in ((colormaps[drawing.MAP], -1), (rendering.MAP_ON_DARK, 1)):
        values = [lightness(to_hex(colors(step)), vision) for step in np.linspace(0, 1, 11)]
        assert (sign * np.diff(values) >= 2.5).all()


def test_numbers_on_the_cells_of_a_dark_map_can_be_read():
    light, dark = (rendering.ALL_ON_DARK[color] for color in drawing.ON_CELLS)  # texts on low and on high cells
    for value in np.linspace(0, 1, 101):
        text = dark if value > drawing.TURN else light
        assert contrast(text, to_hex(rendering.MAP_ON_DARK(value))) >= 4.4, value


# ----------------------------------------------------------------------------------------------------------------------
# Dark screens
# ----------------------------------------------------------------------------------------------------------------------


def test_an_svg_holds_each_image_for_light_and_dark_screens():
    svg = drawn("svg").decode()
    images = re.findall(r'<image xlink:href="data:image/png;base64,([^"]*)" id="([^"]*)" class="([^"]*)"', svg)
    assert [kind for *_, kind in images] == ["on-light", "on-dark"] and len({name for _, name, _ in images}) == 2
    light, dark = (np.asarray(Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB")) for data, *_ in images)
    steps = np.arange(12).reshape(3, 4) / 11
    for pixels, colors in ((light, colormaps[drawing.MAP]), (dark, rendering.MAP_ON_DARK)):
        high, wide = (size // count for size, count in zip(pixels.shape[:2], steps.shape, strict=True))
        cells = pixels[::-1][high // 2 :: high, wide // 2 :: wide][:3, :4].astype(int)  # the SVG turns it over
        assert np.abs(cells - np.rint(255 * colors(steps)[..., :3])).max() <= 1


def test_the_dark_png_of_the_page_has_the_colours_of_the_dark_svg(monkeypatch):
    monkeypatch.setattr(rendering, "SVG_LIMIT", 0)
    files = drawn(lambda figure: rendering.files_of(figure, "one", "A title"))
    assert list(files) == ["one.png", "one.svg", "one.pdf", "page/one.png", "page/one_dark.png"]
    pictures = [Image.open(io.BytesIO(files[f"page/one{end}.png"])).convert("RGB") for end in ("", "_dark")]
    assert {picture.size for picture in pictures} == {(1035, pictures[0].height)}  # 150 dpi
    seen = [{to_hex(np.array(color) / 255) for _, color in picture.getcolors(9999)} for picture in pictures]
    for color in (drawing.GROUND, drawing.INK, drawing.PALE, drawing.BLUE):
        near = [np.abs(np.array([int(c[i : i + 2], 16) for i in (1, 3, 5)])) for c in seen[1]]
        wanted = np.array([int(drawing.ON_DARK[color][i : i + 2], 16) for i in (1, 3, 5)])
        assert min(np.abs(each - wanted).max() for each in near) <= 4, color
    assert drawing.GROUND not in seen[1]


BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="no chromium, chromium-browser or google-chrome on the path")
def test_a_browser_writes_the_text_of_an_svg_where_the_png_has_it(tmp_path):
    (tmp_path / "figure.svg").write_bytes(drawn("svg"))
    page = '<style>body {margin: 0}</style><img src="figure.svg" width="1035">'
    (tmp_path / "page.html").write_text(page, encoding="utf-8")
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--window-size=1035,400",
               "--blink-settings=preferredColorScheme=1", f"--screenshot={tmp_path / 'shown.png'}",
               f"--user-data-dir={tmp_path / 'profile'}", (tmp_path / "page.html").as_uri()]  # fmt: skip
    subprocess.run(command, capture_output=True, timeout=300, check=True)
    shown = np.asarray(Image.open(tmp_path / "shown.png").convert("L"), float)
    ours = Image.open(io.BytesIO(drawn("png"))).convert("L")
    ours = np.asarray(ours.resize((1035, ours.height // 2)), float)[: len(shown)]
    assert np.abs(shown[: len(ours)] - ours).mean() < 8
