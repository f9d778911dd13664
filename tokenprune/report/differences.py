"""The page's pictured questions on which methods differ, for two methods of the reader's choice."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tokenprune.report.groups import Group
from tokenprune.report.pictured import Pictured, SampleView
from tokenprune.report.words import budget_words
from tokenprune.runs.comparisons import scores_of

NUM_PICTURES = 24
# Of all methods at a schedule; beyond, a page of pictures would be too large to open.
NUM_METHODS = 24


@dataclass(frozen=True)
class Differences:
    """Questions that some methods get right and others do not.

    Attributes:
        budget: The schedule in words.
        names: What the methods are called.
        samples: The questions, each with a view per method: what it keeps after the last cut.
        num_pictured: Of how many pictured questions they were taken.
        wins: On how many of all questions the first method (row) scores more than the second
            (column), as JSON; empty where that is not known.
        num_questions: Of how many.
        chosen: Which two are shown first: the best, and `random` or the next.
    """

    budget: str
    names: tuple[str, ...]
    samples: tuple[SampleView, ...]
    num_pictured: int
    wins: str
    num_questions: int
    chosen: tuple[int, int]


def find(pictured: Pictured, notes: list[str]) -> Differences | None:
    """The pictured questions on which methods differ; None where there are none.

    Args:
        pictured: What there is to show.
        notes: Gets a sentence for each thing that is left out.
    """
    if len(pictured.members) > NUM_METHODS:
        notes.append(
            f"The questions on which methods differ are shown for {NUM_METHODS} of "
            f"{len(pictured.members)} methods at that schedule."
        )
        pictured = Pictured(pictured.members[:NUM_METHODS], pictured.whole)
    groups, records = pictured.groups, pictured.shared[:NUM_PICTURES]
    samples = []
    for record in records:
        outcomes = {pictured.answer(group, record).get("correct") for group in groups}
        if not {True, False} <= outcomes:
            continue
        try:
            samples.append(pictured.view(record, slice(-1, None))[0])
        except (OSError, ValueError) as error:
            if (note := f"No picture for question {record['id']}: {error}") not in notes:
                notes.append(note)
    if not samples:
        return None
    wins, number = _wins(groups)
    return Differences(
        budget=budget_words(pictured.first),
        names=tuple(group.series for group in groups),
        samples=tuple(samples),
        num_pictured=len(records),
        wins=json.dumps(wins, separators=(",", ":")),
        num_questions=number,
        chosen=_chosen(groups),
    )


def _wins(groups: Sequence[Group]) -> tuple[list[list[int]], int]:
    """On how many questions each scores more than each other one, and of how many."""
    found = [scores_of(group) for group in groups]
    known = [own for own in found if own is not None]
    if len(known) < len(found) or len({own.asked for own in known}) > 1:
        return [], 0
    means = np.round([own.scores_SQ.mean(0) for own in known], 12)
    return [[int((one > other).sum()) for other in means] for one in means], means.shape[1]


def _chosen(groups: Sequence[Group]) -> tuple[int, int]:
    places = sorted(range(len(groups)), key=lambda place: -groups[place].accuracy.value)
    best, *others = places
    random = [place for place in others if groups[place].first.strategy == "random"]
    return best, (random or others)[0]
