"""`tokenprune list`: every choice, in a line."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from tokenprune.cli.arguments import Parser, add_config_dir


def main(arguments: Sequence[str]) -> int:
    """Runs the command; the exit code."""
    parser = Parser("tokenprune list", description="Every choice, in a line.")
    parser.add_argument("overrides", nargs="*", help="as for eval: imports=[my_package.mine]")
    add_config_dir(parser)
    args = parser.parse_intermixed_args(arguments)
    from tokenprune.cli.guide import GROUPS, choice_files
    from tokenprune.runs.compose import config_dir, describe
    from tokenprune.strategy import available

    places = [config_dir()]
    if args.overrides or args.config_dir is not None:  # Hydra takes a moment to load
        from tokenprune.cli.configs import compose, folders, reject_sweep_values
        from tokenprune.runs.targets import load_imports

        reject_sweep_values(args.overrides)
        load_imports(compose("eval", args.overrides, args.config_dir))
        places = folders(args.overrides, args.config_dir)
    for group in (*GROUPS, "shape", "benchmark"):
        lines = {path.stem: describe(path) for path in choice_files(group, places)}
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
        said = (strategy_class(name).__doc__ or "").strip().splitlines()
    except Exception as error:  # whatever is wrong in its file
        text = error.args[0] if isinstance(error, KeyError) and error.args else error
        return f"(cannot be loaded: {type(error).__name__}: {text})"
    return said[0] if said else ""
