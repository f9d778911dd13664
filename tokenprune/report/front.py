"""The page's Pareto front: methods that no other beats in accuracy and in cost at once."""

from __future__ import annotations

from collections.abc import Sequence

from tokenprune.report.groups import Group, cost_column, settings_of
from tokenprune.report.tables import Cell, Head, Table
from tokenprune.report.words import budget_words, flops_unit, percent, short

_MEANINGS = {
    "method": "The strategy; means over its seeds.",
    "budget": "The schedule and its budget.",
    "accuracy (%)": "Mean accuracy, with its 95 % interval.",
    "cost": "FLOPs of the visual tokens in the decoder (multiply-adds, as PyramidDrop counts), or "
    "tokens where a run has no FLOPs.",
    "share (%)": "Of the unpruned model's FLOPs.",
}


def front(groups: Sequence[Group]) -> list[Group]:
    """Those that no other beats: in one of accuracy and cost, without losing in the other.

    Cheapest first. The best of one setting say nothing of another's, so each has its own.
    """
    found = []
    for setting in settings_of(groups):
        inside = [group for group in groups if group.setting == setting]
        column = cost_column(inside)
        best = float("-inf")
        costs = [(group.mean(column) if column else None, group) for group in inside]
        placed = [(cost, group) for cost, group in costs if cost is not None]
        for _, group in sorted(placed, key=lambda own: (own[0], -own[1].accuracy.value)):
            if group.accuracy.value > best:
                best = group.accuracy.value
                found.append(group)
    return found


def front_table(groups: Sequence[Group]) -> Table | None:
    """The front as a table; None where there is hardly a choice: fewer than three methods."""
    if len(groups) < 3 or not (best := front(groups)):
        return None
    column = cost_column(best)
    assert column is not None, "those on the front have a cost"
    factor, unit = flops_unit(group.mean(column) for group in best)
    factor, unit = (factor, unit) if column == "tflops" else (1.0, "tokens")
    several = len(settings_of(groups)) > 1

    def cells(group: Group) -> tuple[Cell, ...]:
        cost, share = group.mean(column), group.mean("tflops_ratio")
        return (
            Cell(group.series, group.series),
            Cell(words := budget_words(group.first), words),
            Cell(percent(group.accuracy), repr(group.accuracy.value)),
            Cell("–") if cost is None else Cell(short(repr(cost * factor)), repr(cost)),
            Cell("–") if share is None else Cell(f"{100 * share:.0f}", repr(share)),
            *([Cell(group.setting, group.setting)] if several else []),
        )

    headings = [unit if name == "cost" else name for name in _MEANINGS]
    heads = [
        Head(name, heading, name not in ("method", "budget"), False, said)
        for (name, said), heading in zip(_MEANINGS.items(), headings, strict=True)
    ]
    heads += [Head("setting", "setting", False, True, "Model, data and how.")] if several else []
    rows = tuple((group.first.strategy, cells(group)) for group in best)
    return Table(name="front", label="The Pareto front", heads=tuple(heads), rows=rows)
