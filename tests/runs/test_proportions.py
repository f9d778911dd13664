"""Shares from counts: held against values computed by hand, by enumeration, and slowly."""

from __future__ import annotations

import math
from fractions import Fraction
from itertools import product

import numpy as np
import pytest

from tokenprune.runs.proportions import Z95, mcnemar, paired_wald, quantile, wilson


@pytest.mark.parametrize(
    ("correct", "total", "low", "high"),
    # By hand: (p + z²/2n ± z sqrt(p(1-p)/n + z²/4n²)) / (1 + z²/n), z = 1.959964.
    [
        (0, 10, 0.0, 0.277533),
        (10, 10, 0.722467, 1.0),
        (5, 10, 0.236593, 0.763407),
        (450, 500, 0.870578, 0.923322),
    ],
)
def test_wilson_intervals(correct: int, total: int, low: float, high: float) -> None:
    assert wilson(correct, total) == pytest.approx((low, high), abs=1e-5)


def test_quantiles_of_the_normal_distribution() -> None:
    # From any table: two-sided 95, 99 and 99.9 %.
    assert pytest.approx(1.959964, abs=1e-6) == Z95
    assert quantile(0.01) == pytest.approx(2.575829, abs=1e-6)
    assert quantile(0.001) == pytest.approx(3.290527, abs=1e-6)


@pytest.mark.parametrize(
    ("wins", "losses", "p"),
    # By hand: 2 (1 + 28 + 378 + ...) / 2^28 and so on; nothing to tell apart, nothing told.
    [(0, 0, 1.0), (1, 0, 1.0), (5, 0, 2 / 32), (0, 6, 2 / 64), (3, 3, 1.0), (8, 2, 112 / 1024)],
)
def test_mcnemar_by_hand(wins: int, losses: int, p: float) -> None:
    assert mcnemar(wins, losses) == pytest.approx(p)


def test_mcnemar_counts_coins() -> None:
    """Against all ways in which coins may fall, one by one."""
    for wins, losses in product(range(5), repeat=2):
        number = wins + losses
        as_far = sum(
            abs(2 * sum(coins) - number) >= abs(wins - losses)
            for coins in product((0, 1), repeat=number)
        )
        assert mcnemar(wins, losses) == float(Fraction(as_far, 2**number))


def test_mcnemar_of_thousands_of_questions() -> None:
    # The normal approximation with continuity correction, which is good out here.
    z = (abs(5200 - 4800) - 1) / math.sqrt(10_000)
    assert mcnemar(5200, 4800) == pytest.approx(math.erfc(z / math.sqrt(2)), rel=0.01)
    assert mcnemar(4000, 0) < 1e-300


def test_paired_wald_by_hand() -> None:
    # 20 wins and 8 losses in 478 questions: 12/480 ± 1.959964 sqrt((30/480 - .025²) / 480).
    centre, half = paired_wald(20, 8, 478)
    assert centre == pytest.approx(0.025)
    assert half == pytest.approx(1.959964 * math.sqrt((0.0625 - 0.000625) / 480), rel=1e-6)
    assert paired_wald(0, 0, 10)[1] > 0  # ten questions do not show that two methods are the same


@pytest.mark.parametrize("total", [60, 480])
@pytest.mark.parametrize(
    ("win", "loss"), [(0.01, 0.01), (0.02, 0.005), (0.05, 0.05), (0.1, 0.02), (0.3, 0.001)]
)
def test_the_interval_holds_the_truth_as_often_as_it_says(
    total: int, win: float, loss: float
) -> None:
    """Exactly, over all outcomes: wins and losses are multinomial."""
    wins, losses = np.meshgrid(np.arange(total + 1), np.arange(total + 1), indexing="ij")
    possible = wins + losses <= total
    wins, losses = wins[possible], losses[possible]
    factorial = np.array([math.lgamma(k + 1) for k in range(total + 1)])
    rest = total - wins - losses
    chance = np.exp(
        factorial[total]
        - (factorial[wins] + factorial[losses] + factorial[rest])
        + (wins * math.log(win) + losses * math.log(loss) + rest * math.log(1 - win - loss))
    )
    assert chance.sum() == pytest.approx(1)
    number = total + 2
    centre = (wins - losses) / number
    half = Z95 * np.sqrt(((wins + losses + 2) / number - centre**2) / number)
    for place in (0, len(wins) // 3):  # the formula above is that of the function
        own = paired_wald(int(wins[place]), int(losses[place]), total)
        assert own == pytest.approx((centre[place], half[place]))
    assert chance[np.abs(centre - (win - loss)) <= half].sum() >= 0.948
