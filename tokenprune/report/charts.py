"""Accuracy against cost as figures, overall and per kind: panels, a legend, margins."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from tokenprune.report import curves
from tokenprune.report.canvas import clip, plain, style
from tokenprune.report.intervals import Interval
from tokenprune.report.looks import INK, SOFT, SURFACE, Look
from tokenprune.report.points import Axis, Point, Split, dashes, split
from tokenprune.runs.methods import DOWNSAMPLE, UNPRUNED


def accuracy_figure(
    points: Sequence[Point], axis: Axis, drawn: Mapping[str, Look], narrow: bool
) -> Figure:
    """Accuracy against cost: one panel per schedule family, one curve per strategy."""
    parts = panels, lone, unpruned = split(points)
    columns = 1 if narrow else min(len(panels), 2)
    figure, grid = _grid(len(panels), columns, 3.4 if narrow else 3.9, narrow)
    everything = [point.accuracy for point in points]
    for axes, title, inside in zip(grid, panels, panels.values(), strict=True):
        curves.draw_frame(axes, title)
        curves.set_limits(axes, axis, everything, inside + lone + unpruned)
        curves.draw_reference(axes, [(p.cost, p.accuracy) for p in unpruned])
        curves.draw_series(axes, [(p, p.accuracy) for p in inside], drawn, intervals=True)
        curves.draw_loners(axes, [(p, p.accuracy) for p in lone], drawn)
    _finish(figure, grid, axis.label, parts, drawn)
    return figure


def kinds_figure(
    points: Sequence[Point], axis: Axis, drawn: Mapping[str, Look], narrow: bool
) -> Figure:
    """One panel per question kind (columns) and schedule family (rows), on one vertical axis.

    On a narrow screen the kinds are rows and two families are columns.
    """
    parts = panels, lone, unpruned = split(points)
    kinds = list(dict.fromkeys(kind for point in points for kind in point.kinds))
    if narrow:
        cells = [(title, kind) for kind in kinds for title in panels]
        columns = 2
    else:
        cells = [(title, kind) for title in panels for kind in kinds]
        columns = next((n for n in (5, 4, 3) if len(kinds) % n == 0), min(len(kinds), 5))
    figure, grid = _grid(len(cells), columns, 2.4, narrow)
    everything = [interval for point in points for interval in point.kinds.values()]
    for axes, (title, kind) in zip(grid, cells, strict=True):
        inside = [point for point in panels[title] if kind in point.kinds]
        alone = [point for point in lone if kind in point.kinds]
        whole = [point for point in unpruned if kind in point.kinds]
        name = clip(kind, 18 if narrow else 22)
        curves.draw_frame(axes, f"{name}\n{title}" if len(panels) > 1 else name)
        curves.set_limits(
            axes, axis, [Interval(i.value) for i in everything], inside + alone + whole, small=True
        )
        curves.draw_reference(axes, [(p.cost, Interval(p.kinds[kind].value)) for p in whole])
        curves.draw_series(axes, [(p, p.kinds[kind]) for p in inside], drawn, intervals=False)
        curves.draw_loners(axes, [(p, Interval(p.kinds[kind].value)) for p in alone], drawn)
    _finish(figure, grid, axis.share_label, parts, drawn)
    return figure


def _grid(num_panels: int, columns: int, height: float, narrow: bool) -> tuple[Figure, list[Axes]]:
    """A figure with so many empty panels, each so many inches high."""
    columns = min(columns, max(1, num_panels))
    rows = math.ceil(num_panels / columns)
    # Narrow is for phones. A single wide panel would be too wide for its height.
    width = 4.2 if narrow else 11.2 if columns > 1 else 7.4
    with mpl.rc_context(style()):
        figure = Figure(figsize=(width, rows * height + 0.5), facecolor=SURFACE, layout=None)
        FigureCanvasAgg(figure)
        grid = figure.subplots(rows, columns, sharex=False, sharey=True, squeeze=False)
    cells = list(grid.flat)
    for empty in cells[num_panels:]:
        empty.set_visible(False)
    return figure, cells[:num_panels]


def _finish(
    figure: Figure,
    grid: Sequence[Axes],
    label: str,
    parts: Split,
    drawn: Mapping[str, Look],
) -> None:
    """Legend above, axis labels outside, margins in inches so that every size looks alike."""
    panels, lone, unpruned = parts
    two_lines = len(panels) > 1 and len(grid) > len(panels)
    inside = [point for panel in panels.values() for point in panel]
    handles: list[Any] = []
    labels: list[str] = []
    for name, dash in dashes(inside).items():
        look = drawn[next(point.strategy for point in inside if point.series == name)]
        line: Any = dash or ("--" if look.dashed else "-")
        handles.append(Line2D([], [], color=look.light, linestyle=line, **curves.marker(look, 6)))
        labels.append(plain(name))
    for point in (point for point in lone if point.strategy != DOWNSAMPLE):
        handles.append(Line2D([], [], **curves.hollow(drawn[point.strategy])))
        labels.append(plain(f"{point.series}, {point.panel}"))
    for point in [point for point in lone if point.strategy == DOWNSAMPLE][:1]:
        handles.append(Line2D([], [], **curves.hollow(drawn[point.strategy])))
        labels.append(DOWNSAMPLE)  # whose points the caption tells apart
    if unpruned:
        handles.append(Line2D([], [], color=INK, linestyle=":", linewidth=1, marker="*", ms=10))
        labels.append(UNPRUNED)
    width, height = (float(inches) for inches in figure.get_size_inches())
    longest = max(map(len, labels), default=0)
    across = max(1, min(len(handles), int(width // max(1.6, 0.5 + 0.085 * longest))))
    rows = -(-len(handles) // across)
    legend = 0.2 * rows + 0.2
    height += legend
    figure.set_size_inches(width, height)
    figure.legend(
        handles,
        labels,
        loc="upper left",
        bbox_to_anchor=(0.05 / width, 1 - 0.02 / height),
        ncols=across,
        frameon=False,
        fontsize=9.5,
        labelcolor=INK,
        handlelength=2.2,
        columnspacing=1.6,
        borderpad=0.2,
    )
    figure.subplots_adjust(
        left=0.68 / width,
        right=1 - 0.12 / width,
        top=1 - (legend + (0.5 if two_lines else 0.36)) / height,
        bottom=(0.75 if width > 6 else 0.9) / height,
        wspace=0.06 if width / len(grid) > 3 else 0.14,
        hspace=0.66 if two_lines else 0.45,
    )
    label = textwrap.fill(label, int(11 * width))
    figure.supxlabel(label, y=0.08 / height, size=9.5, color=SOFT, va="bottom")
    figure.supylabel("right answers", x=0.06 / width, size=9.5, color=SOFT)
