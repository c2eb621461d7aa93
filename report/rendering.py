"""Figures -> files: PNG, SVG and PDF, without date and version, so that equal figures are equal bytes.

Text stays text, in SVG and PDF: it can be searched, copied, and edited. A PDF holds the letters that it needs. An SVG
names families: DejaVu Sans, for which the layout is made, and Verdana, whose letters are as wide; those of other
sans-serif fonts are narrower, so that nothing comes to lie on anything.

An SVG holds its colours for dark screens too, as a style sheet with a media query that recolours what ``ALL_ON_DARK``
lists, and its images twice. Viewers that know no media queries, every PDF and every PNG show it dark on white.
"""

from __future__ import annotations

import base64
import io
import re

import numpy as np
from matplotlib import colormaps
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_pdf import FigureCanvasPdf
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.colors import ListedColormap, to_hex, to_rgb, to_rgba, to_rgba_array
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.text import Text
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from report.drawing import DPI, GROUND, MAP, ON_CELLS, ON_DARK, TURN

SCREEN_DPI = 150  # dots per inch of a PNG on the page
SLACK = 0.02  # inches by which boxes of texts may touch, as no letter fills its box
RECOLOURED = (
    *("color", "markeredgecolor", "markerfacecolor", "markerfacecoloralt"),
    *("facecolor", "edgecolor", "hatchcolor"),
)
KINDS = ("png", "svg", "pdf")
PAGE, DARK = "page/", "_dark"  # the beginning and the end of names of pictures that only the page has
SVG_LIMIT = 300_000  # bytes of an SVG on the page, so that it can be sent
BENT = np.interp(np.linspace(0, 1, 256), [0, TURN, 1], [0, 0.31, 1])  # so that numbers turn where they contrast alike
MAP_ON_DARK = ListedColormap(colormaps[f"{MAP}_r"](BENT), f"{MAP} on dark")  # the same colours, the low ones dark
ALL_ON_DARK = {
    **{"#{:02x}{:02x}{:02x}".format(*colormaps[MAP](i, bytes=True)): to_hex(MAP_ON_DARK(i)) for i in range(256)},
    **{to_hex(colormaps[MAP](i)): to_hex(MAP_ON_DARK(i)) for i in range(256)},  # images and patches round otherwise
    **ON_DARK,
    **dict(zip(ON_CELLS, ON_CELLS[::-1], strict=True)),
}
IMAGE = re.compile(rb'(<image xlink:href="data:image/png;base64,)([^"]*)(" id="[^"]*)"([^>]*>)')
FAMILIES = re.compile(rb"""(<text style="[^"]*font-family: 'DejaVu Sans')([^";]*)""")  # a < of a name is escaped


def files_of(figure: Figure, name: str, title: str) -> dict[str, bytes]:
    """Return the files of a figure that is laid out, by name, and PNGs for the page where its SVG is large."""
    files = {f"{name}.{kind}": saved(figure, kind, title) for kind in KINDS}
    if len(files[f"{name}.svg"]) > SVG_LIMIT:
        files[f"{PAGE}{name}.png"] = _png(figure, title, SCREEN_DPI)
        _darken(figure)
        files[f"{PAGE}{name}{DARK}.png"] = _png(figure, title, SCREEN_DPI)
    return files


def saved(figure: Figure, kind: str, title: str) -> bytes:
    """Return the content of a file, of one of ``KINDS``, of a figure that is laid out."""
    return {"png": _png, "svg": _svg, "pdf": _pdf}[kind](figure, title)


def _png(figure: Figure, title: str, dpi: float = DPI) -> bytes:
    """Return a PNG with a palette, which makes a third of the bytes."""
    figure.set_dpi(dpi)
    canvas, texts, buffer = FigureCanvasAgg(figure), PngInfo(), io.BytesIO()
    canvas.draw()
    texts.add_itxt("Title", title)
    drawn = Image.fromarray(np.asarray(canvas.buffer_rgba()))
    image = Image.new("RGB", drawn.size, GROUND)
    image.paste(drawn, mask=drawn.getchannel("A"))
    image = image.quantize(256, dither=Image.Dither.NONE)
    image.save(buffer, "PNG", dpi=(dpi, dpi), pnginfo=texts)
    return buffer.getvalue()


