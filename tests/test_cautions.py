"""Warnings beside the answers."""

import pytest

from report import cautions


@pytest.mark.parametrize(
    ("column", "mend"),
    [
        ("artist", "--group-column=artist uses it."),
        ("header: ss_set", "A table (--labels) with that field as a column, and --group-column, use it."),
    ],
)
def test_groups_that_were_not_used_are_named_with_what_uses_them(column, mend):
    groups = {"unused": [column], "column": column, "representation": "stats", "may_be_groups": False}
    groups |= {"grouped_split": 0.5, "interval": [0.4, 0.6], "chance": 0.25, "random_split": 0.9}
    (line,) = cautions._unused_groups({"groups": groups})
    assert line.startswith(f"Groups were not used, although the column {column} may name some.") and line.endswith(mend)
