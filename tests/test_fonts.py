"""Names in any script: a font of the machine that has the letters, the width of a text, a warning without one."""

import logging

import pytest
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from matplotlib import font_manager, get_data_path

from report import cautions, drawing, fonts, rendering

pytestmark = pytest.mark.filterwarnings("error")
CACHED = (fonts.family_of, fonts._others, fonts._letters_of, fonts._is_joined, fonts._advance, fonts._drawn_width)


@pytest.fixture(autouse=True)
def machine(monkeypatch):
    """A machine that has no fonts but those of matplotlib; returns a function that installs another one."""
    entries = [entry for entry in font_manager.fontManager.ttflist if entry.fname.startswith(get_data_path())]
    monkeypatch.setattr(font_manager.fontManager, "ttflist", entries)
    installed: list[str] = []
    monkeypatch.setattr(fonts, "findSystemFonts", lambda: installed)
    forget()
    yield installed.append
    monkeypatch.undo()
    forget()


def forget():
    for function in CACHED:
        function.cache_clear()
    font_manager.fontManager._findfont_cached.cache_clear()


def made_font(path, family, letters, advance):
    """A font whose letters are squares, as wide as this of a thousand."""
    names = [f"u{ord(letter):x}" for letter in letters]
    pen = TTGlyphPen(None)
    for move, point in zip(
        (pen.moveTo, pen.lineTo, pen.lineTo, pen.lineTo), ((50, 0), (50, 800), (800, 800), (800, 0)), strict=True
    ):
        move(point)
    pen.closePath()
    square = pen.glyph()
    builder = FontBuilder(1000)
    builder.setupGlyphOrder([".notdef", *names])
    builder.setupCharacterMap({ord(letter): name for letter, name in zip(letters, names, strict=True)})
    builder.setupGlyf(dict.fromkeys([".notdef", *names], square))
    builder.setupHorizontalMetrics(dict.fromkeys([".notdef", *names], (advance, 50)))
    builder.setupHorizontalHeader(ascent=900, descent=-200)
    builder.setupNameTable({"familyName": family, "styleName": "Regular"})
    builder.setupOS2(usWeightClass=400)
    builder.setupPost()
    builder.save(path)
    return str(path)


def drawn(kind, name):
    with drawing.new_figure("test", name, letters=name) as figure:
        figure.subplots().set_xlabel(name)
        drawing.lay_out(figure)
        return rendering.saved(figure, kind, name)


def test_matplotlibs_font_has_what_it_has_and_is_asked_first():
    assert fonts.families_of("cat кот γάτα قطة חתול") == (fonts.FONT,)
    assert fonts.without_font("cat") == "" and fonts.without_font("猫 cat 犬猫") == "犬猫"
    assert fonts.without_font("\x00\udcff\u202e") == ""  # no letters, which a box is drawn for


def test_a_font_that_has_the_letters_is_found_even_if_matplotlib_has_not_listed_it(machine, tmp_path):
    machine(made_font(tmp_path / "b.ttf", "B of Somebody", "猫犬", 1500))
    assert fonts.families_of("猫 cat") == (fonts.FONT, "B of Somebody") and fonts.without_font("猫犬") == ""
    assert fonts.width_of("猫犬", 10) == pytest.approx(2 * 1.5 * 10 / 72, rel=0.02)
    assert fonts.width_of("猫犬a", 10) == pytest.approx(3 * 10 / 72 + fonts.width_of("a", 10), rel=0.02)


def test_a_known_font_is_preferred(machine, tmp_path):
    machine(made_font(tmp_path / "a.ttf", "A of Somebody", "猫犬", 1000))
    machine(made_font(tmp_path / "n.ttf", "Noto Sans CJK SC", "猫", 1000))
    assert [fonts.family_of(letter) for letter in "猫犬"] == ["Noto Sans CJK SC", "A of Somebody"]
    assert fonts.families_of("犬猫") == (fonts.FONT, "Noto Sans CJK SC", "A of Somebody")


def test_fonts_that_cannot_be_used_are_passed_over(machine, tmp_path):
    (tmp_path / "bad.ttf").write_bytes(b"no font")
    machine(str(tmp_path / "bad.ttf"))
    machine(str(tmp_path / "missing.ttf"))
    machine(made_font(tmp_path / "c.ttf", "Some Color Emoji", "猫", 1000))
    assert fonts.without_font("猫") == "猫"


@pytest.mark.parametrize("installed", [False, True])
@pytest.mark.parametrize("kind", rendering.KINDS)
def test_letters_are_drawn_or_boxes_are_and_nothing_is_said_of_each(machine, tmp_path, caplog, kind, installed):
    if installed:
        machine(made_font(tmp_path / "n.ttf", "Noto Sans CJK SC", "猫", 1000))
    with caplog.at_level(logging.WARNING):
        content = drawn(kind, "a 猫 of $x_1$")
    assert not caplog.records
    if kind == "svg":
        assert ">a 猫 of $x_1$</text>" in content.decode()
        families = "'DejaVu Sans', Verdana, 'Noto Sans CJK SC', sans-serif"
        assert (families in content.decode()) == installed
    forget()
    assert drawn(kind, "a 猫 of $x_1$") == content


def test_what_is_no_letter_is_a_box_and_names_that_look_alike_get_numbers():
    assert fonts.shown("two\nlines \x00\udcff\ufffe\u202e\u00ad") == "two lines □□□"
    assert fonts.shown("👨\u200d👩") == "👨\u200d👩"
    assert drawing.cut_labels(["猫", "犬", "cat"], 1.0, 8) == ["1: 猫", "2: 犬", "cat"]  # two boxes
    assert fonts.letters_in({"a": ["b", "cd"], "numbers": [1, 2], "deep": [[0.5], {"e": None}]}) == set(
        "abcdnumbersdeepe"
    )


def test_joined_letters_are_measured_together():
    whole, apart = fonts.width_of("العربية", 8), sum(fonts.width_of(letter, 8) for letter in "العربية")
    assert 0.4 * apart < whole < 0.8 * apart
    for name in ("العربية", "猫と犬", "बिल्ली", "a" * 100):
        assert fonts.width_of(drawing.cut(name, 0.4), drawing.SIZE) <= 0.4


def test_a_caution_names_the_letters_and_the_fonts_to_install():
    def caution(letters):
        return list(cautions.letters_without_font({"figures": {"letters_without_font": letters}}))

    assert caution("") == [] and list(cautions.letters_without_font({})) == []
    (line,) = caution("猫한")
    assert "No font of the machine has 猫한:" in line and "Install Noto Sans CJK, and" in line
    (line,) = caution("क🐱ก")
    assert "Noto Sans Devanagari, Noto Emoji and Noto Sans Thai" in line
    assert " and 5 others:" in caution("".join(map(chr, range(0x4E00, 0x4E19))))[0]
