"""Tables of report.html sort and filter in a real browser, and scroll on a phone, where the page does not."""

import json
import re
from dataclasses import replace
from html import unescape

import pytest
from result_making import made
from test_page import ALL, BROWSER, Reader, of_many_and_long_names, opened

from report import page, tables, text

pytestmark = pytest.mark.skipif(BROWSER is None, reason="no chromium, chromium-browser or google-chrome on the path")
WRAPPER = """<!DOCTYPE html><meta charset="utf-8"><iframe id="frame"></iframe><pre id="outcome"></pre><script>
const given = GIVEN, frame = document.getElementById("frame");
frame.style = `width: ${given.width}px; height: 900px; border: 0`;
frame.onload = () => {
  const outcome = ((document, window) => {SCRIPT})(frame.contentDocument, frame.contentWindow);
  document.getElementById("outcome").textContent = `outcome${JSON.stringify(outcome)}end`;
};
frame.srcdoc = given.page;</script>"""


def in_a_frame(content: bytes, width: int, script: str, folder) -> tuple[list, list[str]]:
    """Return what a script gives on the page's ``document`` in a frame of so many pixels, and the console's lines."""
    given = json.dumps({"page": content.decode(), "width": width}).replace("<", r"\u003c")
    wrapper = WRAPPER.replace("SCRIPT", script).replace("GIVEN", given)
    dom, console = opened(wrapper.encode(), folder)
    return json.loads(unescape(re.search(r">outcome(.*?)end</pre>", dom, re.DOTALL)[1])), console


def test_on_a_phone_tables_scroll_and_not_the_page(tmp_path):
    content = page.render_page(of_many_and_long_names(), ALL)
    script = """
    const beyond = (element) => element.getBoundingClientRect().right > window.innerWidth + 1;
    const wide = [...document.querySelectorAll("body *")].filter(beyond);
    const outside = wide.filter((element) => !element.closest(".scroll, .picture"));
    const table = document.querySelector("#layers .scroll");
    const all = document.documentElement;
    return [all.scrollWidth - all.clientWidth, window.innerWidth, outside.map((element) => element.outerHTML),
            table.scrollWidth > table.clientWidth];"""
    outcome, console = in_a_frame(content, 400, script, tmp_path)
    assert outcome == [0, 400, [], True] and console == []


CELLS = ["95.0 ± 5.0", "< 0.0001", "12.3 (1.0 to 4.5)", "-0.1", "none", "1,444", "0.0001", "", "+2.5", "p = 3"]
CELLS += ["1e-5", "-12", "100.0 %"]
ASCENDING = ["-12", "-0.1", "1e-5", "< 0.0001", "0.0001", "+2.5", "p = 3", "12.3 (1.0 to 4.5)", "95.0 ± 5.0"]
ASCENDING += ["100.0 %", "1,444"]
NAMED = [f"block {i}" for i in range(len(CELLS), 0, -1)]
SORTED = """
const table = document.querySelector('[aria-label="A table of a test"] table');
const [number, name] = table.querySelectorAll("th");
const rows = () => [...table.tBodies[0].rows].filter((row) => !row.hidden);
const column = (i) => rows().map((row) => row.cells[i].textContent.replaceAll("\u00a0", " "));
const sorted = (head, i) => {
  head.querySelector("button").click();
  return [head.getAttribute("aria-sort"), column(i)];
};
"""


def with_a_table(results: dict) -> bytes:
    """The page with a table of a test in its section on rank."""
    content = text.content_of(results)
    rows = [list(row) for row in zip(CELLS, NAMED, strict=True)]
    table = tables.Table("rank", "A table of a test", ["number", "name"], rows, words=(1,))
    return page.render_page(results, {}, replace(content, tables=content.tables | {"test": table}))


@pytest.mark.slow
def test_numbers_sort_as_numbers_and_names_by_their_numbers(tmp_path):
    script = (
        SORTED
        + """
    return [sorted(number, 0), sorted(number, 0), sorted(number, 0), sorted(name, 1),
            number.getAttribute("aria-sort"), rows().every((row) => row.cells[1].scope === "row")];"""
    )
    (up, down, before, names, other, heads), console = in_a_frame(with_a_table(made()), 1280, script, tmp_path)
    assert up == ["ascending", [*ASCENDING, "none", ""]]
    assert down == ["descending", [*ASCENDING[::-1], "none", ""]]  # what has no value is last
    assert before == [None, CELLS]
    assert names == ["ascending", NAMED[::-1]] and other is None
    assert heads and console == []


def test_rows_are_filtered_by_what_is_typed_and_short_tables_have_no_filter(tmp_path):
    script = (
        SORTED
        + """
    const input = document.querySelector('input[aria-label="Filter rows: A table of a test"]');
    const filtered = (value) => {
      input.value = value;
      input.dispatchEvent(new window.Event("input"));
      return [column(1), document.querySelector("#rank .filter output").textContent];
    };
    return [filtered("BLOCK 12"), filtered("none block"), filtered(".*"), filtered(""),
            document.querySelectorAll(".filter").length < document.querySelectorAll("table").length,
            document.querySelectorAll("table:not(.sortable) button").length];"""
    )
    outcome, console = in_a_frame(with_a_table(made()), 1280, script, tmp_path)
    assert outcome[:2] == [[["block 12", "block 11", "block 2"], "3 of 13 rows"], [["block 9"], "1 of 13 rows"]]
    assert outcome[2:4] == [[[], "0 of 13 rows"], [NAMED, ""]]
    assert outcome[4:] == [True, 0] and console == []


@pytest.mark.slow
def test_hostile_names_are_text_before_and_after_sorting(tmp_path):
    results, evil = made(), "</script><img src=x onerror=\"document.title = 'ran'\">\u202e"
    results["layer_ranking"][2]["layer"] = results["analysis"]["layers"]["records"][2]["layer"] = evil
    script = """
    document.querySelectorAll("thead button").forEach((button) => button.click());
    const cells = [...document.querySelectorAll("#layers tbody th")].map((cell) => cell.textContent);
    return [document.title, document.querySelectorAll("tbody img, tbody script").length, cells];"""
    (title, elements, cells), console = in_a_frame(page.render_page(results, {}), 1280, script, tmp_path)
    assert title == "LoRA layer ablation: zoo" and elements == 0 and evil in cells and console == []


@pytest.mark.slow
def test_without_scripts_the_page_is_as_complete(tmp_path):
    content = page.render_page(made(), ALL)
    without, _ = opened(content.replace(b"sha256-", b"sha256-0"), tmp_path)
    reader = Reader(without.encode())
    assert not reader.of("button") and not reader.of("input")
    assert {anchor: words.split() for anchor, words in reader.text.items()} == {
        anchor: words.split() for anchor, words in Reader(content).text.items()
    }
