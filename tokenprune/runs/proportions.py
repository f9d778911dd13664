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
_MANY = 200  # degrees of freedom


@lru_cache(maxsize=4096)
def student(degrees: int, alpha: float = ALPHA) -> float:
    """How far out, either way, Student's t lies with chance `alpha`.

    By bisection of its closed form (Abramowitz & Stegun, 26.7.3 for odd degrees of freedom and
    26.7.4 for even ones); of many degrees by its expansion (26.7.5).
    """
    if degrees > _MANY:
        z = quantile(alpha)
        return (
            z
            + (z**3 + z) / (4 * degrees)
            + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * degrees**2)
            + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * degrees**3)
        )

    def inside(angle: float) -> float:
        odd = degrees % 2
        term = total = 0.0 if degrees == 1 else math.cos(angle) if odd else 1.0
        for k in range(2 + odd, degrees, 2):
            term *= (k - 1) / k * math.cos(angle) ** 2
            total += term
        share = math.sin(angle) * total
        return 2 / math.pi * (angle + share) if odd else share

    low, high = 0.0, math.pi / 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if inside(middle) < 1 - alpha else (low, middle)
    return math.sqrt(degrees) * math.tan(low)


def wilson(correct: float, total: float, z: float = Z95) -> tuple[float, float]:
    """95 % interval of a proportion (Wilson, 1927); never leaves [0, 1], sound at 0 and 1.

    Scores between 0 and 1 vary less than right and wrong do: of their mean it is no too narrow one.

    Args:
        correct: Sum of the scores.
        total: Of how many.
        z: The quantile, where another distribution's is wanted.
    """
    if total == 0:
        return 0.0, 1.0
    share, z2 = correct / total, z**2
    centre = (share + z2 / (2 * total)) / (1 + z2 / total)
    half = z * math.sqrt(share * (1 - share) / total + z2 / (4 * total**2)) / (1 + z2 / total)
    return max(0.0, centre - half), min(1.0, centre + half)


def paired_score(wins: int, losses: int, total: int, alpha: float = ALPHA) -> tuple[float, float]:
    """Interval of a difference of paired proportions, wrong with chance `alpha` at most up to ± .5.

    Tango, 1998 (Statistics in Medicine 17, 891-908): all differences d that the score test does not
    refuse, here with the continuity correction that McNemar's test has (Edwards, 1948):
    |wins - losses - n d| - 1 <= z sqrt(n (2 q + d (1 - d))), with q the likeliest share of losses
    were d the truth. tests/runs/test_proportions.py computes how often it holds the truth.

    Args:
        wins: Questions that the first alone gets right.
        losses: Those that the second alone gets right.
        total: All questions, at least one.
        alpha: The level.
    """
    low, high = (
        _furthest(*own, total, quantile(alpha)) for own in ((losses, wins), (wins, losses))
    )
    return -low, high


@lru_cache(maxsize=4096)
def _furthest(wins: int, losses: int, total: int, z: float) -> float:
    """The largest difference that is not refused."""

    def refused(d: float) -> bool:
        linear = (2 * total - wins + losses) * d - wins - losses
        root = math.sqrt(max(0.0, linear**2 + 8 * total * losses * d * (1 - d)))
        q = max(0.0, -d, (root - linear) / (4 * total))
        off = total * d - (wins - losses) - 1
        return off > z * math.sqrt(max(0.0, total * (2 * q + d * (1 - d))))

    low, high = (wins - losses) / total, 1.0
    if not refused(high):
        return high
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (low, middle) if refused(middle) else (middle, high)
    return low


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
