"""The report's curves, drawn with Matplotlib: accuracy against cost, overall and per kind.

Object-oriented API only, so nothing global changes; the same points give the same bytes.
"""

from __future__ import annotations

import io
import math
import textwrap
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator
from PIL import Image

from tokenprune.report.summary import UNPRUNED, Interval

# Print colours. In the page they are CSS variables with a second value for dark mode (`THEME`).
INK, SOFT, GRID, SURFACE = "#1c1c1a", "#5f5e5a", "#e4e3de", "#ffffff"


@dataclass(frozen=True)
class Look:
    """How a strategy is drawn in every figure: two colours, and a marker for print in grey."""

    light: str
    dark: str
    marker: str
    dashed: bool = False


# Okabe and Ito's colour-blind-safe hues, with lighter steps for dark surfaces.
LOOKS = {
    "pyramiddrop": Look("#0072b2", "#56b0ee", "o"),
    "fastv": Look("#d55e00", "#f58a3c", "s"),
    "uniform": Look("#00916a", "#2cc79b", "D"),
    "random": Look("#77766f", "#a9a8a0", "v", dashed=True),
}
FURTHER_LOOKS = (
    Look("#b0528b", "#df93c0", "^"),
    Look("#a87b00", "#e6b84a", "P"),
    Look("#2e93bb", "#7fd0f2", "X"),
    Look("#7d5a3c", "#c9a184", "p"),
    Look("#5b54b5", "#a7a1f0", "h"),
    Look("#8a2432", "#e27a88", "*"),
)
THEME = {INK: "#ecebe6", SOFT: "#a8a79f", GRID: "#373733", SURFACE: "#1a1a18"}


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


def order(strategies: Sequence[str]) -> list[str]:
    """Published methods first, the two baselines without instruction last; no repeats."""
    first, last = ("pyramiddrop", "fastv"), ("uniform", "random")
    names = sorted(set(strategies) - {UNPRUNED})
    middle = [name for name in names if name not in first + last]
    return [n for n in first if n in names] + middle + [n for n in last if n in names]


def looks(strategies: Sequence[str]) -> dict[str, Look]:
    """The look of each strategy: fixed for the shipped ones, further ones by their order."""
    further = [name for name in order(strategies) if name not in LOOKS]
    result = {name: LOOKS[name] for name in order(strategies) if name in LOOKS}
    for number, name in enumerate(further):
        result[name] = FURTHER_LOOKS[number % len(FURTHER_LOOKS)]
    return result


def accuracy_figure(
    points: Sequence[Point], axis: Axis, drawn: Mapping[str, Look], narrow: bool
) -> Figure:
    """Accuracy against cost: one panel per schedule family, one curve per strategy."""
    panels, lone, unpruned = split(points)
    columns = 1 if narrow else min(len(panels), 2)
    figure, grid = _canvas(len(panels), columns, 3.4 if narrow else 3.9, narrow)
    everything = [point.accuracy for point in points]
    for axes, title, inside in zip(grid, panels, panels.values(), strict=True):
        _frame(axes, title)
        _limits(axes, axis, everything, inside + lone + unpruned)
        _reference(axes, [(p.cost, p.accuracy) for p in unpruned])
        _curves(axes, [(p, p.accuracy) for p in inside], drawn, intervals=True)
        _loners(axes, [(p, p.accuracy) for p in lone], drawn)
    _finish(figure, grid, axis.label, points, drawn)
    return figure


