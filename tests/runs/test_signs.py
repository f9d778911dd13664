"""The test of signs: held against all ways in which coins may fall, one by one, and McNemar's."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from tokenprune.runs.paired import compare, holm, verdict
from tokenprune.runs.proportions import mcnemar
from tokenprune.runs.signs import sign_p


def one_by_one(parts: np.ndarray) -> float:
    sums = np.array(list(itertools.product((-1, 1), repeat=len(parts)))) @ parts
    return float((np.abs(sums) >= abs(parts.sum()) - 1e-9).mean())


@pytest.mark.parametrize("fraction", [1, 3, 10, 30])
def test_every_way_is_counted(fraction: int) -> None:
    """Of right and wrong answers, means of three seeds, tenths, and both."""
    rng = np.random.default_rng(fraction)
    for number in (1, 2, 7, 13):
        for shift in (0, 1):
            parts = rng.integers(-fraction, fraction + 1 + shift * fraction, number) / fraction
            assert sign_p(parts) == pytest.approx(one_by_one(parts), rel=1e-9)
            assert sign_p(-parts[::-1]) == sign_p(parts)


def test_scores_on_no_lattice() -> None:
    rng = np.random.default_rng(0)
    for _ in range(10):
        parts = rng.normal(0.4, 1, 12)
        assert sign_p(parts) == pytest.approx(one_by_one(parts), rel=0.02, abs=2 / 2**12)
    parts = rng.normal(0.03, 1, 3000)
    coins = np.array([(2 * rng.integers(0, 2, 3000) - 1) @ parts for _ in range(5000)])
    drawn = float((np.abs(coins) >= abs(parts.sum())).mean())
    assert sign_p(parts) == pytest.approx(drawn, abs=4 * (drawn / 5000) ** 0.5)


@pytest.mark.parametrize(
    ("wins", "losses"), [(0, 0), (1, 0), (3, 3), (14, 5), (300, 20), (5200, 4800), (500, 0)]
)
def test_of_right_and_wrong_answers_it_is_mcnemars(wins: int, losses: int) -> None:
    """At one in 10^150 as well."""
    parts = np.repeat([1.0, -1.0, 0.0], [wins, losses, 30])
    assert sign_p(parts) == pytest.approx(mcnemar(wins, losses), rel=1e-9)


def test_nothing_differs() -> None:
    assert sign_p(np.zeros(0)) == sign_p(np.zeros(5)) == sign_p(np.array([0.5, -0.5])) == 1


def test_a_difference_beyond_doubt_is_told_among_thousands() -> None:
    """Scores in between of .9 against .3 on 500 questions: no p has a floor."""
    for scores in ((0.9, 0.3), (0.9 / np.pi, 0.3 / np.pi)):
        first, second = (np.full((1, 500), own) for own in scores)
        first[0, :5], second[0, :5] = 0.15, 0.25
        found = compare(first, second)
        assert found.test == "permutation"
        assert found.p < 1e-100
        assert verdict(found, holm([found.p] + [0.5] * 5000)[0]) == "better"