def _darken(figure: Figure) -> None:
    """Recolour what is on a figure as a style sheet recolours an SVG."""
    figure.set_facecolor(GROUND)
    for artist in figure.findobj():
        if isinstance(artist, AxesImage):
            artist.set_cmap(MAP_ON_DARK)
            continue
        for part in RECOLOURED:
            change, now = getattr(artist, f"set_{part}", None), getattr(artist, f"get_{part}", None)
            if change and now:
                change(_on_dark(now()))


def _on_dark(colors: object) -> object:
    """Return a colour, or a list of them, as on a dark screen."""
    found = [to_rgba(ALL_ON_DARK.get(to_hex(color), color), color[3]) for color in to_rgba_array(colors)]
    return found if np.ndim(colors) == 2 else (*found, "none")[0]


def is_readable(figure: Figure) -> bool:
    """Return whether all texts of a figure that is laid out lie in it, and none on another one."""
    figure.draw_without_rendering()  # which puts legends and ticks in their places
    renderer, hidden = FigureCanvasAgg(figure).get_renderer(), set()
    for axis in figure.findobj(Axis):
        low, high = sorted(axis.get_view_interval())
        ticks = [*axis.get_major_ticks(), *axis.get_minor_ticks()]
        hidden |= {label for tick in ticks if not low <= tick.get_loc() <= high for label in (tick.label1, tick.label2)}
    texts = [text for text in figure.findobj(Text) if text.get_visible() and text.get_text().strip()]
    boxes = np.array([text.get_window_extent(renderer).extents for text in texts if text not in hidden])
    low, high = boxes[:, :2] + SLACK * figure.dpi, boxes[:, 2:] - SLACK * figure.dpi  # of the space around letters
    inside = (low >= 0).all() and (high <= (figure.bbox.width, figure.bbox.height)).all()
    crossed = ((low[:, None] < high) & (low < high[:, None])).all(-1)
    return bool(inside and crossed.sum() == len(boxes))  # each with itself


def _pdf(figure: Figure, title: str) -> bytes:
    buffer = io.BytesIO()
    metadata = {"Title": title, "CreationDate": None, "Creator": None, "Producer": None}
    FigureCanvasPdf(figure).print_pdf(buffer, metadata=metadata)
    return buffer.getvalue()


def _svg(figure: Figure, title: str) -> bytes:
    buffer = io.BytesIO()
    metadata = {"Title": title, "Date": None, "Creator": None}
    FigureCanvasSVG(figure).print_svg(buffer, metadata=metadata)
    content = FAMILIES.sub(rb"\1, Verdana\2, sans-serif", buffer.getvalue())
    content = IMAGE.sub(_in_light_and_dark, content)
    return content.replace(b"</style>", f"\n{_dark_style(content.decode())}</style>".encode(), 1)


def _in_light_and_dark(image: re.Match) -> bytes:
    """Return an image of an SVG twice, for light and for dark screens."""
    before, encoded, name, after = image.groups()
    pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(encoded))).convert("RGBA")).copy()
    codes, positions = np.unique(pixels[..., :3] @ np.array([65536, 256, 1]), return_inverse=True)
    colors = [f"#{code:06x}" for code in codes]
    changed = np.rint([255 * np.array(to_rgb(ALL_ON_DARK.get(color, color))) for color in colors])
    pixels[..., :3] = changed[positions.reshape(pixels.shape[:2])]
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", optimize=True)
    dark = b"".join([before, base64.b64encode(buffer.getvalue()), name, b'-dark" class="on-dark"', after])
    return b"".join([before, encoded, name, b'" class="on-light"', after, dark])


def _dark_style(content: str) -> str:
    """Return CSS for dark screens: colours stand in style attributes, those of patterns in fill."""
    rules = [".on-light {display: none}", ".on-dark {display: inline}"]
    for light, dark in ALL_ON_DARK.items():
        if light in ON_DARK or light in content:
            rules += [f'[style*="{name}: {light}"] {{{name}: {dark} !important}}' for name in ("fill", "stroke")]
            rules.append(f'[fill="{light}"] {{fill: {dark}}}')
    media = "@media screen and (prefers-color-scheme: dark) {"
    return "\n".join([".on-dark {display: none}", media, *rules, "}\n"])
