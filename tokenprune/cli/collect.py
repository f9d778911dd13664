"""`tokenprune collect`: the tables of a folder made anew, from the runs below it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tokenprune.cli.arguments import Parser, add_baseline, add_config_dir
from tokenprune.cli.mistakes import BadInput


def main(arguments: Sequence[str]) -> int:
    """Runs the command; the exit code."""
    parser = Parser("tokenprune collect", description="The tables of a folder, made anew.")
    parser.add_argument("folder", type=Path, help="a folder with runs, at any depth")
    add_config_dir(parser)
    add_baseline(parser)
    args = parser.parse_args(arguments)
    if args.config_dir is not None:
        from tokenprune.cli.configs import folders

        folders([], args.config_dir)  # as for report
    folder: Path = args.folder
    from tokenprune.runs import results

    if not tabulate(folder, results.order(folder), args.baseline):
        raise BadInput(
            f"collect: expected a folder with complete runs, got none below {str(folder)!r}. Name "
            "a sweep's folder, such as outputs/ablation."
        )
    return 0


def tabulate(folder: Path, runs: Sequence[str] = (), baseline: object = None) -> bool:
    """Writes and prints the tables of all evaluations and measurements below a folder.

    Args:
        folder: That of a sweep, or of several.
        runs: Sub-folders of runs that come first.
        baseline: As for `finish_sweep`.

    Returns:
        Whether there are any.
    """
    from tokenprune.bench import table
    from tokenprune.runs import results, tabulation

    found: list[object] = []
    if any(folder.rglob(f"*/{table.RESULT}")):
        found += (rows := table.publish(folder))
        table.print_table(rows, str(folder / table.TABLE))
    if any(folder.rglob(f"*/{results.METRICS}")):
        found += tabulation.finish_sweep(folder, runs, baseline)
    return bool(found)
