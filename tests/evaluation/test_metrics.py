"""Scores of answers, by cases."""

from __future__ import annotations

import pytest

from tokenprune.evaluation.metrics import (
    METRICS,
    anls,
    build_metric,
    choice,
    exact,
    normalise,
    normalized,
    relaxed,
    vqa,
)
from tokenprune.evaluation.metrics import vqa_normalise as clean
from tokenprune.evaluation.yes_no import mme_summary, pope_summary


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
    assert {build_metric(name) for name in METRICS} == set(METRICS.values())
    with pytest.raises(KeyError, match=r"expected one of \['anls', .*Did you mean 'vqa'"):
        build_metric("vqav2")


@pytest.mark.parametrize(
    ("said", "answers", "score"),
    [
        ("20 may  1990", ["20 May 1990"], 1),
        ("Smyth", ["Smith"], 0.8),
        ("abcxyz", ["yes", "abcdef"], 0.5),
        ("abwxyz", ["abcdef"], 0),
        ("nothing", ["total"], 0),
        ("kitten", ["sitting", "kittens"], 6 / 7),
        ("", ["x"], 0),
    ],
)
def test_anls(said: str, answers: list[str], score: float) -> None:
    assert anls(said, answers) == pytest.approx(score)


@pytest.mark.parametrize(
    ("said", "right", "score"),
    [
        ("104", "100", 1),
        ("105", "100", 1),
        ("106", "100", 0),
        ("-95", "-100", 1),
        ("0.12", "12%", 1),
        ("Blue", "blue ", 1),
        ("0.0", "0", 0),
        ("0", "0", 1),
        ("1e2", "100", 1),
        ("n/a", "100", 0),
    ],
)
def test_relaxed(said: str, right: str, score: float) -> None:
    assert relaxed(said, ["never", right]) == score


@pytest.mark.parametrize(
    ("said", "score"),
    [
        ("B", 1),
        (" b ", 1),
        ("(B)", 1),
        ("B. a red car", 1),
        ("B: red", 1),
        ("B, I think", 1),
        ("The answer is B", 1),
        ("A", 0),
        ("Bright", 0),
        ("", 0),
        ("a B", 0),
        ("ab", 0),
    ],
)
def test_choice(said: str, score: float) -> None:
    assert choice(said, ["B"]) == choice(said, ["C", "(B)"]) == score


def test_pope_counts_the_very_word() -> None:
    rows = [("yes", "yes", 1), ("Yes ", "yes", 1), ("yes", "no", 0), ("no", "yes", 0)]
    rows += [("no", "no", 1), ("No.", "no", 0)]
    assert [METRICS["pope"](own, [right]) for own, right, _ in rows] == [row[2] for row in rows]
    told = [{"prediction": own, "answer": right} for own, right, _ in rows]
    assert pope_summary(told) == pytest.approx(
        {"precision": 2 / 3, "recall": 2 / 3, "f1": 2 / 3, "yes": 1 / 2}
    )
    assert pope_summary([{"prediction": "no", "answer": "no"}])["f1"] == 0


def test_mme_counts_pairs() -> None:
    rows = [
        ("count", 1, "yes"),
        ("count", 1, "No."),
        ("count", 2, "Yes, it is"),
        ("count", 2, "yes"),
    ]
    rows += [("ocr", 3, "maybe"), ("ocr", 3, "n")]
    scores = [
        METRICS["mme"](own, [right])
        for (_, _, own), right in zip(rows, ["Yes", "No"] * 3, strict=True)
    ]
    assert scores == [1, 1, 1, 0, 0, 1]
    told = [
        {"kind": kind, "picture": picture, "score": score}
        for (kind, picture, _), score in zip(rows, scores, strict=True)
    ]
    # Of two images one pair is right, one half right; of one image half is.
    assert mme_summary(told) == {"count": 75 + 50, "ocr": 50, "total": 175, "unpaired": 0}
    assert mme_summary(told[:-1]) == {"count": 125, "total": 125, "unpaired": 1}
