"""`tokenprune collect`: the tables of a folder made anew, from the runs below it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tokenprune.cli.arguments import Parser, add_config_dir
from tokenprune.cli.mistakes import BadInput


def main(arguments: Sequence[str]) -> int:
    """Runs the command; the exit code."""
    parser = Parser("tokenprune collect", description="The tables of a folder, made anew.")
    parser.add_argument("folder", type=Path, help="a folder with runs, at any depth")
    add_config_dir(parser)
    parser.add_argument(
        "--baseline",
        action="append",
        default=[],
        help="a strategy or a run to compare with, besides unpruned and random; may be repeated",
    )
    args = parser.parse_args(arguments)
    if args.config_dir is not None:
        from tokenprune.cli.configs import folders

        folders([], args.config_dir)  # as for report
    folder: Path = args.folder
    from tokenprune.bench import table
    from tokenprune.runs import results, tabulation

    found: list[object] = []
    if any(folder.rglob(f"*/{table.RESULT}")):
        found += (rows := table.publish(folder))
        table.print_table(rows, str(folder / table.TABLE))
    if any(folder.rglob(f"*/{results.METRICS}")):
        found += tabulation.finish_sweep(folder, results.order(folder), args.baseline)
    if not found:
        raise BadInput(
            f"collect: expected a folder with complete runs, got none below {str(folder)!r}. Name "
            "a sweep's folder, such as outputs/ablation."
        )
    return 0
