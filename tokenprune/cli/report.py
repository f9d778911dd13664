"""`tokenprune report`: a sweep as a page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tokenprune.cli.arguments import Parser


def main(arguments: Sequence[str]) -> int:
    """Runs the command; the exit code."""
    parser = Parser("tokenprune report", description="A sweep as a page.")
    parser.add_argument("folder", type=Path, help="a sweep's folder, such as outputs/ablation")
    folder = parser.parse_args(arguments).folder
    from tokenprune.report import page

    print(page.build(folder))
    return 0
