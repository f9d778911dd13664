"""`tokenprune list`: every choice, in a line."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from tokenprune.cli.arguments import Parser


def main(arguments: Sequence[str]) -> int:
    """Runs the command; the exit code."""
    parser = Parser("tokenprune list", description="Every choice, in a line.")
    parser.parse_args(arguments)
    from tokenprune.cli.guide import GROUPS
    from tokenprune.runs.compose import config_dir, describe
    from tokenprune.strategy import available

    for group in (*GROUPS, "shape"):
        lines = {
            path.stem: describe(path) for path in sorted((config_dir() / group).glob("*.yaml"))
        }
        if group == "strategy":
            for name in available():
                lines[name] = f"{lines.get(name, '(no YAML file)')} {_does(name)}"
        print(f"{group}=")
        for name, line in lines.items():
            print(
                textwrap.fill(line, 100, initial_indent=f"  {name:<15}", subsequent_indent=" " * 17)
            )
    return 0


def _does(name: str) -> str:
    """What a strategy says of itself; one that cannot be loaded leaves the others listed."""
    from tokenprune.strategy import strategy_class

    try:
        return (strategy_class(name).__doc__ or "").strip().splitlines()[0]
    except Exception as error:  # whatever is wrong in its file
        return f"(cannot be loaded: {type(error).__name__}: {error})"
