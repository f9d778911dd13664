"""Scores of two methods on the same questions, compared question by question.

Questions differ far more from each other than two methods do on one of them: what is drawn and
tested here are differences per question, in which that cancels out. docs/statistics.md explains
each number. Nothing but numbers is known here.

Shape suffixes: Q questions, S runs (seeds), D draws, U values that occur.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tokenprune.runs.proportions import ALPHA, Z95, mcnemar, paired_wald, quantile

#: Of the bootstrap and of the permutation test: from one seed to another, an end of an interval
#: moves by two hundredths of a standard error.
DRAWS = 20_000
_SEED = 0
_DECIMALS = 12  # means of scores that are equal differ in their last bits
_MANY = 250  # values; beyond, drawing goes by hundredths: a hundredth of a standard error
_AT_ONCE = 2**22  # numbers in memory


@dataclass(frozen=True)
class Difference:
    """A method against another one, on the same questions.

    Attributes:
        num_questions: How many.
        first: Mean score of the method.
        second: Mean score of the other.
        wins: Questions on which the method scores more.
        losses: Those on which it scores less.
        test: What gave `p`: `"mcnemar"`, exact, or `"permutation"`.
        p: Two-sided, of this comparison alone.
    """

    num_questions: int
    first: float
    second: float
    wins: int
    losses: int
    test: str
    p: float
    _centre: float
    _arms: tuple[float, float]

    @property
    def value(self) -> float:
        return self.first - self.second

    def interval(self, alpha: float = ALPHA) -> tuple[float, float]:
        """The interval of the difference that is wrong with chance `alpha`.

        Other levels than 95 % have its arms, longer or shorter as the normal distribution says:
        draws tell nothing of tails that they hardly ever reach.
        """
        down, up = (arm * quantile(alpha) / Z95 for arm in self._arms)
        return max(-1.0, self._centre - down), min(1.0, self._centre + up)


@dataclass(frozen=True)
class Corrected:
    """One of several comparisons, after Holm's correction (Holm, 1979).

    Attributes:
        p: The smallest level for the whole family at which this difference is called real.
        alpha: The level at which the procedure tests it for `ALPHA` in all.
    """

    p: float
    alpha: float


def compare(first_SQ: ArrayLike, second_SQ: ArrayLike) -> Difference:
    """Compares two methods by their scores between 0 and 1.

    A question's score is its mean over seeds. What a seed decides here, it decides for each
    question by itself (docs/statistics.md), so seeds are no clusters: their chance is part of what
    differs from question to question, which the interval covers.

    Args:
        first_SQ: Scores of the method, a row per run.
        second_SQ: Those of the other, on the same questions in the same order.
    """
    first_Q, second_Q = (np.asarray(own, float).mean(0) for own in (first_SQ, second_SQ))
    difference_Q = np.round(first_Q - second_Q, _DECIMALS)
    wins, losses = int((difference_Q > 0).sum()), int((difference_Q < 0).sum())
    if np.isin(difference_Q, (-1, 0, 1)).all():
        test, p = "mcnemar", mcnemar(wins, losses)
        centre, half = paired_wald(wins, losses, len(difference_Q))
        arms = (half, half)
    else:
        test, p = "permutation", permutation(difference_Q)
        centre, arms = bootstrap(difference_Q)
    return Difference(
        num_questions=len(difference_Q),
        first=float(first_Q.mean()),
        second=float(second_Q.mean()),
        wins=wins,
        losses=losses,
        test=test,
        p=p,
        _centre=centre,
        _arms=arms,
    )


def bootstrap(difference_Q: NDArray[np.float64]) -> tuple[float, tuple[float, float]]:
    """Centre of the mean difference, and how far down and up its 95 % interval reaches.

    Questions are drawn with replacement (Efron, 1979; percentiles). As in `paired_wald`, a win and
    a loss are added. A draw is decided by how often each value occurs in it, so those counts are
    drawn, which gives the same and takes less than drawing question after question.
    """
    made_Q = np.concatenate([difference_Q, (1.0, -1.0)])
    value_U, count_U = _values(made_Q)
    number = len(made_Q)

    def means(rng: np.random.Generator, draws: int) -> NDArray[np.float64]:
        return rng.multinomial(number, count_U / number, size=draws) @ value_U / number

    low, high = np.quantile(_draw(means, len(value_U)), [ALPHA / 2, 1 - ALPHA / 2])
    centre = float(made_Q.mean())
    return centre, (centre - float(low), float(high) - centre)


def permutation(difference_Q: NDArray[np.float64]) -> float:
    """Two-sided p of the mean difference, were each question's sign a fair coin.

    Fisher, 1935; drawn, and so counted that p is never 0 (Phipson and Smyth, 2010). With
    differences of -1, 0 and 1 it is McNemar's test.
    """
    value_U, count_U = _values(np.abs(difference_Q))
    seen = abs(float(difference_Q.sum()))

    def sums(rng: np.random.Generator, draws: int) -> NDArray[np.float64]:
        heads_DU = rng.binomial(count_U, 0.5, size=(draws, len(count_U)))
        return np.asarray((2 * heads_DU - count_U) @ value_U)

    as_far = np.abs(_draw(sums, len(value_U))) >= seen - 10.0**-9
    return float(1 + as_far.sum()) / (1 + DRAWS)


def _values(difference_Q: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """The values that occur, and how often."""
    values, counts = np.unique(difference_Q, return_counts=True)
    if len(values) > _MANY:
        values, counts = np.unique(np.round(difference_Q, 2), return_counts=True)
    return values, counts


def _draw(
    draws_of: Callable[[np.random.Generator, int], NDArray[np.float64]], width: int
) -> NDArray[np.float64]:
    """`DRAWS` of something, so many at once as fit into memory; the same whenever it is asked."""
    rng = np.random.default_rng(_SEED)
    step = max(1, _AT_ONCE // width)
    parts = [draws_of(rng, min(step, DRAWS - done)) for done in range(0, DRAWS, step)]
    return np.concatenate(parts)


def holm(ps: Sequence[float]) -> list[Corrected]:
    """The comparisons of a family after Holm's step-down correction, in their order.

    The chance of calling any difference real that is none is at most `ALPHA`, whatever depends on
    what: the smallest p is held against ALPHA / m, the next against ALPHA / (m - 1), and so on to
    the first that fails. Holm, 1979 (Scandinavian Journal of Statistics 6, 65-70).
    """
    found: dict[int, Corrected] = {}
    largest = 0.0
    for rank, place in enumerate(sorted(range(len(ps)), key=lambda place: ps[place])):
        left = len(ps) - rank
        largest = max(largest, min(1.0, left * ps[place]))
        found[place] = Corrected(largest, ALPHA / left)
    return [found[place] for place in range(len(ps))]


def verdict(difference: Difference, corrected: Corrected) -> str:
    """`better` or `worse` where the test says so and the interval does not hold 0; else `open`."""
    low, high = difference.interval(corrected.alpha)
    if corrected.p > ALPHA or low <= 0 <= high:
        return "open"
    return "better" if low > 0 else "worse"
