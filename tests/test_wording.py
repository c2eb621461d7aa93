"""Numbers as text: digits, floors, no negative zero."""

import pytest

from report import wording


@pytest.mark.parametrize(
    ("p", "text"),
    [(0.0, "p < 1e-9"), (3e-9, "p = 3e-9"), (1.234e-5, "p = 1.2e-5"), (0.01234, "p = 0.012"), (1.0, "p = 1")],
)
def test_p_of_no_draws_has_the_floor_of_what_results_keep(p, text):
    assert wording.p_text(p, wording.ROUNDED_P) == text
    assert wording.p_cell(p, wording.ROUNDED_P) == text.removeprefix("p ").removeprefix("= ")


@pytest.mark.parametrize(
    ("p", "text"),
    [(0.0, "p < 0.0001"), (1 / 10001, "p < 0.0001"), (2 / 10001, "p = 0.0002"), (0.01234, "p = 0.012"), (1, "p = 1")],
)
def test_p_has_two_digits_and_a_floor(p, text):
    assert wording.p_text(p) == text


def test_no_negative_zero():
    assert (wording.percent(-0.0), wording.percent(-0.0004), wording.number(-0.004)) == ("0.0", "0.0", "0.00")
    assert wording.percent(-0.0126) == "-1.3"
    assert [wording.signed(one) for one in (-0.0004, 0.0, 0.0126, -0.0126)] == ["0.0", "0.0", "+1.3", "-1.3"]
