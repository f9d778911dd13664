"""The page's figures of accuracy against cost: drawn, saved, and told in words."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure

from tokenprune.report import canvas, charts
from tokenprune.report.columns import COLUMNS
from tokenprune.report.groups import Group, cost_column
from tokenprune.report.looks import Look
from tokenprune.report.points import Axis, Point, split
from tokenprune.report.words import family, flops_unit
from tokenprune.runs import results
from tokenprune.runs.methods import DOWNSAMPLE, UNPRUNED


@dataclass(frozen=True)
class Drawing:
    """A figure in the page, for wide and narrow screens; `width` is that of the wide one."""

    heading: str
    caption: str
    alt: str
    wide: str
    narrow: str
    width: int


def draw(
    folder: Path,
    groups: Sequence[Group],
    drawn: Mapping[str, Look],
    suffix: str,
    name: str,
    notes: list[str],
) -> list[Drawing]:
    """Accuracy against cost, overall and per kind, of runs that may be compared.

    Args:
        folder: Where the files go.
        groups: All of one setting.
        drawn: The look of each strategy.
        suffix: Of the files' names, where another setting has figures as well.
        name: Of the setting in headings, where there are several.
        notes: Gets a sentence for each thing that is missing.
    """
    column = cost_column(groups)
    if column is None:
        notes.append(
            f"No curves{name}: no run has tflops, avg_tokens or final_tokens, so there is no cost "
            "to draw accuracy against."
        )
        return []
    axis, factor = _axis(groups, column)
    points = [
        Point(
            strategy=group.first.strategy,
            series=group.series,
            panel=family(group.first, [other.first for other in groups]),
            cost=cost * factor,
            accuracy=group.accuracy,
            kinds=group.kinds,
        )
        for group in groups
        if (cost := group.mean(column)) is not None
    ]
    strategies = {point.strategy for point in points}
    if UNPRUNED not in strategies:
        notes.append(f"No unpruned run{name}: the reference line is missing from the curves.")
    if "random" not in strategies:
        notes.append(f"No run of random{name}: the baseline is missing from the curves.")

    seeds = max(group.num_seeds for group in groups)
    bars = "Bars are 95 % intervals" + (
        f" over questions and up to {seeds} seeds. " if seeds > 1 else " over the questions. "
    )
    star = "Star and dotted line: the unpruned model." if UNPRUNED in strategies else ""
    hollow = "Hollow marks are schedules with a single budget. " if split(points).lone else ""
    shares = [group.first.scale for group in groups if group.first.strategy == DOWNSAMPLE]
    small = (
        f"downsample: the unpruned model on pictures of {_percents(shares)} % of the pixels. "
        if shares
        else ""
    )
    caption = (
        f"{bars}Strategies at one budget cost the same; their points are drawn side by side. "
        f"{hollow}{small}{star}"
    )
    drawings = [
        _drawing(
            folder,
            f"accuracy{suffix}",
            f"Accuracy against cost{name}",
            caption,
            f"Line chart of right answers against {axis.quantity}. " + _spoken(points),
            drawn,
            lambda narrow: charts.accuracy_figure(points, axis, drawn, narrow),
        )
    ]
    kinds = list(dict.fromkeys(kind for point in points for kind in point.kinds))
    if kinds:
        halves = [
            (interval.high - interval.low) / 2
            for point in points
            for interval in point.kinds.values()
            if interval.low is not None and interval.high is not None
        ]
        spread = (
            f" A point is uncertain by about ± {100 * statistics.median(halves):.0f} percentage "
            "points (95 %)."
            if halves
            else ""
        )
        drawings.append(
            _drawing(
                folder,
                f"kinds{suffix}",
                f"Accuracy per question kind{name}",
                f"The same runs, question kind by question kind.{spread}",
                f"Small multiples of right answers against {axis.quantity} for the question kinds "
                + ", ".join(kinds)
                + ".",
                drawn,
                lambda narrow: charts.kinds_figure(points, axis, drawn, narrow),
            )
        )
    else:
        notes.append(f"No accuracy per question kind{name}: the runs do not report any.")
    return drawings


def _drawing(
    folder: Path,
    name: str,
    heading: str,
    caption: str,
    alt: str,
    drawn: Mapping[str, Look],
    draw: Callable[[bool], Figure],
) -> Drawing:
    """Writes PNG and SVG of a figure, and makes its two versions for the page."""
    figure = draw(False)
    svg = canvas.save(figure, "svg")
    results.write_bytes(folder / f"{name}.svg", svg)
    results.write_bytes(folder / f"{name}.png", canvas.save(figure, "png"))
    small = canvas.save(draw(True), "svg")
    large, narrow = (
        canvas.data_uri("image/svg+xml", canvas.themed(text.decode("utf-8"), drawn).encode("utf-8"))
        for text in (svg, small)
    )
    pixels = round(96 * float(figure.get_figwidth()))
    return Drawing(heading, caption, alt, large, narrow, pixels)


def _percents(shares: Sequence[float]) -> str:
    """Shares in words, the largest first: `50, 25 and 10`."""
    *first, last = (f"{100 * share:g}" for share in sorted(set(shares), reverse=True))
    return f"{', '.join(first)} and {last}" if first else last


def _spoken(points: Sequence[Point]) -> str:
    """The range of every series, for those who cannot see the curve."""
    parts = []
    for series in dict.fromkeys(point.series for point in points):
        values = [point.accuracy.value for point in points if point.series == series]
        low, high = 100 * min(values), 100 * max(values)
        between = f"{low:.1f} %" if len(values) == 1 else f"{low:.1f} % to {high:.1f} %"
        parts.append(f"{series}: {between}")
    return "; ".join(parts) + "."


def _axis(groups: Sequence[Group], column: str) -> tuple[Axis, float]:
    """The horizontal axis, and the factor from a column's unit to its own."""
    factor, quantity = 1.0, COLUMNS[column].heading
    if column == "tflops":
        factor, unit = flops_unit(group.mean(column) for group in groups)
        quantity = f"{unit} of the visual tokens per question"
    whole = next((g.mean(column) for g in groups if g.first.strategy == UNPRUNED), None)
    return Axis(quantity, whole and whole * factor), factor
