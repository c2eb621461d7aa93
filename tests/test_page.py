"""report.html is well formed, fetches nothing, escapes names, says what results say, and opens in a real browser."""

import base64
import copy
import hashlib
import re
import shutil
import subprocess
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image
from result_making import CLASS_NAMES, made, without_pairs

from report import cautions, drawing, figures, page, rendering, sentences, tables, text
from report.further import FURTHER

VOID = {"meta", "img", "link", "br", "hr", "input", "source", "wbr"}
SVG = b'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 4 3"><rect width="4" height="3" fill="#08c"/></svg>'
PNG = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR4nGNgYPhfDwACggF/qvb0gQAAAABJRU5ErkJggg=="
)
ASKED = {section.anchor for section in FURTHER}  # whose figures are there only where it is asked for
ROWS = [row for row in figures.FIGURES if row.section not in ASKED]
NAMES = [row.name for row in ROWS]
ALL = {f"{name}.{ending}": content for name in NAMES for ending, content in (("svg", SVG), ("png", PNG))}
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class Reader(HTMLParser):
    """Elements with their attributes, and the text of each section; complains about wrong nesting."""

    def __init__(self, content: bytes):
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict]] = []
        self.text = {"": ""}
        self.section, self.scripts = "", []
        self.feed(content.decode())
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        names = [name for name, _ in attributes]
        assert len(names) == len(set(names)), (tag, names)
        self.elements.append((tag, dict(attributes)))
        if tag == "section":
            self.section = dict(attributes)["id"]
            self.text[self.section] = ""
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, tag
        self.section = "" if tag == "section" else self.section

    def handle_data(self, data):
        if self.open and self.open[-1] == "script":
            self.scripts.append(data)
            return
        self.text[self.section] += data.replace("\N{NO-BREAK SPACE}", " ")

    def of(self, tag: str) -> list[dict]:
        return [attributes for name, attributes in self.elements if name == tag]


