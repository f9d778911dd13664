"""Scores of answers, by cases."""

from __future__ import annotations

import pytest

from tokenprune.evaluation.metrics import METRICS, build_metric, exact, normalise, normalized, vqa
from tokenprune.evaluation.metrics import vqa_normalise as clean


def test_case_and_space_do_not_count() -> None:
    assert normalise("  K  7\n") == normalise("k 7") != normalise("k7")


def test_exact_takes_any_accepted_answer() -> None:
    assert exact(" Red ", ("crimson", "red")) == 1
    assert exact("Red.", ("red",)) == 0
    assert exact("the red", ("red",)) == 0


def test_normalized_ignores_punctuation_only() -> None:
    assert normalized("Red.", ("red",)) == 1
    assert normalized("it's", ("its",)) == 1
    assert normalized("the red", ("red",)) == normalized("two", ("2",)) == 0
    assert normalized("", ("...",)) == 1


@pytest.mark.parametrize(("matches", "score"), [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1)])
def test_vqa_counts_people(matches: int, score: float) -> None:
    said = ["yes"] * matches + ["no"] * (10 - matches)
    assert vqa("Yes", said) == pytest.approx(score)


def test_vqa_leaves_one_out() -> None:
    """Four people, two of whom agree: three of the four subsets of three hold 1, 1, 2, 2."""
    assert vqa("red", ["red", "red", "blue", "green"]) == pytest.approx((1 + 1 + 2 + 2) / 3 / 4)


@pytest.mark.parametrize(
    ("said", "compared"),
    [
        ("The Red, car?", "red car"),
        ("two dogs", "2 dogs"),
        ("None", "0"),
        ("dont know", "don't know"),
        ("dog's", "dog 's"),
        ("3.5 m.", "3.5 m"),
        ("10,000", "10000"),
        ("black/white", "black white"),  # within words, punctuation parts them
        ("black/ white", "black white"),
        ("yes!", "yes"),
        ("left\nhand\tside", "left hand side"),
        ("an apple a day", "apple day"),
        ("well", "well"),
        ("shouldntve", "shouldntve"),  # one of its apostrophes must be there
        ("shouldn'tve", "shouldn't've"),
        ("shouldnt've", "shouldn't've"),
        ("yall'd've", "y'all'd've"),
        ("y'all'dve", "y'all'd've"),
        ("thered", "there'd"),
        ("lets see", "lets see"),  # the table has neither this one nor the next
        ("Im", "im"),
    ],
)
def test_vqa_compares(said: str, compared: str) -> None:
    assert clean(said) == compared


def test_vqa_needs_people() -> None:
    with pytest.raises(ValueError, match=r"at least 4 answers .* got 1 \(\['red'\]\). Set metric="):
        vqa("red", ["red"])


def test_names() -> None:
    assert {build_metric(name) for name in METRICS} == {exact, normalized, vqa}
    with pytest.raises(KeyError, match=r"expected one of \['exact', .*Did you mean 'vqa'"):
        build_metric("vqav2")
