"""One panel of a chart: its frame and ticks, and the curves in it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator

from tokenprune.report.canvas import plain
from tokenprune.report.intervals import Interval
from tokenprune.report.looks import GRID, INK, SOFT, SURFACE, Look
from tokenprune.report.points import Axis, Point, dashes


def draw_frame(axes: Axes, title: str) -> None:
    """A panel without anything in it: title, grid, percent on the vertical axis.

    Args:
        axes: The panel.
        title: A second line is set small.
    """
    axes.set_facecolor(SURFACE)
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(SOFT)
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(length=0, labelcolor=SOFT, labelsize=8.5)
    axes.tick_params(axis="x", length=3, color=SOFT)
    head, _, rest = plain(title).partition("\n")
    axes.set_title(head, loc="left", size=10, color=INK, weight="bold", pad=8 if not rest else 20)
    if rest:
        axes.annotate(
            rest, (0, 1), (0, 6), "axes fraction", textcoords="offset points", color=SOFT, size=8.5
        )
    axes.yaxis.set_major_formatter(
        FuncFormatter(lambda value, _: f"{100 * value:.3g} %" if 0 <= value <= 1 else "")
    )
    axes.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))


def set_limits(
    axes: Axes,
    axis: Axis,
    intervals: Sequence[Interval],
    points: Sequence[Point],
    small: bool = False,
) -> None:
    """Both axes as wide as what is drawn, and ticks at round costs.

    Args:
        axes: The panel.
        axis: What the horizontal axis counts.
        intervals: All that the panels of a figure show, for they share their vertical axis.
        points: All that this panel shows.
        small: Few ticks, and shares alone.
    """
    lows = [i.value if i.low is None else i.low for i in intervals]
    highs = [i.value if i.high is None else i.high for i in intervals]
    # Never closer than ten points, or noise would fill the panel.
    spread = max(highs) - min(lows)
    pad = max(0.02, 0.05 * spread, 0.05 - spread / 2)
    axes.set_ylim(min(lows) - pad, max(highs) + pad)
    costs = [point.cost for point in points if point.cost is not None]
    width = (max(costs) - min(costs)) or max(costs) or 1.0
    low, high = min(costs) - 0.06 * width, max(costs) + 0.06 * width
    axes.set_xlim(low, high)
    # Round shares of the unpruned cost where it is known: they compare across models.
    unit = axis.unpruned / 100 if axis.unpruned else 1.0
    nice = MaxNLocator(3 if small else 6, steps=[1, 2, 2.5, 5, 10]).tick_values(
        low / unit, high / unit
    )
    ticks = [float(tick) for tick in nice if low <= tick * unit <= high]
    axes.xaxis.set_major_locator(FixedLocator([tick * unit for tick in ticks]))
    shares = [f"{tick:g} %" if axis.unpruned else f"{tick:g}" for tick in ticks]
    if axis.unpruned and not small:
        shares = [f"{t * unit:.3g}\n{share}" for t, share in zip(ticks, shares, strict=True)]
    axes.set_xticklabels(shares)


def draw_reference(axes: Axes, values: Sequence[tuple[float | None, Interval]]) -> None:
    """The unpruned model: a line across, and a star at its cost."""
    for cost, interval in values:
        axes.axhline(interval.value, color=INK, linewidth=1, linestyle=":", zorder=1)
        if cost is not None:
            _error_bar(axes, cost, interval, INK)
            axes.plot([cost], [interval.value], marker="*", markersize=11, color=INK, zorder=4)


def draw_series(
    axes: Axes,
    values: Sequence[tuple[Point, Interval]],
    drawn: Mapping[str, Look],
    *,
    intervals: bool,
) -> None:
    """A curve for each series.

    Args:
        axes: The panel, with its limits set.
        values: Points, and what each says here.
        drawn: The look of each strategy.
        intervals: Whether to draw them as bars.
    """
    names = dashes([point for point, _ in values])
    low, high = axes.get_xlim()
    # Every strategy costs the same at one budget: side by side, or a bar would hide the others.
    step = 0.007 * (high - low) if intervals else 0.0
    for number, (name, dash) in enumerate(names.items()):
        shift = step * (number - (len(names) - 1) / 2)
        line = [
            (_at(point) + shift, interval) for point, interval in values if point.series == name
        ]
        line.sort(key=lambda pair: pair[0])
        look = drawn[next(point.strategy for point, _ in values if point.series == name)]
        if intervals:
            for x, interval in line:
                _error_bar(axes, x, interval, look.light)
        axes.plot(
            [x for x, _ in line],
            [interval.value for _, interval in line],
            color=look.light,
            linestyle=dash or ("--" if look.dashed else "-"),
            linewidth=1.8,
            zorder=3,
            **marker(look, 6 if intervals else 4.5),
        )


def draw_loners(
    axes: Axes, values: Sequence[tuple[Point, Interval]], drawn: Mapping[str, Look]
) -> None:
    """A hollow mark for each point that belongs to no curve."""
    for point, interval in values:
        look = drawn[point.strategy]
        _error_bar(axes, _at(point), interval, look.light)
        axes.plot([_at(point)], [interval.value], zorder=4, **hollow(look))


def _error_bar(axes: Axes, x: float, interval: Interval, colour: str) -> None:
    if interval.low is not None and interval.high is not None:
        axes.plot([x, x], [interval.low, interval.high], color=colour, linewidth=1.2, alpha=0.75)


def marker(look: Look, size: float) -> dict[str, Any]:
    """How a point on a curve is drawn."""
    return {
        "marker": look.marker,
        # A triangle of the same box looks smaller than a disc.
        "markersize": size * (1.2 if look.marker in "v^" else 1.0),
        "markerfacecolor": look.light,
        "markeredgecolor": SURFACE,
        "markeredgewidth": 0.8,
    }


def hollow(look: Look) -> dict[str, Any]:
    """How a point without a curve is drawn."""
    return {
        "marker": look.marker,
        "markersize": 8,
        "markerfacecolor": SURFACE,
        "markeredgecolor": look.light,
        "markeredgewidth": 1.8,
        "linestyle": "",
    }


def _at(point: Point) -> float:
    assert point.cost is not None, "points without a cost are left out before drawing"
    return point.cost
