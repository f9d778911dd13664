"""The page's tables: all runs, and λ against stages."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tokenprune.report.columns import FILTERS, column
from tokenprune.report.groups import Group, settings_of
from tokenprune.report.looks import order
from tokenprune.report.words import family, flops_unit, percent, short
from tokenprune.runs.methods import Run


@dataclass(frozen=True)
class Cell:
    """A value in a table: the words shown, what it sorts by, and its tint in [0, 1]."""

    text: str
    value: str = ""
    note: str = ""
    tint: float = 0.0
    best: bool = False
    #: How it is set: `right`, `wrong`, or plain.
    tone: str = ""


@dataclass(frozen=True)
class Head:
    """A column's head in a table that can be sorted.

    Attributes:
        name: What it is called in its file.
        heading: What stands above it.
        numeric: Whether its values are numbers.
        filters: Whether rows can be chosen by it.
        meaning: What it is.
    """

    name: str
    heading: str
    numeric: bool
    filters: bool = False
    meaning: str = ""


@dataclass(frozen=True)
class Table:
    """A table that can be sorted and filtered.

    Attributes:
        name: Its id in the page.
        label: What it shows.
        heads: Its columns.
        rows: Each with the strategy whose mark stands in its first cell.
        constant: What is the same in every row, and therefore not shown in it.
    """

    name: str
    label: str
    heads: tuple[Head, ...]
    rows: tuple[tuple[str, tuple[Cell, ...]], ...]
    constant: tuple[tuple[str, Cell], ...] = ()


def matrix(groups: Sequence[Group], setting: str) -> dict[str, Any] | None:
    """λ against stages: a row per strategy, so that a column compares them at one budget."""
    inside = [
        group
        for group in groups
        if group.setting == setting
        and group.first.number("lam") is not None
        and group.first.number("num_stages") is not None
    ]
    among = [group.first for group in inside]

    def place(group: Group) -> tuple[float, str, float]:
        stages, lam = group.first.number("num_stages"), group.first.number("lam")
        assert stages is not None, "only runs with stages are in the matrix"
        assert lam is not None, "only runs with λ are in the matrix"
        words = family(group.first, among).removeprefix(f"{group.first.text('schedule')}, ")
        return stages, words, lam

    placed = [(place(group), group) for group in inside]
    keys = sorted({key for key, _ in placed})
    if len(keys) < 2:
        return None
    values = [group.accuracy.value for group in inside]
    low, width = min(values), (max(values) - min(values)) or 1.0
    series = {group.series: group.first.strategy for group in inside}
    rows = []
    for strategy in order(list(series.values())):
        for name in sorted(name for name in series if series[name] == strategy):
            cells = []
            for key in keys:
                at = [group for own, group in placed if own == key]
                one = next((group for group in at if group.series == name), None)
                if one is None:
                    cells.append(Cell("–"))
                    continue
                top = max(group.accuracy.value for group in at)
                cells.append(
                    Cell(
                        text=f"{100 * one.accuracy.value:.1f}",
                        value=repr(one.accuracy.value),
                        note=percent(one.accuracy),
                        tint=(one.accuracy.value - low) / width,
                        best=len(at) > 1 and one.accuracy.value == top,
                    )
                )
            rows.append((name, strategy, cells))
    shares = []
    for key in keys:
        ratios = [group.mean("tflops_ratio") for own, group in placed if own == key]
        known = [ratio for ratio in ratios if ratio is not None]
        shares.append(f"{100 * statistics.fmean(known):.0f}" if known else "–")
    heads = [words for _, words, _ in keys]
    return {
        "model": setting if len(settings_of(groups)) > 1 else "",
        "heads": [(head, heads.count(head)) for head in dict.fromkeys(heads)],
        "lams": [f"{lam:g}" for _, _, lam in keys],
        "shares": shares,
        "rows": rows,
    }


def table(columns: Sequence[str], runs: Sequence[Run]) -> Table:
    """All runs. What is the same in every run goes above the table, what no run has is left out."""
    used = [name for name in columns if any(run.text(name) for run in runs)]
    constant = [
        name for name in used if len({run.text(name) for run in runs}) == 1 and name != "accuracy"
    ]
    if len(runs) == 1:
        constant = []
    factor, unit = flops_unit(run.number("tflops") for run in runs)
    shown = [name for name in used if name not in constant]

    def cell(run: Run, name: str) -> Cell:
        text, number = run.text(name), run.number(name)
        style = column(name).style
        if number is None or style == "text":
            return Cell(text or "–", text)
        if style == "percent":
            return Cell(f"{100 * number:.1f}", text)
        return Cell(short(repr(number * factor if style == "flops" else number)), text)

    def heading(name: str) -> str:
        return unit if column(name).style == "flops" else column(name).heading

    heads = (
        Head(name, heading(name), column(name).style != "text", name in FILTERS, name)
        for name in shown
    )
    return Table(
        name="runs",
        label="All runs",
        heads=tuple(heads),
        rows=tuple((run.strategy, tuple(cell(run, name) for name in shown)) for run in runs),
        constant=tuple((heading(name), cell(runs[0], name)) for name in constant),
    )


def definitions(columns: Sequence[str]) -> list[tuple[str, str, str]]:
    """Each column's name in results.csv, its heading here, and what it means."""
    return [(name, column(name).heading, column(name).meaning) for name in columns]
