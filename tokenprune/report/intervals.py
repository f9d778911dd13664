"""A share of right answers with its 95 % interval, over questions and over seeds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from tokenprune.runs.proportions import student


@dataclass(frozen=True)
class Interval:
    """A share of right answers with its 95 % interval, where one is known."""

    value: float
    low: float | None = None
    high: float | None = None


def mean_interval(
    values: Sequence[tuple[float | None, float | None, float | None]],
) -> Interval | None:
    """The mean of (value, low, high) over seeds with its interval; None where no seed has a value.

    The seeds ask about the same questions, so the interval over questions does not shrink with
    their number: it is the mean of the runs' own intervals, widened in quadrature by the 95 %
    interval (Student's t) of the mean over seeds.
    """
    present = [(value, low, high) for value, low, high in values if value is not None]
    if not present:
        return None
    mean = statistics.fmean(value for value, _, _ in present)
    number = len(present)
    seeds = 0.0
    if number > 1:
        spread = statistics.stdev(value for value, _, _ in present)
        seeds = student(number - 1) * spread / math.sqrt(number)
    downs = [value - low for value, low, _ in present if low is not None]
    ups = [high - value for value, _, high in present if high is not None]
    if len(downs) < number or len(ups) < number:
        return Interval(mean)
    down = math.hypot(statistics.fmean(downs), seeds)
    up = math.hypot(statistics.fmean(ups), seeds)
    return Interval(mean, max(0.0, mean - down), min(1.0, mean + up))


def apart(best: Interval, second: Interval) -> bool | None:
    """Whether the 95 % intervals are disjoint; None where one is unknown."""
    if best.low is None or second.high is None:
        return None
    return best.low > second.high
