"""Scores of answers, by cases."""

from __future__ import annotations

from typing import Any

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
        ("", ["", "x"], 1),  # nothing is missing
        ("", [""], 1),
        ("x", [""], 0),
        ("gross", ["groß"], 0.6),  # letters of their own
        ("GROß", ["groß"], 1),
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


#: Answers, and the option that each names; None for none.
NAMED = {
    "B": "B",
    "B.": "B",
    "(B)": "B",
    "[B]": "B",
    "**B**": "B",
    "B. a red car": "B",
    "B) a red car": "B",
    "(B) a red car": "B",
    "B: red": "B",
    "B, I think": "B",
    "B - a car": "B",
    "B\nbecause": "B",
    "A\nbecause": "A",
    "B is correct": "B",
    "A is correct": "A",
    "B or C": "B",
    "Answer: B": "B",
    "**Answer:** B": "B",
    "Answer: A because it is red": "A",
    "The answer is B": "B",
    "The answer is: B": "B",
    'The answer is "B".': "B",
    "Option B": "B",
    "Option B is right": "B",
    "The correct option is (B).": "B",
    "The best choice would be option B, by far.": "B",
    "I choose B": "B",
    "So it is B.": "B",
    "a B": "B",
    "It must be (B), since it has wheels": "B",
    "(A) is red, (B) is blue": "B",
    "One sees that (A) is red, but (B) blue and right": "B",
    "": None,
    "car": None,
    "ab": None,
    "I think so": None,
    "The answer is a car": None,
}
#: Those of which lmms-eval says another thing.
OWN = {
    "b": "B",
    " b ": "B",
    "b.": "B",
    "(b)": "B",
    "Answer: b": "B",
    "The answer is (b).": "B",
    "The answer is B, because A is red.": "B",
    "A car": None,
    "Bright": None,
    "B's": None,
    "The answer is A car": None,
    "So do I": None,
}


@pytest.mark.parametrize(("said", "named"), [*NAMED.items(), *OWN.items()])
def test_choice(said: str, named: str | None) -> None:
    for letter in "ABC":
        assert choice(said, [letter]) == choice(said, ["D", f"({letter})"]) == (letter == named)


def test_choice_reads_what_lmms_eval_reads() -> None:
    extract = pytest.importorskip("lmms_eval.tasks._task_utils.mcq_extract").extract_mcq_answer
    for said, named in NAMED.items():
        assert extract(said, ["A", "B", "C", "D"]) == (named or ""), said
    differ = {said for said, named in OWN.items() if extract(said, [*"ABCD"]) != (named or "")}
    assert differ == OWN.keys() - {"So do I"}


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
        {"id": str(number), "kind": kind, "picture": picture, "score": score}
        for number, ((kind, picture, _), score) in enumerate(zip(rows, scores, strict=True))
    ]
    # Of two images one pair is right, one half right; of one image half is.
    sums = {"perception": 175}
    assert mme_summary(told) == {"count": 75 + 50, "ocr": 50, "unpaired": 0} | sums
    assert mme_summary(told[:-1]) == {"count": 125, "perception": 125, "unpaired": 1}


def asked(*rows: tuple[str, str, int, float]) -> list[dict[str, Any]]:
    return [dict(zip(("id", "kind", "picture", "score"), row, strict=True)) for row in rows]


def test_mme_s_parts_are_told_apart() -> None:
    told = asked(
        *[(str(n), "code_reasoning", 1, 1.0) for n in range(2)],
        *[(str(n), "color", 1, 1.0) for n in range(2, 4)],
        *[(str(n), "mine", 1, 1.0) for n in range(4, 6)],
    )
    kinds = {"code_reasoning": 200, "color": 200, "mine": 200}
    assert mme_summary(told) == kinds | {"perception": 200, "cognition": 200, "unpaired": 0}


def test_mme_s_pairs_may_have_equal_pictures() -> None:
    by_order = asked(("0", "k", 1, 1), ("1", "k", 1, 1), ("2", "k", 1, 0), ("3", "k", 1, 0))
    assert mme_summary(by_order) == {"k": 100, "unpaired": 0}
    assert mme_summary(by_order[:3]) == {"k": 200, "unpaired": 1}
    by_id = asked(("a", "k", 1, 1), ("b", "k", 1, 0), ("b#2", "k", 1, 0), ("a#2", "k", 2, 1))
    assert mme_summary(by_id) == {"k": 100, "unpaired": 0}
