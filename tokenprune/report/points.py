"""What the charts draw: a strategy at a budget, and in which panel it belongs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from tokenprune.report.intervals import Interval
from tokenprune.report.looks import order
from tokenprune.runs.methods import UNPRUNED


@dataclass(frozen=True)
class Point:
    """One strategy at one budget, averaged over seeds.

    Args:
        strategy: Registered name, or `UNPRUNED`.
        series: Name in the legend; runs of one series are joined.
        panel: Schedule family: what the series have in common.
        cost: Position on the horizontal axis, in units of `Axis`.
        accuracy: Over all questions.
        kinds: Accuracy per question kind.
    """

    strategy: str
    series: str
    panel: str
    cost: float | None
    accuracy: Interval
    kinds: Mapping[str, Interval] = field(default_factory=dict)


@dataclass(frozen=True)
class Axis:
    """The horizontal axis: what it counts, and the unpruned cost where it is known."""

    quantity: str
    unpruned: float | None = None

    @property
    def label(self) -> str:
        """For ticks that give the cost and, where it is known, its share."""
        return self.quantity + (", and their share of the unpruned model's" * bool(self.unpruned))

    @property
    def share_label(self) -> str:
        """For ticks that give the share alone, where it is known."""
        return f"{self.quantity}, share of the unpruned" if self.unpruned else self.quantity


class Split(NamedTuple):
    """Points with a cost, by where they are drawn.

    Attributes:
        panels: By schedule family; those of one have a panel to themselves.
        lone: Of families without a curve: in every panel.
        unpruned: The unpruned model's: in every panel.
    """

    panels: dict[str, list[Point]]
    lone: list[Point]
    unpruned: list[Point]


def split(points: Sequence[Point]) -> Split:
    """Where each point is drawn; a family in which no series has two budgets is no curve."""
    placed = [point for point in points if point.cost is not None]
    unpruned = [point for point in placed if point.strategy == UNPRUNED]
    families: dict[str, list[Point]] = {}
    for point in placed:
        if point.strategy != UNPRUNED:
            families.setdefault(point.panel, []).append(point)
    curves = {
        title: inside
        for title, inside in families.items()
        if len({point.cost for point in inside}) > 1
    }
    if not curves:
        return Split({"": [p for inside in families.values() for p in inside]}, [], unpruned)
    lone = [p for title, inside in families.items() if title not in curves for p in inside]
    return Split(curves, lone, unpruned)


def dashes(points: Sequence[Point]) -> dict[str, str]:
    """Series in drawing order; the second and third of one strategy get their own dashes."""
    result: dict[str, str] = {}
    for strategy in order([point.strategy for point in points]):
        names = sorted({point.series for point in points if point.strategy == strategy})
        for number, name in enumerate(names):
            result[name] = ("", "-.", ":")[min(number, 2)]
    return result
