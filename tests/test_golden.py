"""Whole texts of nine experiments, from what their analyses read: nothing is trained.

A change of a sentence or a number shows here. Read it as a student outside statistics would, then keep it with
`python tests/record_golden.py --texts`.
"""

import json
import re

import golden_store
import pytest
from record_golden import COLLECTIONS, RESAMPLES

from report import page, text

LARGEST = 200_000  # bytes of what is kept of an experiment
PATHS = sorted(golden_store.FOLDER.glob("*.npz"))


def test_there_is_one_for_each_collection():
    assert [path.stem for path in PATHS] == sorted(COLLECTIONS)
    assert all(path.stat().st_size < LARGEST for path in PATHS)


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_the_text_is_as_it_was_read(path):
    results = json.loads(golden_store.recorded(path.stem, RESAMPLES))
    content = text.content_of(results)
    assert text.render_text(results, content) == path.with_suffix(".txt").read_text(encoding="utf-8")
    assert len(text.short_lines(results, content.answers)) <= 40
    shown = page.render_page(results, {}, content).decode().split("</style>")[1]
    assert not re.search(r"\bNone\b(?! of| is best)|\bnan\b", shown)
