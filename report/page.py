"""results.json and the figures -> report.html, one file that a researcher can send.

The file fetches nothing: figures are data: URLs, the style stands in the head. It runs one script, page.js, which sorts
and filters tables. Threat model: names, paths and messages come from files of strangers, and may hold markup, the end
of a script, quotes or characters that turn the direction of writing. All markup stands in page.html, whose variables
are escaped, in no place inside the script or the style; the script reads the text of cells and makes no markup of it.
Should markup come through all the same, the content security policy of the page forbids any script but page.js, by
its SHA-256, any attribute that is a handler, and whatever fetches, sends or embeds; what is left is to look wrong.
Without scripts the page is complete. Sentences and tables are those of sentences.py and tables.py.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from report.cautions import first_lines, missing
from report.figures import FIGURES, style_of
from report.further import FURTHER
from report.modules import module_lines
from report.rendering import DARK, PAGE
from report.sentences import QUESTIONS, VERDICTS, concept_lines
from report.text import BEAR_IN_MIND, MODULES_HEADING, Content, content_of, not_run, run_facts
from report.wording import kept_together

SCRIPT = Path(__file__).with_name("page.js").read_text(encoding="utf-8")
SCRIPT_DIGEST = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
POLICY = (
    f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{SCRIPT_DIGEST}'; "
    "base-uri 'none'; form-action 'none'"
)
# Between a dot, slash or underscore and what follows, where a long name may go on in the next line; not inside numbers.
BREAKS = re.compile(r"(?<=[/\\_])(?=[^\s/\\_])|(?<=[^\W\d]\.)(?=\w)|(?<=\d\.)(?=[^\W\d])")
FLAG = re.compile(r"(?<![\w-])--[a-z]+(-[a-z]+)*(?![\w-])")
SECTIONS = {  # anchor -> heading; those in ``OPTIONAL`` are left out where there is nothing to say
    "answers": "Short answers",
    **{question.anchor: question.text for question in QUESTIONS},
    "concepts": "Concepts",
    "modules": MODULES_HEADING,
    **{section.anchor: section.heading for section in FURTHER},
    "controls": "Controls",
    "settings": "Settings",
}
OPTIONAL = {"modules", *(section.anchor for section in FURTHER)}
ENVIRONMENT = Environment(
    loader=FileSystemLoader(Path(__file__).parent),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
)


def shown(text: str) -> Markup:
    """Return text as markup: escaped, with breaks allowed inside long names, and none before a unit or in a flag."""
    marked = Markup("<wbr>").join(map(escape, BREAKS.split(kept_together(text))))
    return Markup(FLAG.sub(r'<span class="flag">\g<0></span>', str(marked)))  # else the joining escapes again


ENVIRONMENT.filters["shown"] = shown


def render_page(results: dict, drawn: dict[str, bytes], content: Content | None = None) -> bytes:
    """Return the whole of report.html from the content of results.json.

    Args:
        results: The content of results.json, with or without ``analysis``.
        drawn: Contents of the figures by file name, such as ``layer_importance.svg``; any may be missing.
        content: Sentences and tables of the results, where they are made already.

    Returns:
        One HTML file in UTF-8 that fetches nothing.
    """
    analysis, content = results.get("analysis") or {}, content or content_of(results)
    page = ENVIRONMENT.get_template("page.html").render(
        title=f"LoRA layer ablation: {results['dataset']['name']}",
        policy=POLICY,
        script=Markup(SCRIPT),
        facts=run_facts(results),
        sections=_sections(results, content, drawn),
        answers=content.answers,
        level=f"{100 * analysis['level']:.0f}" if analysis else "",
        first_lines=first_lines(content.warnings),
        bear_in_mind=BEAR_IN_MIND,
        cautions=[caution.text for caution in content.warnings],
        verdicts=VERDICTS if analysis.get("robustness") else {},
        settings={part: list(_flat(_undated(results[part]))) for part in ("config", "dataset", "environment")},
        not_run=not_run(results),
        environment=results["environment"],
    )
    return page.encode(errors="backslashreplace")


def _sections(results: dict, content: Content, drawn: dict[str, bytes]) -> list[dict]:
    """Return the content of each of ``SECTIONS``: lines, an answer, bullets, figures and tables."""
    answer_of = {answer.anchor: answer for answer in content.answers}
    lines = {anchor: answer.sentences for anchor, answer in answer_of.items()}
    lines["concepts"], lines["modules"] = concept_lines(results), module_lines(results)
    lines |= content.further
    if not results.get("analysis"):
        lines = {anchor: missing(results) for anchor in (*(question.anchor for question in QUESTIONS), "concepts")}
    bullets = {"controls": content.checks or missing(results)}
    figures = list(_figures(content.findings, drawn, style_of(results) == "report"))
    return [
        {
            "anchor": anchor,
            "heading": heading,
            "lines": lines.get(anchor, []),
            "answer": answer_of.get(anchor),
            "bullets": bullets.get(anchor, []),
            "figures": [figure for figure in figures if figure["section"] == anchor],
            "tables": [table for table in content.tables.values() if table.anchor == anchor],
        }
        for anchor, heading in SECTIONS.items()
        if anchor not in OPTIONAL or lines.get(anchor)
    ]


def _figures(finding_of: dict[str, str], drawn: dict[str, bytes], titled: bool) -> Iterator[dict]:
    """Yield the figures that are there, each with its finding as the text for those who do not see it.

    Below figures of a paper, which have no titles, the finding is there for everybody.
    """
    for row in FIGURES:
        source, dark = inlined(row.name, drawn)
        if source:
            alt = shows = f"{row.shows}."
            if row.name in finding_of:
                alt = f"{shows} {finding_of[row.name]}."
            yield {
                "section": row.section,
                "shows": shows if titled else alt,
                "alt": alt,
                "source": source,
                "dark": dark,
            }


def inlined(name: str, drawn: dict[str, bytes]) -> tuple[str, str]:
    """Return a figure as data: URL, and one for dark screens, empty where the first is for these too.

    It is an SVG, which is sharp at any size, unless that is too large: then there are PNGs of the size of a screen.
    """
    svg, png = drawn.get(f"{name}.svg"), drawn.get(f"{name}.png")
    small, dark = drawn.get(f"{PAGE}{name}.png"), drawn.get(f"{PAGE}{name}{DARK}.png")
    if small and len(small) < len(svg or b""):
        return _url("png", small), _url("png", dark)
    return (_url("svg+xml", svg) if svg else _url("png", png)), ""


def _url(kind: str, content: bytes | None) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}" if content else ""


def _undated(values: dict) -> dict:
    """Return the values without the date, so that a run that is repeated gives the same page."""
    return {name: value for name, value in values.items() if name != "date"}


def _flat(values: dict, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield names and values of nested dicts, names joined by a point."""
    for name, value in values.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{name}.")
        elif isinstance(value, list):
            items = [item if isinstance(item, str) else json.dumps(item, ensure_ascii=False) for item in value]
            yield f"{prefix}{name}", ", ".join(items) or "none"
        else:
            yield f"{prefix}{name}", "none" if value is None or value == {} else str(value)
