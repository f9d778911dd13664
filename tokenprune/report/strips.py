"""What strategies keep of an image as a figure: a strip of its stages per strategy."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import Any

import matplotlib as mpl
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from tokenprune.report.canvas import clip, plain, style
from tokenprune.report.looks import INK, SOFT, SURFACE


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
    with mpl.rc_context(style()):
        figure = Figure(figsize=(2.6 + (side + gap) * columns, height), facecolor=SURFACE)
        FigureCanvasAgg(figure)
        halves: Any = figure.subfigures(1, 2, width_ratios=[2.6, (side + gap) * columns])
        left, right = halves
        axes = left.add_axes((0.08, 1 - (head + tall) / height, 2.1 / 2.6, tall / height))
        axes.imshow(whole)
        axes.set_anchor("NW")
        axes.set_axis_off()
        caption = textwrap.fill(clip(question, 240), 34) + f"\n{textwrap.fill(clip(note, 120), 40)}"
        below = 1 - (head + 0.1 + tall) / height
        left.text(0.08, below, plain(caption), color=INK, size=9, va="top", linespacing=1.5)
        grid = right.subplots(len(rows), columns, squeeze=False)
        for line, (label, pictures) in zip(grid, rows, strict=True):
            for cell in line:
                cell.set_axis_off()
            line[0].annotate(
                plain(clip(label, 19 * columns)),
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
                cell.set_title(plain(title), size=8, color=SOFT, loc="left", pad=3)
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