def kinds_figure(
    points: Sequence[Point], axis: Axis, drawn: Mapping[str, Look], narrow: bool
) -> Figure:
    """One panel per question kind (columns) and schedule family (rows), on one vertical axis.

    On a narrow screen the kinds are rows and two families are columns.
    """
    panels, lone, unpruned = split(points)
    kinds = list(dict.fromkeys(kind for point in points for kind in point.kinds))
    if narrow:
        cells = [(title, kind) for kind in kinds for title in panels]
        columns = 2
    else:
        cells = [(title, kind) for title in panels for kind in kinds]
        columns = next((n for n in (5, 4, 3) if len(kinds) % n == 0), min(len(kinds), 5))
    figure, grid = _canvas(len(cells), columns, 2.4, narrow)
    everything = [interval for point in points for interval in point.kinds.values()]
    for axes, (title, kind) in zip(grid, cells, strict=True):
        inside = [point for point in panels[title] if kind in point.kinds]
        alone = [point for point in lone if kind in point.kinds]
        whole = [point for point in unpruned if kind in point.kinds]
        name = _clip(kind, 18 if narrow else 22)
        _frame(axes, f"{name}\n{title}" if len(panels) > 1 else name)
        _limits(
            axes, axis, [Interval(i.value) for i in everything], inside + alone + whole, small=True
        )
        _reference(axes, [(p.cost, Interval(p.kinds[kind].value)) for p in whole])
        _curves(axes, [(p, p.kinds[kind]) for p in inside], drawn, intervals=False)
        _loners(axes, [(p, Interval(p.kinds[kind].value)) for p in alone], drawn)
    _finish(figure, grid, axis.share_label, points, drawn)
    return figure


def split(
    points: Sequence[Point],
) -> tuple[dict[str, list[Point]], list[Point], list[Point]]:
    """Points with a cost as (panels by family, families without a curve, unpruned).

    A family in which no series has two budgets is no curve: its points go into every panel.
    """
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
        return {"": [p for inside in families.values() for p in inside]}, [], unpruned
    lone = [p for title, inside in families.items() if title not in curves for p in inside]
    return curves, lone, unpruned


def kept_figure(
    whole: Image.Image,
    rows: Sequence[tuple[str, Sequence[tuple[str, Image.Image]]]],
    question: str,
    note: str,
) -> Figure:
    """The full image at the left; a row of stage pictures per strategy.

    Args:
        whole: The image with all its tokens.
        rows: (row label, [(stage title, picture), ...]) per strategy.
        question: What was asked.
        note: The right answer.
    """
    columns = max(len(pictures) for _, pictures in rows)
    # In inches, so that words and pictures keep their sizes whatever the number of rows.
    side, gap, head, words = 1.5, 0.06, 0.55, 1.5
    aspect = max(p.height / p.width for _, pictures in rows for _, p in pictures)
    tall = 2.1 * whole.height / whole.width
    height = max(len(rows) * (side * aspect + head), head + tall + words) + 0.15
    with mpl.rc_context(_style()):
        figure = Figure(figsize=(2.6 + (side + gap) * columns, height), facecolor=SURFACE)
        FigureCanvasAgg(figure)
        halves: Any = figure.subfigures(1, 2, width_ratios=[2.6, (side + gap) * columns])
        left, right = halves
        axes = left.add_axes((0.08, 1 - (head + tall) / height, 2.1 / 2.6, tall / height))
        axes.imshow(whole)
        axes.set_anchor("NW")
        axes.set_axis_off()
        caption = (
            textwrap.fill(_clip(question, 240), 34) + f"\n{textwrap.fill(_clip(note, 120), 40)}"
        )
        below = 1 - (head + 0.1 + tall) / height
        left.text(0.08, below, _plain(caption), color=INK, size=9, va="top", linespacing=1.5)
        grid = right.subplots(len(rows), columns, squeeze=False)
        for line, (label, pictures) in zip(grid, rows, strict=True):
            for cell in line:
                cell.set_axis_off()
            line[0].annotate(
                _plain(_clip(label, 19 * columns)),
                (0, 1),
                (0, 18),
                "axes fraction",
                textcoords="offset points",
                color=INK,
                size=9,
                weight="bold",
            )
            for cell, (title, picture) in zip(line, pictures, strict=False):
                cell.imshow(picture)
                cell.set_title(_plain(title), size=8, color=SOFT, loc="left", pad=3)
        used = len(rows) * (side * aspect + head)
        right.subplots_adjust(
            left=0,
            right=1 - gap / ((side + gap) * columns),
            top=1 - head / height,
            bottom=1 - used / height,
            hspace=head / (side * aspect),
            wspace=gap / side,
        )
    return figure


