"""How a figure is kept: as bytes that depend on it alone, and as text inside the page.

Nothing global of Matplotlib changes.
"""

from __future__ import annotations

import base64
import io
import warnings
from collections.abc import Mapping
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

from tokenprune.report.looks import THEME, Look


def style() -> dict[Any, Any]:
    """Matplotlib's settings for everything that is drawn or saved."""
    return {
        "font.family": "DejaVu Sans",
        "svg.fonttype": "none",
        "svg.hashsalt": "tokenprune",
        "path.simplify": False,
    }


def save(figure: Figure, format: str) -> bytes:
    """The figure as bytes that depend on the figure alone: no date, no random identifiers."""
    metadata: dict[str, Any] = {"Date": None} if format == "svg" else {"Software": None}
    stream = io.BytesIO()
    with mpl.rc_context(style()), warnings.catch_warnings():
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


def data_uri(kind: str, data: bytes) -> str:
    """A picture as text that a page can hold."""
    return f"data:{kind};base64,{base64.b64encode(data).decode('ascii')}"


def clip(text: str, length: int) -> str:
    """`text`, cut off where it is longer."""
    return text if len(text) <= length else text[: length - 1] + "…"


def plain(text: str) -> str:
    """`text` as itself: no mathematics between dollars, nothing XML cannot hold."""
    printable = "".join(c if c.isprintable() or c == "\n" else " " for c in text)
    # Matplotlib leaves labels with a leading underscore out of legends.
    return printable.replace("$", r"\$") if not printable.startswith("_") else " " + printable
