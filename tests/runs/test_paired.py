"""Paired comparisons: against slow ways to say the same, by hand, and how often they are wrong."""

from __future__ import annotations

from statistics import NormalDist

import numpy as np
import pytest

from tokenprune.runs.paired import bootstrap, compare, holm, verdict
from tokenprune.runs.proportions import mcnemar, paired_score


def soft(number: int, seed: int, shift: float = 0.0) -> np.ndarray:
    """Scores as VQA's metric gives them."""
    rng = np.random.default_rng(seed)
    return np.clip(rng.choice([0, 0.3, 0.6, 0.9, 1], (1, number)) + shift, 0, 1)


def test_right_and_wrong_answers_are_told_exactly() -> None:
    first = np.array([[1, 1, 1, 1, 1, 1, 1, 0, 0, 1.0]])
    second = np.array([[0, 0, 0, 0, 0, 0, 1, 1, 0, 1.0]])
    found = compare(first, second)
    assert (found.wins, found.losses, found.num_questions) == (6, 1, 10)
    assert (found.first, found.second, found.value) == pytest.approx((0.8, 0.3, 0.5))
    assert (found.test, found.p) == ("mcnemar", mcnemar(6, 1))
    assert found.interval() == paired_score(6, 1, 10)
    assert found.interval(0.001) == paired_score(6, 1, 10, 0.001)
    other = compare(second, first)
    assert other.value == -found.value
    assert other.p == found.p
    assert other.interval() == pytest.approx([-end for end in found.interval()[::-1]])


def test_pairing_sees_what_two_intervals_do_not() -> None:
    """Questions differ more than methods: 8 wins without a loss, at 80 % and at 72 % right."""
    second = np.zeros((1, 100))
    second[0, :72] = 1
    first = second.copy()
    first[0, 72:80] = 1
    found = compare(first, second)
    assert found.p == 2 / 2**8
    assert found.interval()[0] > 0
    shuffled = np.random.default_rng(0).permutation(first[0])[None]  # the same shares, unpaired
    shuffled = compare(shuffled, second)
    assert shuffled.value == found.value
    assert shuffled.interval()[0] < 0


def test_the_bootstrap_draws_questions() -> None:
    """Against drawing them one by one, by another generator."""
    difference = (soft(200, 1, 0.1) - soft(200, 2))[0]
    made = np.concatenate([difference, (1, -1)])
    rng = np.random.default_rng(7)
    slow = np.array([made[rng.integers(0, len(made), len(made))].mean() for _ in range(20_000)])
    arms = bootstrap(np.round(difference, 12))
    error = made.std() / np.sqrt(len(made))
    assert arms.centre == pytest.approx(made.mean())
    assert arms.interval(0.05) == pytest.approx(np.quantile(slow, [0.025, 0.975]), abs=0.08 * error)


def test_scores_of_many_values() -> None:
    """As an edit distance gives: drawn by hundredths, which makes hardly a difference."""
    first, second = np.random.default_rng(3).random((2, 1, 1000))
    found = compare(first, second)
    error = (first - second).std() / np.sqrt(1000)
    low, high = found.interval()
    assert (found.value - low, high - found.value) == pytest.approx((1.96 * error,) * 2, rel=0.05)
    normal = 2 * NormalDist().cdf(-abs(found.value) / error)
    assert found.p == pytest.approx(normal, abs=0.02)


def test_seeds_are_averaged_question_by_question() -> None:
    """Three runs that agree tell as much as one; what differs between them is averaged."""
    rng = np.random.default_rng(4)
    one = (rng.random((1, 80)) < 0.7).astype(float)
    other = (rng.random((1, 80)) < 0.5).astype(float)
    assert compare(np.repeat(one, 3, 0), other) == compare(one, other)
    several = (rng.random((3, 80)) < 0.7).astype(float)
    found = compare(several, other)
    assert found.test == "permutation"
    assert found.value == pytest.approx((several.mean(0) - other[0]).mean())
    assert found.wins == (several.mean(0) > other[0]).sum()


def test_the_same_scores_give_the_same_numbers() -> None:
    assert compare(soft(50, 1), soft(50, 2)) == compare(soft(50, 1), soft(50, 2))


@pytest.mark.parametrize("scores", [np.ones((1, 12)), soft(12, 3)])
def test_few_questions_that_all_agree_show_little(scores: np.ndarray) -> None:
    found = compare(scores, scores)
    assert (found.value, found.p, found.wins, found.losses) == (0, 1, 0, 0)
    low, high = found.interval()
    assert low < 0 < high


def test_holm_by_hand() -> None:
    # 4 x .005, 3 x .01, 2 x .03 and 1 x .04, none smaller than one before it.
    found = holm([0.01, 0.04, 0.03, 0.005])
    assert [own.p for own in found] == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert [own.alpha for own in found] == pytest.approx([0.05 / 3, 0.05, 0.05 / 2, 0.05 / 4])
    assert holm([]) == []
    assert [own.p for own in holm([0.7, 0.6])] == [1.0, 1.0]


def test_nothing_is_called_real_whose_interval_holds_zero() -> None:
    """Over chance and over every family size, and the other way round where it is far from 0."""
    rng = np.random.default_rng(5)
    words = []
    for _ in range(60):
        share = rng.uniform(0.3, 0.9)
        first = (rng.random((1, 120)) < share).astype(float)
        second = (rng.random((1, 120)) < share - rng.choice([0, 0.1, 0.4])).astype(float)
        found = compare(first, second)
        for size in (1, 20, 400):
            corrected = holm([found.p] + [0.9] * (size - 1))[0]
            word = verdict(found, corrected)
            low, high = found.interval(corrected.alpha)
            words.append(word)
            assert (word == "open") or corrected.p <= 0.05
            assert (word == "open") or (low > 0) == (word == "better")
            assert (word == "open") or (high < 0) == (word == "worse")
    assert {"better", "open"} <= set(words)
    assert verdict(compare(np.zeros((1, 50)), np.ones((1, 50))), holm([0.0])[0]) == "worse"


def test_among_many_that_do_not_differ_hardly_any_is_called_real() -> None:
    """Families of 20 comparisons of coins with coins: at most one in twenty calls anything real."""
    rng = np.random.default_rng(2)
    false = 0
    for _ in range(100):
        reference = (rng.random((1, 200)) < 0.6).astype(float)
        family = [compare((rng.random((1, 200)) < 0.6).astype(float), reference) for _ in range(20)]
        corrected = holm([own.p for own in family])
        false += any(
            verdict(own, how) != "open" for own, how in zip(family, corrected, strict=True)
        )
    assert false <= 10