def save(figure: Figure, format: str) -> bytes:
    """The figure as bytes that depend on the figure alone: no date, no random identifiers."""
    metadata: dict[str, Any] = {"Date": None} if format == "svg" else {"Software": None}
    stream = io.BytesIO()
    with mpl.rc_context(_style()), warnings.catch_warnings():
        # Kinds and names may be in a script that Matplotlib's own font lacks; browsers have it.
        warnings.filterwarnings("ignore", message=r"Glyph .* missing from font")
        figure.savefig(stream, format=format, dpi=160, metadata=metadata)
    return stream.getvalue()


def themed(svg: str, drawn: Mapping[str, Look]) -> str:
    """`svg` for the page: the system's font, and colours that follow light and dark mode."""
    pairs = dict(THEME)
    for look in drawn.values():
        pairs[look.light] = look.dark
    light, dark = [], []
    for number, (day, night) in enumerate(pairs.items()):
        svg = svg.replace(day, f"var(--c{number})")
        light.append(f"--c{number}:{day}")
        dark.append(f"--c{number}:{night}")
    style = (
        f"<style>svg{{{';'.join(light)}}}"
        f"@media (prefers-color-scheme:dark){{svg{{{';'.join(dark)}}}}}"
        "text{font-family:system-ui,-apple-system,'Segoe UI',Roboto,'Helvetica Neue',Arial,"
        "sans-serif!important}</style>"
    )
    head, tag, tail = svg.partition("<defs>")
    assert tag, "Matplotlib's SVG has a defs element"
    return f"{head}{style}{tag}{tail}"


def _style() -> dict[Any, Any]:
    return {
        "font.family": "DejaVu Sans",
        "svg.fonttype": "none",
        "svg.hashsalt": "tokenprune",
        "path.simplify": False,
    }


def _clip(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"


def _plain(text: str) -> str:
    """`text` as itself: no mathematics between dollars, nothing XML cannot hold."""
    printable = "".join(c if c.isprintable() or c == "\n" else " " for c in text)
    # Matplotlib leaves labels with a leading underscore out of legends.
    return printable.replace("$", r"\$") if not printable.startswith("_") else " " + printable


def _canvas(
    num_panels: int, columns: int, height: float, narrow: bool
) -> tuple[Figure, list[Axes]]:
    columns = min(columns, max(1, num_panels))
    rows = math.ceil(num_panels / columns)
    # Narrow is for phones. A single wide panel would be too wide for its height.
    width = 4.2 if narrow else 11.2 if columns > 1 else 7.4
    with mpl.rc_context(_style()):
        figure = Figure(figsize=(width, rows * height + 0.5), facecolor=SURFACE, layout=None)
        FigureCanvasAgg(figure)
        grid = figure.subplots(rows, columns, sharex=False, sharey=True, squeeze=False)
    cells = list(grid.flat)
    for empty in cells[num_panels:]:
        empty.set_visible(False)
    return figure, cells[:num_panels]


def _frame(axes: Axes, title: str) -> None:
    axes.set_facecolor(SURFACE)
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(SOFT)
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(length=0, labelcolor=SOFT, labelsize=8.5)
    axes.tick_params(axis="x", length=3, color=SOFT)
    head, _, rest = _plain(title).partition("\n")
    axes.set_title(head, loc="left", size=10, color=INK, weight="bold", pad=8 if not rest else 20)
    if rest:
        axes.annotate(
            rest, (0, 1), (0, 6), "axes fraction", textcoords="offset points", color=SOFT, size=8.5
        )
    axes.yaxis.set_major_formatter(
        FuncFormatter(lambda value, _: f"{100 * value:.3g} %" if 0 <= value <= 1 else "")
    )
    axes.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))


def _limits(
    axes: Axes,
    axis: Axis,
    intervals: Sequence[Interval],
    points: Sequence[Point],
    small: bool = False,
) -> None:
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


