"""Shares from counts: held against values computed by hand, by enumeration, and slowly."""

from __future__ import annotations

import math
from fractions import Fraction
from itertools import product

import numpy as np
import pytest

from tokenprune.runs.proportions import (
    Z95,
    mcnemar,
    paired_score,
    quantile,
    student,
    wilson,
)


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


def test_far_quantiles_of_student() -> None:
    # From any table: two-sided 99.9 %.
    table = {5: 6.8688, 29: 3.6594, 120: 3.3735, 1000: 3.3003}
    assert [student(own, 0.001) for own in table] == pytest.approx([*table.values()], abs=5e-5)
    for alpha in (0.05, 1e-3, 1e-5):  # closed form and expansion
        assert student(201, alpha) == pytest.approx(student(200, alpha), rel=2e-4)
        assert student(201, alpha) < student(200, alpha)


def test_the_paired_interval_by_hand() -> None:
    """At an end the corrected score is as far out as the quantile."""
    for wins, losses, total in ((20, 8, 478), (8, 20, 478), (6, 1, 10), (0, 0, 30), (40, 0, 50)):
        for alpha in (0.05, 0.0005):
            for sign, end in zip((-1, 1), paired_score(wins, losses, total, alpha), strict=True):
                if abs(end) == 1:
                    continue
                # The likeliest share of losses, were `end` the truth: it solves
                # 2n q² + ((2n - w + l) d - w - l) q - l d (1 - d) = 0.
                q = max(
                    np.roots(
                        (
                            2 * total,
                            (2 * total - wins + losses) * end - wins - losses,
                            -losses * end * (1 - end),
                        )
                    ).max(),
                    -end,
                )
                off = sign * (total * end - (wins - losses)) - 1
                error = math.sqrt(total * (2 * q + end * (1 - end)))
                assert off / error == pytest.approx(quantile(alpha), rel=1e-6)
    assert paired_score(0, 20, 100) == tuple(-end for end in paired_score(20, 0, 100)[::-1])
    low, high = paired_score(0, 0, 10)
    assert low < -0.2 < 0.2 < high  # ten questions do not show that two methods are the same
    assert paired_score(10, 0, 10)[1] == 1


@pytest.mark.parametrize("total", [20, 60, 480])
@pytest.mark.parametrize(
    ("win", "loss"),
    [
        *((0.01, 0.01), (0.02, 0.005), (0.05, 0.05), (0.1, 0.02), (0.3, 0.001)),
        *((0.45, 0.45), (0.7, 0.2)),
    ],
)
def test_the_interval_holds_the_truth_as_often_as_it_says(
    total: int, win: float, loss: float
) -> None:
    """Exactly, over all outcomes: wins and losses are multinomial. Whatever the level."""
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
    # The truth is in the interval where the score test does not refuse it.
    d = win - loss
    linear = (2 * total - wins + losses) * d - wins - losses
    q = np.sqrt(linear**2 + 8 * total * losses * d * (1 - d)) - linear
    q = np.maximum(q / (4 * total), max(0, -d))
    off = np.abs(wins - losses - total * d) - 1
    error = np.sqrt(total * (2 * q + d * (1 - d)))
    for alpha in (0.05, 0.005, 0.0005, 0.00005):
        inside = off <= quantile(alpha) * error
        for place in np.random.default_rng(0).integers(0, len(wins), 200):  # as the function says
            low, high = paired_score(int(wins[place]), int(losses[place]), total, alpha)
            assert (low - 1e-9 <= d <= high + 1e-9) == inside[place]
        assert chance[~inside].sum() <= alpha


def test_no_end_of_the_interval_is_nearer_than_the_exact_test_allows() -> None:
    """Where the interval leaves out 0, McNemar's exact test is at its level or hardly above it."""
    for wins, losses in product(range(0, 60, 3), repeat=2):
        for alpha in (0.05, 0.001, 0.00005):
            low, high = paired_score(wins, losses, 500, alpha)
            if low > 0 or high < 0:
                assert mcnemar(wins, losses) <= 1.1 * alpha
