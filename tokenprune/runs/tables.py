"""Tables for people, with whole numbers wherever they go: a narrow terminal, a pipe, a file."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterable, Sequence

_WIDEST = 10_000


def print_table(
    title: str,
    texts: Sequence[str],
    numbers: Sequence[str],
    rows: Iterable[Sequence[str]],
) -> None:
    """Prints a table: as wide as the terminal, elsewhere as wide as it is.

    Args:
        title: Stands above; may be empty.
        texts: Headings of the first columns, whose cells wrap where the terminal is narrow.
        numbers: Headings of the others, whose cells never do, and stand on the right.
        rows: A cell for each column.
    """
    from rich import box
    from rich.console import Console
    from rich.markup import escape
    from rich.measure import Measurement
    from rich.table import Table

    table = Table(
        title=escape(title) or None, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1)
    )
    for name in texts:
        table.add_column(escape(name), overflow="fold")
    for name in numbers:
        table.add_column(escape(name), justify="right", no_wrap=True)
    for row in rows:
        table.add_row(*map(escape, row))
    console = Console(width=_WIDEST, height=_WIDEST)  # else rich asks COLUMNS, and cuts there
    whole = Measurement.get(console, console.options, table)
    console.width = whole.maximum
    if sys.stdout.isatty():
        console.width = max(whole.minimum, shutil.get_terminal_size().columns)
    console.print(table)