def _reference(axes: Axes, values: Sequence[tuple[float | None, Interval]]) -> None:
    for cost, interval in values:
        axes.axhline(interval.value, color=INK, linewidth=1, linestyle=":", zorder=1)
        if cost is not None:
            _error_bar(axes, cost, interval, INK)
            axes.plot([cost], [interval.value], marker="*", markersize=11, color=INK, zorder=4)


def _curves(
    axes: Axes,
    values: Sequence[tuple[Point, Interval]],
    drawn: Mapping[str, Look],
    *,
    intervals: bool,
) -> None:
    names = _series([point for point, _ in values])
    low, high = axes.get_xlim()
    # Every strategy costs the same at one budget: side by side, or a bar would hide the others.
    step = 0.007 * (high - low) if intervals else 0.0
    for number, (name, dashes) in enumerate(names.items()):
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
            linestyle=dashes or ("--" if look.dashed else "-"),
            linewidth=1.8,
            zorder=3,
            **_marker(look, 6 if intervals else 4.5),
        )


def _loners(
    axes: Axes, values: Sequence[tuple[Point, Interval]], drawn: Mapping[str, Look]
) -> None:
    for point, interval in values:
        look = drawn[point.strategy]
        _error_bar(axes, _at(point), interval, look.light)
        axes.plot([_at(point)], [interval.value], zorder=4, **_hollow(look))


def _error_bar(axes: Axes, x: float, interval: Interval, colour: str) -> None:
    if interval.low is not None and interval.high is not None:
        axes.plot([x, x], [interval.low, interval.high], color=colour, linewidth=1.2, alpha=0.75)


def _marker(look: Look, size: float) -> dict[str, Any]:
    return {
        "marker": look.marker,
        # A triangle of the same box looks smaller than a disc.
        "markersize": size * (1.2 if look.marker in "v^" else 1.0),
        "markerfacecolor": look.light,
        "markeredgecolor": SURFACE,
        "markeredgewidth": 0.8,
    }


def _hollow(look: Look) -> dict[str, Any]:
    return {
        "marker": look.marker,
        "markersize": 8,
        "markerfacecolor": SURFACE,
        "markeredgecolor": look.light,
        "markeredgewidth": 1.8,
        "linestyle": "",
    }


def _series(points: Sequence[Point]) -> dict[str, str]:
    """Series in drawing order; the second and third of one strategy get their own dashes."""
    result: dict[str, str] = {}
    for strategy in order([point.strategy for point in points]):
        names = sorted({point.series for point in points if point.strategy == strategy})
        for number, name in enumerate(names):
            result[name] = ("", "-.", ":")[min(number, 2)]
    return result


def _at(point: Point) -> float:
    assert point.cost is not None, "points without a cost are left out before drawing"
    return point.cost


def _finish(
    figure: Figure,
    grid: Sequence[Axes],
    label: str,
    points: Sequence[Point],
    drawn: Mapping[str, Look],
) -> None:
    """Legend above, axis labels outside, margins in inches so that every size looks alike."""
    panels, lone, unpruned = split(points)
    two_lines = len(panels) > 1 and len(grid) > len(panels)
    inside = [point for panel in panels.values() for point in panel]
    handles: list[Any] = []
    labels: list[str] = []
    for name, dashes in _series(inside).items():
        look = drawn[next(point.strategy for point in inside if point.series == name)]
        style: Any = dashes or ("--" if look.dashed else "-")
        handles.append(Line2D([], [], color=look.light, linestyle=style, **_marker(look, 6)))
        labels.append(_plain(name))
    for point in lone:
        handles.append(Line2D([], [], **_hollow(drawn[point.strategy])))
        labels.append(_plain(f"{point.series}, {point.panel}"))
    if unpruned:
        handles.append(Line2D([], [], color=INK, linestyle=":", linewidth=1, marker="*", ms=10))
        labels.append(UNPRUNED)
    width, height = (float(inches) for inches in figure.get_size_inches())
    across = max(1, min(len(handles), int(width // 1.6)))
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
