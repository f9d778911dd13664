"""Shares of right answers, from counts alone: an interval, and whether two of them differ.

Needs no other package.
"""

from __future__ import annotations

import math
from functools import lru_cache
from statistics import NormalDist

#: What is risked of calling chance a finding, in one table.
ALPHA = 0.05


def quantile(alpha: float) -> float:
    """How far out, either way, the normal distribution lies with chance `alpha`."""
    return -NormalDist().inv_cdf(alpha / 2)


Z95 = quantile(ALPHA)


def wilson(correct: float, total: int) -> tuple[float, float]:
    """95 % interval of a proportion (Wilson, 1927); never leaves [0, 1], sound at 0 and 1.

    Scores between 0 and 1 vary less than right and wrong do: of their mean it is no too narrow one.
    """
    if total == 0:
        return 0.0, 1.0
    share, z2 = correct / total, Z95**2
    centre = (share + z2 / (2 * total)) / (1 + z2 / total)
    half = Z95 * math.sqrt(share * (1 - share) / total + z2 / (4 * total**2)) / (1 + z2 / total)
    return max(0.0, centre - half), min(1.0, centre + half)


def paired_wald(wins: int, losses: int, total: int) -> tuple[float, float]:
    """Centre and half width of the 95 % interval of a difference of paired proportions.

    Bonett and Price, 2012 (Journal of Educational and Behavioral Statistics 37, 479-488): Wald's
    interval after a win and a loss were added, so that it is not of width zero where there are
    none. tests/runs/test_proportions.py computes how often it holds the truth.

    Args:
        wins: Questions that the first alone gets right.
        losses: Those that the second alone gets right.
        total: All questions, at least one.
    """
    number = total + 2
    centre = (wins - losses) / number
    variance = (wins + losses + 2) / number - centre**2
    return centre, Z95 * math.sqrt(variance / number)


@lru_cache(maxsize=4096)
def mcnemar(wins: int, losses: int) -> float:
    """McNemar's exact two-sided p: a fair coin for each question that one alone gets right.

    McNemar, 1947; twice the smaller tail of the binomial distribution, at most 1.
    """
    number, term, tail = wins + losses, 1, 0
    for k in range(min(wins, losses) + 1):
        tail += term
        term = term * (number - k) // (k + 1)
    return min(1.0, tail / 2 ** (number - 1) if number else 1.0)
