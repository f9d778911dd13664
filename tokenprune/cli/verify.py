"""`tokenprune verify`: is pruning exact on this checkpoint?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from tokenprune.cli.arguments import Parser, add_config_dir
from tokenprune.cli.mistakes import BadInput

if TYPE_CHECKING:
    from tokenprune.evaluation.verify import Check


def main(arguments: Sequence[str]) -> int:
    """Runs the command; the exit code."""
    parser = Parser(
        "tokenprune verify",
        description="Is pruning exact on this checkpoint? Identity, and drop = mask.",
    )
    parser.add_argument("overrides", nargs="*", help="as for eval: model=tiny strategy=fastv")
    add_config_dir(parser)
    args = parser.parse_intermixed_args(arguments)
    from tokenprune.cli.checks import single_run

    config = single_run(args.overrides, args.config_dir)
    if config.strategy is None:
        raise BadInput("strategy: expected one that prunes, got 'none'. Choose strategy=fastv.")
    from tokenprune.cli import prompt
    from tokenprune.cli.jobs import quiet
    from tokenprune.evaluation.loading import device_of
    from tokenprune.evaluation.reference import HALVES, why_not_float32
    from tokenprune.evaluation.verify import made_image, verify
    from tokenprune.runs.compose import called, fit_pruning
    from tokenprune.runs.tables import print_table

    with quiet():
        loaded = prompt.load(config, args.overrides)
        pruning = fit_pruning(config, loaded.model)
        assert pruning is not None
        checks = verify(loaded, prompt.prompt(loaded, made_image(), "What is this?"), pruning)
    print_table(
        f"{config.model.get('path', config.model._target_)}, {called(pruning.strategy)}, "
        f"on {device_of(loaded.model)}",
        ("check",),
        ("difference", "allowed", "result"),
        [
            (check.name, f"{check.value:.1e}", f"{check.limit:.0e}", _result(check))
            for check in checks
        ],
    )
    if loaded.model.dtype in HALVES and (why := why_not_float32(loaded.model)) is not None:
        print(f"not checked with weights as float32: {why}")
    return 0 if all(check.passed for check in checks) else 1


def _result(check: Check) -> str:
    return "exact" if check.value == 0 else "ok" if check.passed else "FAILED"
