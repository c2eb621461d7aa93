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


def test_changes_are_losses_or_gains_and_their_signs_agree():
    drop = {"drop": -0.0126, "interval": [-0.03, 0.001], "p": 0.2, "significant": False}
    assert wording.change_text(drop) == "gains 1.3 points (-0.1 to 3.0, p = 0.2)"
    assert wording.gain_text(drop) == "+1.3 (-0.1 to +3.0)"
    lost = {"drop": 0.05, "interval": [0.01, 0.09], "p": 0.01, "significant": True}
    assert wording.change_text(lost) == "loses 5.0 points (1.0 to 9.0, p = 0.01)"
    assert wording.gain_text(lost) == "-5.0 (-9.0 to -1.0) *"


def test_a_mean_over_splits_has_an_interval_or_a_range():
    values = {"mean": 0.5, "min": 0.4, "max": 0.65, "interval": None}
    assert wording.spread_text(values) == "50.0 % (range 40.0 to 65.0)"
    assert wording.spread_text(values | {"interval": [0.45, 0.55]}, "points") == "50.0 points (45.0 to 55.0)"


def test_what_is_left_of_nothing_is_chance_and_has_no_interval():
    assert wording.left_text({"accuracy": 0.5, "interval": [0.4, 0.6]}) == "50.0 % (40.0 to 60.0)"
    nothing = wording.left_text({"accuracy": 0.2, "interval": None})
    assert "20.0 %" in nothing and "None" not in nothing and " to " not in nothing


@pytest.mark.parametrize(
    ("words", "text"), [(["a"], "a"), (["a", "b"], "a and b"), (["a", "b", "c"], "a, b and c")]
)  # fmt: skip
def test_lists(words, text):
    assert wording.listed(words) == text


def test_singular_and_plural():
    assert [wording.counted(count, "split") for count in (0, 1, 2)] == ["0 splits", "1 split", "2 splits"]
    assert (wording.top_layers(1), wording.top_layers(2)) == ("the top layer", "the top 2 layers")


def test_successive_numbers_of_features_become_a_range():
    assert wording.ranges(["mean", "a_1", "a_2", "a_3", "b_3", "b_4"]) == "mean, a_1 to a_3, b_3, b_4"
    assert wording.ranges(["a_3", "a_2", "a_1"]) == "a_3, a_2, a_1"


def test_no_line_ends_between_a_number_and_its_sign():
    lines = wording.wrapped("it reaches 12.0 % (p = 0.01) and p < 0.0001 of them " * 20, 40)
    assert max(map(len, lines)) <= 40 and not any(line.startswith(("%", "=", "<", "0.")) for line in lines)
    assert " ".join(lines) == ("it reaches 12.0 % (p = 0.01) and p < 0.0001 of them " * 20).strip()


def test_a_sentence_ends_once():
    assert wording.sentence("it diverged.") == wording.sentence("it diverged") == "It diverged."


def test_what_is_needed_is_never_less_than_the_chance_that_it_is_compared_with():
    assert wording.needed_text(0.6, 0.4).endswith("exceed 60.0 % to be distinguishable from chance")
    assert wording.needed_text(0.2, 0.4).endswith("exceed 20.0 % to be distinguishable from permuted labels")
    assert "even at 100 %" in wording.needed_text(1.0, 0.4)
