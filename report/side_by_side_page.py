"""Runs side by side -> comparison.html, one file that fetches nothing: see page.py for its threat model and policy."""

from __future__ import annotations

from markupsafe import Markup

from report.page import ENVIRONMENT, POLICY, SCRIPT, inlined
from report.side_by_side import HEADINGS, SOURCE, TITLE, Content
from report.side_by_side_figure import NAME, SHOWS


def render_page(content: Content, finding: str, drawn: dict[str, bytes]) -> bytes:
    """Return comparison.html.

    Args:
        content: Sentences and tables.
        finding: Finding of the figure, for those who do not see it.
        drawn: Files of the figure by name.

    Returns:
        One HTML file in UTF-8.
    """
    source, dark = inlined(NAME, drawn)
    page = ENVIRONMENT.get_template("comparison.html").render(
        title=TITLE,
        policy=POLICY,
        script=Markup(SCRIPT),
        headings=HEADINGS,
        content=content,
        source=SOURCE,
        figure={"shows": f"{SHOWS}.", "alt": f"{SHOWS}. {finding}.", "source": source, "dark": dark},
    )
    return page.encode(errors="backslashreplace")
