"""Scores of two methods on the same questions, compared question by question.

Questions differ far more from each other than two methods do on one of them: what is drawn and
tested here are differences per question, in which that cancels out. docs/statistics.md explains
each number. Nothing but numbers is known here.

Shape suffixes: Q questions, S runs (seeds), D draws, U values that occur.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tokenprune.runs.images import added, shared, sums_by_image
from tokenprune.runs.proportions import ALPHA, Z95, mcnemar, paired_score, quantile, student
from tokenprune.runs.signs import sign_p

#: Of the bootstrap: from one seed to another, an end moves by two hundredths of a standard error.
DRAWS = 20_000
_SEED = 0
_DECIMALS = 12  # means of scores that are equal differ in their last bits
_MANY = 250  # values; beyond, drawing goes by hundredths: a hundredth of a standard error
_AT_ONCE = 2**22  # numbers in memory


@dataclass(frozen=True)
class Counts:
    """What an interval is made of where each question is won, lost or neither."""

    wins: int
    losses: int
    total: int

    def interval(self, alpha: float) -> tuple[float, float]:
        return paired_score(self.wins, self.losses, self.total, alpha)


@dataclass(frozen=True)
class Arms:
    """How far down and up from its centre a 95 % interval reaches.

    Other levels have its arms, longer or shorter as the normal distribution says: draws tell
    nothing of tails that they hardly ever reach.
    """

    centre: float
    down: float
    up: float

    def interval(self, alpha: float) -> tuple[float, float]:
        ratio = quantile(alpha) / Z95
        return self.centre - self.down * ratio, self.centre + self.up * ratio


@dataclass(frozen=True)
class Estimate:
    """A mean with its standard error, as so many degrees of freedom tell it."""

    mean: float
    error: float
    degrees: int

    def interval(self, alpha: float) -> tuple[float, float]:
        half = self.error * student(self.degrees, alpha)
        return self.mean - half, self.mean + half


@dataclass(frozen=True)
class Difference:
    """A method against another one, on the same questions.

    Attributes:
        num_questions: How many.
        first: Mean score of the method.
        second: Mean score of the other.
        wins: Questions on which the method scores more.
        losses: Those on which it scores less.
        num_images: About how many images, where one has several questions, else None.
        test: What gave `p`: `"mcnemar"` or `"permutation"`, both exact, or, where an image has
            several questions, `"permutation by image"`.
        p: Two-sided, of this comparison alone.
    """

    num_questions: int
    first: float
    second: float
    wins: int
    losses: int
    num_images: int | None
    test: str
    p: float
    _spread: Counts | Arms | Estimate

    @property
    def value(self) -> float:
        return self.first - self.second

    def interval(self, alpha: float = ALPHA) -> tuple[float, float]:
        """The interval of the difference that is wrong with chance `alpha`."""
        low, high = self._spread.interval(alpha)
        return max(-1.0, low), min(1.0, high)


@dataclass(frozen=True)
class Corrected:
    """One of several comparisons, after Holm's correction (Holm, 1979).

    Attributes:
        p: The smallest level for the whole family at which this difference is called real.
        alpha: The level at which the procedure tests it for `ALPHA` in all.
    """

    p: float
    alpha: float


def compare(
    first_SQ: ArrayLike, second_SQ: ArrayLike, pictures: Sequence[str | None] = ()
) -> Difference:
    """Compares two methods by their scores between 0 and 1.

    A question's score is its mean over seeds. What a seed decides here, it decides for each
    question by itself (docs/statistics.md), so seeds are no clusters: their chance is part of what
    differs from question to question, which the interval covers. Questions about one image are.

    Args:
        first_SQ: Scores of the method, a row per run.
        second_SQ: Those of the other, on the same questions in the same order.
        pictures: A mark of each question's image, see `images.shared`; empty where not known.
    """
    first_Q, second_Q = (np.asarray(own, float).mean(0) for own in (first_SQ, second_SQ))
    difference_Q = np.round(first_Q - second_Q, _DECIMALS)
    wins, losses = int((difference_Q > 0).sum()), int((difference_Q < 0).sum())
    num_images = None
    spread: Counts | Arms | Estimate
    if shared(pictures):
        sizes, sums = sums_by_image(difference_Q.tolist(), pictures)
        num_images = len(sizes)
        test, p = "permutation by image", sign_p(np.round(sums, _DECIMALS))
        spread = sandwich(sizes, sums)
    elif np.isin(difference_Q, (-1, 0, 1)).all():
        test, p = "mcnemar", mcnemar(wins, losses)
        spread = Counts(wins, losses, len(difference_Q))
    else:
        test, p = "permutation", sign_p(difference_Q)
        spread = bootstrap(difference_Q)
    return Difference(
        num_questions=len(difference_Q),
        first=float(first_Q.mean()),
        second=float(second_Q.mean()),
        wins=wins,
        losses=losses,
        num_images=num_images,
        test=test,
        p=p,
        _spread=spread,
    )


def sandwich(sizes: Sequence[int], sums: Sequence[float]) -> Estimate:
    """The mean of questions and its standard error, images drawn with all of their questions.

    The variance between images (Liang and Zeger, 1986), by Student's quantile for as many images as
    there are. One is added that is won as a whole, and one that is lost, as large as the one that
    a question is about on average: few images that agree do not show that all do.

    Args:
        sizes: Of each image the number of its questions.
        sums: And the sum of their differences.
    """
    more = added(sizes)
    size_I = np.array([*sizes, more, more])
    sum_I = np.array([*sums, more, -more])
    mean = float(sum_I.sum() / size_I.sum())
    spread = float(((sum_I - size_I * mean) ** 2).sum()) * len(size_I) / (len(size_I) - 1)
    return Estimate(mean, spread**0.5 / float(size_I.sum()), max(1, len(sizes) - 1))


def bootstrap(difference_Q: NDArray[np.float64]) -> Arms:
    """Centre of the mean difference, and how far down and up its 95 % interval reaches.

    Questions are drawn with replacement (Efron, 1979; percentiles). A win and a loss are added: a
    few questions that agree do not show that all do. A draw is decided by how often each value
    occurs in it, so those counts are drawn, which gives the same and takes less than drawing
    question after question. The same whenever it is asked.
    """
    made_Q = np.concatenate([difference_Q, (1.0, -1.0)])
    value_U, count_U = _values(made_Q)
    number, step = len(made_Q), max(1, _AT_ONCE // len(value_U))
    rng = np.random.default_rng(_SEED)
    means = [
        rng.multinomial(number, count_U / number, size=min(step, DRAWS - done)) @ value_U / number
        for done in range(0, DRAWS, step)
    ]
    low, high = np.quantile(np.concatenate(means), [ALPHA / 2, 1 - ALPHA / 2])
    centre = float(made_Q.mean())
    return Arms(centre, centre - float(low), float(high) - centre)


def _values(difference_Q: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """The values that occur, and how often."""
    values, counts = np.unique(difference_Q, return_counts=True)
    if len(values) > _MANY:
        values, counts = np.unique(np.round(difference_Q, 2), return_counts=True)
    return values, counts


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