def of_many_and_long_names(layers: int = 1444) -> dict:
    """Results of so many layers whose names, like those of classes and paths, are as long as they come."""
    results = made()
    ranking, records = results["layer_ranking"], results["analysis"]["layers"]["records"]
    stem = "diffusion_model.input_blocks.11.1.transformer_blocks.9.attn2.processor.to_out.0.lora_linear_layer"
    both = [(of, record) for of, record in zip(ranking, records, strict=True)] * (layers // len(records) + 1)
    name_of = {}
    for i in range(layers):
        name_of[i] = f"{stem}.{'down' if i % 2 else 'up'}.weight_of_layer_{i}"
    results["layer_ranking"] = [both[i][0] | {"layer": name_of[i]} for i in range(layers)]
    results["analysis"]["layers"]["records"] = [both[i][1] | {"layer": name_of[i]} for i in range(layers)]
    names = ["a watercolour of " + "Donaudampfschifffahrtsgesellschaftskapitän" * 3 + f" {c}" for c in range(5)]
    results["analysis"]["concepts"]["classes"] = names
    path = "/".join(["a_folder_of_a_researcher.with-many.versions"] * 6) + "/" + "x" * 200
    results["dataset"] |= {"name": path[-150:], "path": path, "classes": names, "num_layers": layers}
    results["dataset"]["findings"] = [{"kind": "copies", "message": f"1 LoRA is a copy ({path})", "files": []}]
    results["environment"]["host"] = "h" * 300
    results["config"] |= {"quick": True, "keep_twins": True}
    results["representations_not_run"] = [{"representation": "pca", "reason": path}]
    return results


@pytest.mark.parametrize("analysed", [True, False])
def test_nesting_is_right_and_every_section_is_there(analysed):
    results = made()
    if not analysed:
        results |= {"analysis": None, "not_done": {"analysis": "out of memory"}}
    before = copy.deepcopy(results)
    reader = Reader(page.render_page(results, ALL))
    assert results == before
    left_out = page.OPTIONAL - {"modules"} if analysed else page.OPTIONAL
    shown = [anchor for anchor in page.SECTIONS if anchor not in left_out]
    assert [section["id"] for section in reader.of("section")] == shown
    ids = [attributes["id"] for _, attributes in reader.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert all(element["aria-labelledby"] in ids for element in reader.of("section"))
    assert [tag for tag, _ in reader.elements].count("h1") == 1 and reader.of("html") == [{"lang": "en"}]
    if not analysed:
        assert all(
            "Analysis missing: out of memory." in reader.text[anchor] for anchor in ("answers", "layers", "controls")
        )
        assert tables.tables(results)["ranking"].rows[-1][-1] in reader.text["layers"]


def test_nothing_is_fetched_and_no_other_script_runs():
    content = page.render_page(made(), ALL)
    reader = Reader(content)
    for tag, attributes in reader.elements:
        assert tag not in ("link", "iframe", "object", "base", "form") and (tag != "script" or not attributes)
        for name, value in attributes.items():
            assert not name.startswith("on")
            if name in ("href", "src", "srcset", "action", "poster", "data"):
                assert value.startswith(("#", "data:image/")), (tag, value)
    anchors = {attributes["href"][1:] for attributes in reader.of("a")}
    assert (
        anchors <= {attributes.get("id") for _, attributes in reader.elements}
        and anchors >= {*page.SECTIONS} - page.OPTIONAL
    )
    style = content.decode().split("<style>")[1].split("</style>")[0]
    assert "url(" not in style and "@import" not in style and "prefers-color-scheme: dark" in style
    policies = [one["content"] for one in reader.of("meta") if one.get("http-equiv") == "Content-Security-Policy"]
    assert policies == [page.POLICY] and policies[0].startswith("default-src 'none'; img-src data:; style-src")
    (script,) = reader.scripts
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert re.findall(r"script-src ([^;]*);", policies[0]) == [f"'sha256-{digest}'"]
    makes_markup = r"innerHTML|outerHTML|insertAdjacent|document\.write|eval|Function\("
    assert script == page.SCRIPT and not re.search(makes_markup, script)


def test_names_are_escaped_and_whole():
    results = made()
    evil = '</table><img src="https://x.test/a.png" onerror="alert(1)">'
    results["dataset"] |= {"name": evil, "path": evil, "skipped": [{"path": evil, "reason": "<b>bad</b>"}]}
    results["layer_ranking"][0]["layer"] = results["analysis"]["layers"]["records"][0]["layer"] = evil
    results["environment"]["device"] = evil
    results["representations_not_run"] = [{"representation": "pca", "reason": evil}]
    content = page.render_page(results, ALL)
    reader = Reader(content)
    assert reader.scripts == [page.SCRIPT] and b"<b>" not in content and len(reader.of("img")) == len(NAMES)
    for name in CLASS_NAMES:
        assert name in reader.text["concepts"] and name in reader.text["settings"]
    assert evil in reader.text["layers"] and evil in reader.text["settings"] and evil in reader.text[""]


def test_words_and_numbers_are_those_of_results():
    results = made("distributed", answerable=False)
    results["config"]["quick"] = True
    reader = Reader(page.render_page(results, ALL))
    for answer in sentences.answers(results):
        for anchor in (answer.anchor, "answers"):
            shown = reader.text[anchor]
            assert answer.question in shown and f"Hypothesis: {answer.hypothesis}. {answer.outcome}" in shown
            assert answer.evidence in shown and answer.sentences[0] in shown
        assert all(sentence in reader.text[answer.anchor] for sentence in answer.sentences)
    assert all(warning.text in reader.text["answers"] for warning in cautions.warnings(results))
    assert all(check in reader.text["controls"] for check in cautions.checks(results))
    for table in tables.tables(results).values():
        assert all(cell in reader.text[table.anchor] for row in table.rows for cell in row)
    assert all(f"{name}" in reader.text["robustness"] for name in sentences.VERDICTS)
    assert all(word in reader.text[""] and fact in reader.text[""] for word, fact in text.run_facts(results))
    for name in ("classifier.max_epochs", "split_sizes.train", "device"):
        assert name in reader.text["settings"]


@pytest.mark.parametrize(
    ("text_of_file", "markup"),
    [
        ("a.weight_of/b", "a.<wbr>weight_<wbr>of/<wbr>b"),
        ("blocks.0.attn2.to_k", "blocks.<wbr>0.<wbr>attn2.<wbr>to_<wbr>k"),
        ("95.0 ± 5.0, p < 1e-9", "95.0 ± 5.0, p\N{NO-BREAK SPACE}&lt;\N{NO-BREAK SPACE}1e-9"),
        ("The end. Another", "The end. Another"),
        ("</script><b>", "&lt;/<wbr>script&gt;&lt;b&gt;"),
        ('\u202e"\u2066', "\u202e&#34;\u2066"),
        ("", ""),
    ],
)
def test_long_names_break_at_dots_and_their_text_is_whole(text_of_file, markup):
    assert page.shown(text_of_file) == markup
    reader = Reader(f"<p>{page.shown(text_of_file)}</p>".encode())
    assert reader.text[""] == text_of_file


def test_tables_can_be_read_without_seeing_them():
    reader = Reader(page.render_page(made(), ALL))
    assert reader.of("table") and all(head.get("scope") in ("col", "row") for head in reader.of("th"))
    boxes = [one for one in reader.of("div") if one["class"] == "scroll"]
    assert len(boxes) == len(reader.of("table")) and all(box["tabindex"] == "0" and box["aria-label"] for box in boxes)


def test_figures_stand_in_their_section_with_their_finding():
    results = made()
    content, finding_of = page.render_page(results, ALL).decode(), figures.findings(results)
    assert finding_of.keys() == set(NAMES)
    for row in ROWS:
        section = content.split(f'<section id="{row.section}"')[1].split("</section>")[0]
        alts = [image["alt"] for image in Reader(section.encode()[section.index(">") + 1 :]).of("img")]
        rows = [other for other in ROWS if other.section == row.section]
        assert alts == [f"{other.shows}. {finding_of[other.name]}." for other in rows]


def test_every_question_the_concepts_and_the_modules_have_a_figure():
    assert len(set(NAMES)) == len(NAMES)
    anchors = {question.anchor for question in sentences.QUESTIONS}
    assert {row.section for row in ROWS} == {*anchors, "concepts", "modules"}


def test_without_whole_pairs_the_section_says_why_and_no_more():
    results = without_pairs()
    reader = Reader(page.render_page(results, {f"{name}.svg": SVG for name in figures.findings(results)}))
    assert "No module has both of its layers among those looked at." in reader.text["rank"]
    assert "None" not in "".join(reader.text.values()) and len(reader.of("img")) == len(NAMES) - 1


def test_what_to_bear_in_mind_and_what_was_not_run_is_on_the_first_page():
    results = made()
    results["analysis"] |= {"controls_not_run": {"null shuffles": "it diverged"}}
    text = Reader(page.render_page(results, {})).text
    assert "Null shuffles not run: it diverged." in text["answers"]
    assert all(warning.text in text["answers"] for warning in cautions.warnings(results))


def test_any_picture_may_be_missing():
    assert "<img" not in page.render_page(made(), {}).decode()
    only = page.render_page(made(), {"ablation_curves.png": PNG, "layer_clusters.svg": b""})
    sources = [one["src"] for one in Reader(only).of("img")]
    assert sources == ["data:image/png;base64," + base64.b64encode(PNG).decode()]


def test_a_large_svg_gives_way_to_smaller_pngs_for_light_and_dark_screens():
    name, large = "rank_structure", SVG + b" " * 1000
    small = {f"{rendering.PAGE}{name}.png": PNG, f"{rendering.PAGE}{name}{rendering.DARK}.png": PNG + b"dark"}
    for files, kind in (
        ({f"{name}.svg": SVG, f"{name}.png": PNG}, "svg+xml"),
        ({f"{name}.svg": large, f"{name}.png": PNG, **small}, "png"),
        ({f"{name}.svg": SVG, **dict.fromkeys(small, large)}, "svg+xml"),
        ({f"{name}.svg": large}, "svg+xml"),
    ):
        reader = Reader(page.render_page(made(), files))
        (image,) = reader.of("img")
        head, body = image["src"].split(",")
        assert head == f"data:image/{kind};base64" and base64.b64decode(body) in files.values()
        dark = [(source["media"], base64.b64decode(source["srcset"].split(",")[1])) for source in reader.of("source")]
        assert dark == ([("screen and (prefers-color-scheme: dark)", PNG + b"dark")] if kind == "png" else [])


def test_below_figures_of_a_paper_stands_what_their_titles_said():
    results = made()
    finding = figures.findings(results)["layer_importance"]
    assert finding not in Reader(page.render_page(results, ALL)).text["layers"]
    results["figures"] = {"style": "paper"}
    assert f"against chance. {finding}." in Reader(page.render_page(results, ALL)).text["layers"]


# -- in a browser ---------------------------------------------------------------------------------------


def opened(content: bytes, folder) -> tuple[str, list[str]]:
    """The page as a browser holds it, and the lines of its console."""
    path = folder / "report.html"
    path.write_bytes(content)
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom", "--enable-logging=stderr", "--v=0",
               "--virtual-time-budget=5000", f"--user-data-dir={folder / 'profile'}", path.as_uri()]  # fmt: skip
    done = subprocess.run(command, capture_output=True, timeout=300)
    log = done.stderr.decode(errors="replace")
    assert done.returncode == 0, log
    return done.stdout.decode(), [line for line in log.splitlines() if re.search(r":CONSOLE[:(]", line)]


@pytest.mark.skipif(BROWSER is None, reason="no chromium, chromium-browser or google-chrome on the path")
def test_a_browser_shows_every_section_and_has_no_complaint(tmp_path):
    results = made(answerable=False)
    dom, console = opened(page.render_page(results, ALL), tmp_path)
    assert console == []
    reader = Reader(dom.encode())
    optional = page.OPTIONAL - {"modules"}
    assert [section["id"] for section in reader.of("section")] == [a for a in page.SECTIONS if a not in optional]
    assert len(reader.of("img")) == len(NAMES) and reader.scripts == [page.SCRIPT]
    for answer in sentences.answers(results):
        assert all(sentence in reader.text[answer.anchor] for sentence in answer.sentences)
    for name in CLASS_NAMES:
        assert name in reader.text["concepts"]


@pytest.mark.skipif(BROWSER is None, reason="no chromium, chromium-browser or google-chrome on the path")
@pytest.mark.parametrize(("scheme", "ground"), [(0, drawing.ON_DARK[drawing.GROUND]), (1, drawing.GROUND)])
def test_figures_have_the_ground_of_the_page_in_the_light_and_in_the_dark(tmp_path, scheme, ground):
    """Of a page that is nothing but a figure, the picture is taken under both schemes."""
    with drawing.new_figure("test", "A title") as figure:
        figure.subplots()
        content = page.render_page(made(), {"layer_importance.svg": rendering.saved(figure, "svg", "A title")})
    image = re.search(rb'<img alt[^>]*src="(data:[^"]*)"', content)[1].decode()
    style = content.decode().split("<style>")[1].split("</style>")[0]
    path, picture = tmp_path / "figure.html", tmp_path / "picture.png"
    path.write_text(f'<!DOCTYPE html><style>{style}</style><body><img src="{image}">', encoding="utf-8")
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--window-size=800,600",
               f"--blink-settings=preferredColorScheme={scheme}", f"--screenshot={picture}",
               f"--user-data-dir={tmp_path / 'profile'}", path.as_uri()]  # fmt: skip
    subprocess.run(command, capture_output=True, timeout=300, check=True)
    shown = np.asarray(Image.open(picture).convert("RGB")).reshape(-1, 3)
    colors, counts = np.unique(shown, axis=0, return_counts=True)
    most = colors[counts.argmax()].tolist()
    assert most == [int(ground[i : i + 2], 16) for i in (1, 3, 5)] and counts.max() > 0.9 * len(shown)
    assert np.abs(shown.astype(int) - most).max() > 200  # ink on it


@pytest.mark.skipif(BROWSER is None, reason="no chromium, chromium-browser or google-chrome on the path")
def test_the_browser_would_complain_and_the_policy_holds(tmp_path):
    """That the console is empty says something: what the policy forbids is told there."""
    outside = b'<img alt="" src="https://example.invalid/a.png"><script>document.title = "ran"</script></main>'
    dom, console = opened(page.render_page(made(), {}).replace(b"</main>", outside), tmp_path)
    assert len(console) == 2 and all("Content Security Policy" in line for line in console)
    assert "<title>ran</title>" not in dom
