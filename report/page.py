"""results.json and the pictures -> report.html, one file that a researcher can send.

The file fetches nothing and runs nothing: pictures are data: URLs, the style stands in the head, there is no script,
and a content security policy forbids all else. Words and tables are those of answers.py, cautions.py and tables.py.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from html import escape

from report import cautions, sentences, tables, text

SVG_LIMIT = 300_000  # bytes above which the smaller of SVG and PNG is taken: six of them stay below 3 MB
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
SECTIONS = {  # anchor -> heading; the five questions come from answers.QUESTIONS
    "answers": "Short answers",
    **sentences.QUESTIONS,
    "concepts": "Concepts",
    "controls": "Controls that keep us honest",
    "settings": "Settings",
}
PICTURES = {  # name -> what it shows; the section it stands in
    "layer_importance": ("Accuracy of each layer alone by its depth in the network, against chance", "layers"),
    "ablation_curves": ("Accuracy as layers are removed, in three orders", "robustness"),
    "representations": ("Accuracy of each representation with all layers and without the top ones", "representations"),
    "layer_clusters": ("Layers by the likeness of their features", "information"),
    "rank_structure": ("Effective rank, or norm, of the updates by concept", "rank"),
    "concept_layer_map": ("Recall of each concept from each layer alone", "concepts"),
}
STYLE = """
:root { color-scheme: light dark; --ground: #fff; --ink: #1c2128; --soft: #57606a; --line: #d0d7de; --panel: #f6f8fa;
  --link: #0b57b0; --yes: #116329; --no: #a40e26; --open: #7d4e00; --none: #57606a; }
@media (prefers-color-scheme: dark) { :root { --ground: #14181d; --ink: #e3e8ee; --soft: #a3adb8; --line: #3a424c;
  --panel: #1d232a; --link: #7ab7ff; --yes: #6fd08c; --no: #ff9a97; --open: #edb95e; --none: #a3adb8; } }
* { box-sizing: border-box; }
html { scroll-behavior: smooth; -webkit-text-size-adjust: 100%; }
body { margin: 0; background: var(--ground); color: var(--ink);
  font: 1rem/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
header, main, footer { max-width: 62rem; margin: 0 auto; padding: 0 1.25rem; }
header { padding-top: 2.5rem; }
h1 { font-size: 1.75rem; line-height: 1.2; margin: 0 0 .25rem; overflow-wrap: anywhere; }
h2 { font-size: 1.35rem; line-height: 1.3; margin: 0 0 .75rem; }
h3 { font-size: 1.05rem; margin: 1.5rem 0 .5rem; }
section { border-top: 1px solid var(--line); padding: 1.75rem 0 1rem; }
p { margin: 0 0 .75rem; max-width: 46rem; overflow-wrap: anywhere; }
a { color: var(--link); }
.soft, figcaption, .note { color: var(--soft); }
.skip { position: absolute; left: -100rem; }
.skip:focus { left: 1rem; top: 1rem; background: var(--ground); padding: .5rem; }
dl.run { display: grid; grid-template-columns: max-content 1fr; gap: .2rem 1.25rem; margin: 1rem 0 1.5rem; }
dl.run dt { color: var(--soft); }
dl.run dd { margin: 0; grid-column: 2; overflow-wrap: anywhere; }
nav ul { display: flex; flex-wrap: wrap; gap: .25rem 1.25rem; list-style: none; padding: 0; margin: 0 0 1.5rem; }
ol.answers { list-style: none; padding: 0; margin: 0; display: grid; gap: .75rem; }
ol.answers > li { background: var(--panel); border: 1px solid var(--line); border-radius: 8px; padding: 1rem 1.15rem; }
ol.answers h3 { margin: 0 0 .35rem; }
ol.answers p { max-width: none; }
ol.answers p:last-child { margin-bottom: 0; }
.hypothesis { font-size: .925rem; }
.outcome { display: inline-block; border: 1px solid currentcolor; border-radius: 999px; padding: 0 .6rem;
  font-size: .8rem; font-weight: 600; white-space: nowrap; }
.confirmed { color: var(--yes); } .refuted { color: var(--no); } .undecided { color: var(--open); }
.not-answerable { color: var(--none); }
aside { border-left: 4px solid var(--open); background: var(--panel); padding: .9rem 1.15rem; margin: 1.25rem 0 .5rem; }
aside h3 { margin: 0 0 .35rem; }
aside ul, ul.checks { margin: 0; padding-left: 1.2rem; overflow-wrap: anywhere; }
aside li + li, ul.checks li + li { margin-top: .3rem; }
dl.verdicts dt { font-weight: 600; }
dl.verdicts dd { margin: 0 0 .35rem 1.2rem; }
figure { margin: 1.25rem 0; }
.picture { background: #fff; border: 1px solid var(--line); border-radius: 6px; padding: .5rem; overflow-x: auto; }
.picture img { display: block; width: 100%; height: auto; }
figcaption { font-size: .9rem; margin-top: .4rem; }
.scroll { overflow: auto; max-height: 34rem; border: 1px solid var(--line); border-radius: 6px; }
.scroll:focus-visible, .picture:focus-visible { outline: 2px solid var(--link); outline-offset: 2px; }
table { border-collapse: separate; border-spacing: 0; width: 100%; font-size: .875rem; line-height: 1.4;
  font-variant-numeric: tabular-nums; }
h3.title { font-size: .95rem; }
th, td { padding: .35rem .75rem; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { font-weight: 500; }
thead th { position: sticky; top: 0; background: var(--panel); font-weight: 600; vertical-align: bottom; }
.word { text-align: left; }
thead th, tbody .word:last-child, table.settings td { white-space: normal; }
tbody .word:last-child, table.settings td { overflow-wrap: anywhere; min-width: 15rem; }
table.settings td { text-align: left; }
tbody tr:last-child > * { border-bottom: 0; }
.note { font-size: .875rem; margin-top: .4rem; }
footer { border-top: 1px solid var(--line); padding-top: 1rem; padding-bottom: 2.5rem; font-size: .875rem; }
@media (max-width: 40rem) { dl.run { grid-template-columns: 1fr; gap: 0; }
  dl.run dd { grid-column: 1; margin-bottom: .5rem; } .picture img { width: 44rem; max-width: none; }
  header { padding-top: 1.5rem; } tbody .word:last-child { white-space: nowrap; } }
@media print { :root { --ground: #fff; --ink: #000; --soft: #444; --line: #bbb; --panel: #fff; --link: #000;
  --yes: #000; --no: #000; --open: #000; --none: #000; } nav, .skip { display: none; }
  .scroll { max-height: none; overflow: visible; border: 0; } thead th { position: static; }
  th, td { white-space: normal; overflow-wrap: anywhere; padding: .15rem .4rem; } body { font-size: 10pt; }
  figure, tr, ol.answers > li, aside { break-inside: avoid; } h2, h3 { break-after: avoid; } }
"""


def render_page(results: dict, pictures: dict[str, bytes]) -> bytes:
    """The whole of report.html from the content of results.json.

    Args:
        results: The content of results.json, with or without ``analysis``.
        pictures: Contents of the pictures by file name, such as ``layer_importance.svg``; any may be missing.

    Returns:
        One HTML file in UTF-8, that fetches nothing.
    """
    title = f"LoRA layer ablation: {results['dataset']['name']}"
    head = [
        '<meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{escape(POLICY)}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        '<meta name="color-scheme" content="light dark">',
        f"<title>{escape(title)}</title>",
        f"<style>{STYLE}</style>",
    ]
    body = [
        '<a class="skip" href="#answers">To the answers</a>',
        *_header(results, title),
        "<main>",
        *(line for anchor in SECTIONS for line in _section(anchor, results, pictures)),
        "</main>",
        f"<footer><p>{escape(_origin(results))}</p></footer>",
    ]
    lines = ["<!DOCTYPE html>", '<html lang="en">', "<head>", *head, "</head>", "<body>", *body, "</body>", "</html>"]
    return ("\n".join(lines) + "\n").encode()


def _origin(results: dict) -> str:
    environment = results["environment"]
    return (
        f"Made from results.json alone, which holds every number. Run with torch "
        f"{environment['torch']} on {environment['device']}."
    )


def _header(results: dict, title: str) -> Iterator[str]:
    """Title, what was run, and the table of contents."""
    yield f"<header><h1>{escape(title)}</h1>"
    yield (
        '<p class="soft">Which LoRA layers give the fine-tuning concept away, does prediction survive without them, '
        "and which representation of the weights sees it best?</p>"
    )
    yield '<dl class="run">'
    before = ""
    for line in text.run_lines(results):
        word = line[:10].strip()
        yield f"<dt>{escape(word)}</dt>" * (word != before) + f"<dd>{escape(line[10:])}</dd>"
        before = word
    yield "</dl>"
    links = [f'<li><a href="#{anchor}">{escape(heading)}</a></li>' for anchor, heading in SECTIONS.items()]
    yield f'<nav aria-label="Contents"><ul>{"".join(links)}</ul></nav></header>'


def _section(anchor: str, results: dict, pictures: dict[str, bytes]) -> Iterator[str]:
    """One section: heading, words, picture, tables."""
    yield f'<section id="{anchor}" aria-labelledby="{anchor}-heading">'
    yield f'<h2 id="{anchor}-heading">{escape(SECTIONS[anchor])}</h2>'
    if anchor == "answers":
        yield from _short_answers(results)
    elif anchor == "controls":
        yield from _controls(results)
    elif anchor == "settings":
        yield from _settings(results)
    else:
        yield from _answer(anchor, results)
    yield from _figures(anchor, results, pictures)
    for table in tables.tables(results).values():
        if table.anchor == anchor:
            yield from _table(table)
    if anchor == "robustness" and (results.get("analysis") or {}).get("robustness"):
        yield from _verdicts()
    yield "</section>"


# ----------------------------------------------------------------------------------------------------------------------
# Words
# ----------------------------------------------------------------------------------------------------------------------


def _words(text: str) -> str:
    """A sentence as HTML."""
    return escape(sentences.kept_together(text))


def _short_answers(results: dict) -> Iterator[str]:
    """What matters most of each answer, the hypotheses, and what to bear in mind."""
    told = sentences.answers(results)
    if told:
        level = 100 * results["analysis"]["level"]
        yield f'<p class="soft">Numbers in brackets are intervals of {level:.0f} % over the test LoRAs.</p>'
        yield '<ol class="answers">'
        for answer in told:
            yield f'<li><h3><a href="#{answer.anchor}">{escape(answer.question)}</a></h3>'
            yield f"<p>{_words(' '.join(answer.sentences[:2]))}</p>{_hypothesis(answer)}</li>"
        yield "</ol>"
    if lines := cautions.warnings(results):
        yield "<aside><h3>To bear in mind</h3>"
        yield f"<ul>{''.join(f'<li>{_words(line)}</li>' for line in lines)}</ul></aside>"


def _hypothesis(answer: sentences.Answer) -> str:
    badge = f'<span class="outcome {answer.outcome.replace(" ", "-")}">{escape(answer.outcome)}</span>'
    told = f"Hypothesis: {escape(answer.hypothesis)}. {badge} {_words(answer.evidence)}"
    return f'<p class="hypothesis">{told}</p>'


def _answer(anchor: str, results: dict) -> Iterator[str]:
    """The whole of an answer, or why there is none."""
    if not results.get("analysis"):
        yield f'<p class="soft">{escape(sentences.NO_CONTROLS)}</p>'
    for answer in sentences.answers(results):
        if answer.anchor == anchor:
            yield from (f"<p>{_words(sentence)}</p>" for sentence in answer.sentences)
            yield _hypothesis(answer)
    if anchor == "concepts":
        yield from (f"<p>{_words(line)}</p>" for line in sentences.concept_lines(results))


def _controls(results: dict) -> Iterator[str]:
    lines = cautions.checks(results) or [sentences.NO_CONTROLS]
    yield f'<ul class="checks">{"".join(f"<li>{_words(line)}</li>" for line in lines)}</ul>'


def _verdicts() -> Iterator[str]:
    yield '<h3>What the verdicts mean</h3><dl class="verdicts">'
    yield from (f"<dt>{name}</dt><dd>{escape(meaning)}</dd>" for name, meaning in sentences.VERDICTS.items())
    yield "</dl>"


# ----------------------------------------------------------------------------------------------------------------------
# Pictures and tables
# ----------------------------------------------------------------------------------------------------------------------


def _figures(anchor: str, results: dict, pictures: dict[str, bytes]) -> Iterator[str]:
    """The pictures of a section that are there, each with its finding as the text for those who do not see it."""
    findings = {answer.anchor: answer.sentences[0] for answer in sentences.answers(results)}
    findings["concepts"] = " ".join(sentences.concept_lines(results))
    for name, (shows, section) in PICTURES.items():
        if section == anchor and (source := _inlined(name, pictures)):
            text = f"{shows}. {findings.get(anchor, '')}".strip()
            box = f'<div class="picture" role="group" aria-label="{escape(shows)}" tabindex="0">'
            yield f'<figure>{box}<img alt="{escape(text)}" src="{source}"></div>'
            yield f"<figcaption>{escape(shows)}.</figcaption></figure>"


def _inlined(name: str, pictures: dict[str, bytes]) -> str:
    """A picture as data: URL; SVG, which is sharp at any size, unless it is large and a PNG is smaller."""
    kinds = {"image/svg+xml": pictures.get(f"{name}.svg"), "image/png": pictures.get(f"{name}.png")}
    there = {kind: content for kind, content in kinds.items() if content}
    if not there:
        return ""
    kind = next(iter(there))
    if len(there[kind]) > SVG_LIMIT:
        kind = min(there, key=lambda one: len(there[one]))
    return f"data:{kind};base64,{base64.b64encode(there[kind]).decode()}"


def _table(table: tables.Table) -> Iterator[str]:
    """A table in a box of its own, which scrolls."""
    title, last = escape(table.title), len(table.columns) - 1
    yield f'<h3 class="title">{title}</h3><div class="scroll" role="region" aria-label="{title}" tabindex="0"><table>'
    word = [' class="word"' if i in table.words else "" for i in range(last + 1)]
    heads = [f'<th scope="col"{word[i]}>{escape(column)}</th>' for i, column in enumerate(table.columns)]
    yield f"<thead><tr>{''.join(heads)}</tr></thead><tbody>"
    head = last if last in table.words and 0 not in table.words else 0  # the cell that names the row
    for row in table.rows:
        cells = [
            f'<th scope="row"{word[i]}>{escape(cell)}</th>' if i == head else f"<td{word[i]}>{escape(cell)}</td>"
            for i, cell in enumerate(row)
        ]
        yield f"<tr>{''.join(cells)}</tr>"
    yield "</tbody></table></div>"
    if table.note:
        yield f'<p class="note">{escape(table.note)}</p>'


def _settings(results: dict) -> Iterator[str]:
    """What results.json holds on collection, settings and machine; no times, so that a run repeated gives this page."""
    for part in ("config", "dataset", "environment"):
        yield f'<h3 class="title">{part}</h3><div class="scroll" role="region" aria-label="{part}" tabindex="0">'
        yield '<table class="settings"><thead><tr><th scope="col" class="word">name</th>'
        yield '<th scope="col" class="word">value</th></tr></thead><tbody>'
        for name, value in _flat({name: value for name, value in results[part].items() if name != "date"}):
            yield f'<tr><th scope="row" class="word">{escape(name)}</th><td>{escape(value)}</td></tr>'
        yield "</tbody></table></div>"
    if left_out := results["representations_not_run"]:
        lines = [f"{entry['representation']}: {entry['reason']}" for entry in left_out]
        yield f"<h3>Not run</h3><ul>{''.join(f'<li>{escape(line)}</li>' for line in lines)}</ul>"


def _flat(values: dict, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Names and values of nested dicts, names joined by a point."""
    for name, value in values.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{name}.")
        elif isinstance(value, list):
            told = [item if isinstance(item, str) else json.dumps(item, ensure_ascii=False) for item in value]
            yield f"{prefix}{name}", ", ".join(told) or "none"
        else:
            yield f"{prefix}{name}", "none" if value is None or value == {} else str(value)
