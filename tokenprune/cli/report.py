"""`tokenprune report`: a sweep as a page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tokenprune.cli.arguments import Parser, add_baseline, add_config_dir


def main(arguments: Sequence[str]) -> int:
    """Runs the command; the exit code."""
    parser = Parser("tokenprune report", description="A sweep as a page.")
    parser.add_argument("folder", type=Path, help="a sweep's folder, such as outputs/ablation")
    add_config_dir(parser)  # a results.csv says it all: what is given to eval may stay
    add_baseline(parser)
    args = parser.parse_args(arguments)
    if args.config_dir is not None:
        from tokenprune.cli.configs import folders

        folders([], args.config_dir)  # as there, a mistake is told
    from tokenprune.report import page

    print(page.build(args.folder, args.baseline))
    return 0
