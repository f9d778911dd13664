"""comparisons.csv: each method against the unpruned model, `random` and the like, paired.

Only methods of one setting are compared (`methods.gather`: one model, data, metric, length of
answers), and only if their runs were asked the same questions.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import compress
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tokenprune.runs.answers import Answers, read_answers
from tokenprune.runs.methods import DOWNSAMPLE, UNPRUNED, Method
from tokenprune.runs.paired import Difference, compare, holm, verdict

TABLE = "comparisons.csv"
#: Columns that say what a method is, as results.csv has them.
METHOD = ("schedule", "lam", "num_stages", "layers", "keeps", "image_scale", "positions")
COLUMNS = (
    *("method", *METHOD, "num_seeds", "against", "against_method", "against_seeds"),
    *(
        "questions",
        "num_questions",
        "num_images",
        "accuracy",
        "against_accuracy",
        "difference",
        "ci_low",
        "ci_high",
    ),
    *("wins", "losses", "test", "p", "num_compared", "p_holm", "holm_low", "holm_high"),
    *("verdict", "model", "data", "run", "against_run"),
)
#: All questions together, where a run's accuracy is their mean.
ALL = "all"
_ROUNDED = 1e-4  # an accuracy in a table that somebody has rounded
#: What everything is compared with, where it is there: what a sweep is about first, then what
#: leaves as few tokens and looks at none.
FIRST = (UNPRUNED, "random")
ALWAYS = (*FIRST, DOWNSAMPLE, "pool")
_NUM_NAMED = 5


@dataclass(frozen=True)
class Scores:
    """Scores of a method's runs.

    Attributes:
        asked: See `Answers`, as are the kinds.
        scores_SQ: A row per run.
        pictures: A mark of each question's images; None where it is not known.
        parts: Which questions are taken together: all, or, where a run's accuracy is no mean over
            its questions (benchmarks of several tasks), those of each kind.
    """

    asked: str
    scores_SQ: NDArray[np.float64]
    pictures: Sequence[str | None]
    parts: Mapping[str, NDArray[np.bool_]]


@dataclass(frozen=True)
class Pair:
    """A method and what it is compared with, on all questions or a part of them."""

    method: Method
    against: str
    reference: Method
    questions: str
    difference: Difference


class Left:
    """What could not be compared, and why; told in few sentences, however many there are."""

    def __init__(self) -> None:
        self._names: dict[str, dict[str, None]] = {}

    def add(self, why: str, name: str) -> None:
        """Notes one of those that are left out for a reason."""
        self._names.setdefault(why, {})[name] = None

    def sentences(self) -> list[str]:
        """One for each reason, with the first few names."""
        told = []
        for why, names in self._names.items():
            first = ", ".join(list(names)[:_NUM_NAMED])
            more = f" and {len(names) - _NUM_NAMED} more" if len(names) > _NUM_NAMED else ""
            told.append(f"{why}: {first}{more}.")
        return told


def compare_methods(
    methods: Sequence[Method], baselines: Sequence[str] = ()
) -> tuple[list[dict[str, Any]], list[str]]:
    """Rows of comparisons.csv, and a sentence for each reason why some could not be compared.

    Holm's correction is over all methods of a setting that are compared with the same, on whatever
    questions.

    Args:
        methods: As `gather` makes them.
        baselines: Names of strategies or of runs to compare with besides `ALWAYS`; with one that
            is not there (`check_baselines`) nothing is.
    """
    rows: list[dict[str, Any]] = []
    left = Left()
    for setting in dict.fromkeys(method.setting for method in methods):
        inside = [method for method in methods if method.setting == setting]
        for against in dict.fromkeys((*ALWAYS, *baselines)):
            family = list(_family(inside, against, left, against in baselines))
            corrected = holm([pair.difference.p for pair in family])
            for pair, own in zip(family, corrected, strict=True):
                low, high = pair.difference.interval(own.alpha)
                rows.append(
                    _row(pair)
                    | {"num_compared": len(family), "p_holm": own.p}
                    | {"holm_low": low, "holm_high": high}
                    | {"verdict": verdict(pair.difference, own)}
                )
    return rows, left.sentences()


def check_baselines(methods: Sequence[Method], baselines: Sequence[str]) -> None:
    """Refuses names that are neither a strategy's nor a run's.

    Raises:
        ValueError: There is one; says which are known.
    """
    known = dict.fromkeys(name for method in methods for name in _names(method))
    runs = {run.text("run") for method in methods for run in method.runs}
    for name in baselines:
        if name not in known and name not in runs:
            raise ValueError(
                f"baseline: expected a strategy or a run of this sweep, got {name!r}. Name one of "
                f"{sorted(known)}, or a row's run in results.csv."
            )


def scores_of(method: Method) -> Scores | None:
    """The scores of its runs; None if unknown, or if they were asked different questions."""
    found = [read_answers(run.folder) for run in method.runs]
    known = [own for own in found if isinstance(own, Answers)]
    if len(known) < len(found) or len({own.asked for own in known}) > 1:
        return None
    scores_SQ = np.stack([own.scores_Q for own in known])
    kinds = np.array(known[0].kinds)
    parts = {str(kind): kinds == kind for kind in dict.fromkeys(known[0].kinds)}
    accuracy = method.mean("accuracy")
    if accuracy is not None and abs(scores_SQ.mean() - accuracy) < _ROUNDED:
        parts = {ALL: np.ones(len(kinds), bool)}
    marked = max((own.pictures for own in known), key=any)
    return Scores(known[0].asked, scores_SQ, marked, parts)


def pictures_of(several: Sequence[Scores]) -> Sequence[str | None]:
    """Marks of the questions' images, as any of those that were asked them has them."""
    return max((own.pictures for own in several), key=any)


def difference_of(method: Method, other: Method) -> Difference | None:
    """Two methods on all their questions; None where scores are unknown or questions differ."""
    first, second = scores_of(method), scores_of(other)
    if first is None or second is None or first.asked != second.asked:
        return None
    if ALL not in first.parts or ALL not in second.parts:
        return None
    return compare(first.scores_SQ, second.scores_SQ, pictures_of([first, second]))


def share_of(method: Method) -> float | None:
    """Share of the visual tokens that the method leaves a layer on average.

    Where a vision tower of one size makes as many tokens of a smaller picture as of a whole one,
    it is the share of the pixels: there is no more in them.
    """
    tokens, whole = method.mean("avg_tokens"), method.mean("num_visual")
    share = tokens / whole if tokens is not None and whole else None
    if method.first.strategy == DOWNSAMPLE and (share is None or share >= 1):
        return method.first.scale
    return share


def nearest_downsample(method: Method, methods: Sequence[Method]) -> Method | None:
    """The smaller picture whose share is nearest to the method's; None where there is none."""
    share = share_of(method)
    scaled = [
        (own, other)
        for other in methods
        if other.first.strategy == DOWNSAMPLE and (own := share_of(other)) is not None
    ]
    if share is None or not scaled:
        return None
    return min(scaled, key=lambda pair: (abs(pair[0] - share), pair[0]))[1]


def _family(inside: Sequence[Method], against: str, left: Left, asked: bool) -> Iterator[Pair]:
    """All comparisons of a setting's methods with one and the same.

    Args:
        inside: The methods.
        against: What they are compared with.
        left: Gets what cannot be.
        asked: Whether somebody has named it, and is to hear what it lacks.
    """
    known = asked and any(against in _names(other) for other in inside)
    for method in inside:
        references = _references(method, inside, against)
        missing = known and against not in _names(method) and not references
        if missing and method.first.text("layers"):
            left.add(f"Not compared with {against}, which has no run at their cuts", method.series)
        for reference in references:
            first, second = scores_of(method), scores_of(reference)
            for own, scores in ((method, first), (reference, second)):
                if scores is None:
                    left.add(
                        "Compared with nothing, for a run of theirs has no scores in "
                        "predictions.jsonl, or was asked other questions",
                        own.series,
                    )
            if first is None or second is None:
                continue
            if first.asked == second.asked:
                parts = min(first.parts, second.parts, key=lambda own: ALL in own)
                for name, part_Q in parts.items():
                    own_SQ, other_SQ = (o.scores_SQ[:, part_Q] for o in (first, second))
                    pictures = list(compress(pictures_of([first, second]), part_Q))
                    found = compare(own_SQ, other_SQ, pictures)
                    yield Pair(method, against, reference, name, found)
            else:
                both = f"{method.series} with {reference.series}"
                left.add("Not compared, for they were asked different questions", both)


def _references(method: Method, inside: Sequence[Method], against: str) -> list[Method]:
    """What a method is compared with under a name.

    Of a strategy its runs at the same cuts, of the same positions where there are both; of smaller
    pictures the nearest; a run whatever its budget.
    """
    if against in _names(method):
        return []
    whole = method.first.strategy == UNPRUNED
    if against == DOWNSAMPLE:
        nearest = None if whole else nearest_downsample(method, inside)
        return [] if nearest is None else [nearest]
    found = [other for other in inside if against in _names(other)]
    if not found:
        return [
            Method((run,), other.series, other.setting)
            for other in inside
            for run in other.runs
            if run.text("run") == against and other is not method
        ]
    if against != UNPRUNED:
        found = [other for other in found if other.first.cuts == method.first.cuts]
        found = [other for other in found if other.first.scale == method.first.scale]
    alike = [o for o in found if o.first.text("positions") == method.first.text("positions")]
    return alike or found


def _names(method: Method) -> tuple[str, ...]:
    """What a method's strategy may be called: with the fields that were changed, or without."""
    return method.first.strategy, method.first.bare


def _row(pair: Pair) -> dict[str, Any]:
    """A comparison before it is corrected."""
    method, reference, difference = pair.method, pair.reference, pair.difference
    low, high = difference.interval()
    return {
        "method": method.series,
        **{name: method.first.text(name) for name in METHOD},
        "num_seeds": method.num_seeds,
        "against": pair.against,
        "against_method": reference.series,
        "against_seeds": reference.num_seeds,
        "questions": pair.questions,
        "num_questions": difference.num_questions,
        "num_images": "" if difference.num_images is None else difference.num_images,
        "accuracy": difference.first,
        "against_accuracy": difference.second,
        "difference": difference.value,
        "ci_low": low,
        "ci_high": high,
        "wins": difference.wins,
        "losses": difference.losses,
        "test": difference.test,
        "p": difference.p,
        **{name: method.first.text(name) for name in ("model", "data", "run")},
        "against_run": reference.first.text("run"),
    }
