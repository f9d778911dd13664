"""`tokenprune flops`: what a schedule costs, and the schedule of a budget, from sizes alone."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from tokenprune.cli.arguments import Parser, add_config_dir
from tokenprune.cli.mistakes import BadInput


def main(arguments: Sequence[str]) -> int:
    """Runs the command; the exit code."""
    parser = Parser(
        "tokenprune flops",
        description="What a schedule costs, layer by layer, and the schedule of a budget. Needs "
        "sizes only: a model's config, as for eval, or with shape=... those that bench measures.",
    )
    parser.add_argument("overrides", nargs="*", help="model=llava_1_5_7b budget.avg_tokens=192")
    parser.add_argument("--csv", action="store_true", help="prints the layers as CSV, in full")
    parser.add_argument("--output", type=Path, help="where a picture goes: costs.png")
    add_config_dir(parser)
    args = parser.parse_intermixed_args(arguments)
    from tokenprune import Schedule
    from tokenprune.cli import breakdown
    from tokenprune.cli.configs import compose, missing, reject_sweep_values
    from tokenprune.runs import budgets, targets
    from tokenprune.runs.compose import build_pruning, called, entries

    reject_sweep_values(args.overrides)
    # The benchmark's config has shapes, and no budget.
    by_shape = any(re.match(r"\+*shape\b", override) for override in args.overrides)
    if by_shape and any(re.match(r"\+*model\b", override) for override in args.overrides):
        raise BadInput("shape: expected it or a model, got both. Leave one of them out.")
    given = ["+budget=default", *args.overrides] if by_shape else args.overrides
    config = compose("bench" if by_shape else "eval", given, args.config_dir, hydra=True)
    targets.load_imports(config)
    what = "shape" if by_shape else "model"
    open_keys = missing(config[what], f"{what}.") + missing(config.schedule, "schedule.")
    if open_keys:
        raise BadInput(f"{open_keys[0]}: expected a value, got none. Add {open_keys[0]}=... .")
    if not by_shape and config.model.get("path") is None:
        raise BadInput("model: expected one with a path, got none. Choose model=hub.")
    sizes = entries(config, ("budget", *budgets.SIZES))
    shape, _ = budgets.read_sizes(sizes)
    pruning = build_pruning(config, shape.num_layers)
    strategy = None if pruning is None else pruning.strategy
    schedule = Schedule() if pruning is None else pruning.schedule
    workload = budgets.workload(sizes, strategy)
    name = "unpruned" if strategy is None else called(strategy)
    text = f" and {workload.num_text} text" if workload.num_text else ""
    whose = config[what].get("path") or config.hydra.runtime.choices[what]
    title = f"{whose}, {name}: {workload.num_visual} visual{text} tokens"
    if args.csv:
        print(breakdown.to_csv(workload, schedule), end="")
    else:
        breakdown.show(workload, schedule, title)
        if strategy is not None and not strategy.keeps_exactly:
            print(f"at most   how many stay, {name} decides: no more than these")
        if pruning is not None and pruning.solution is not None:
            print("\n".join(breakdown.solved(pruning.solution)))
    if args.output is not None:
        path = breakdown.draw(workload, schedule, title, args.output)
        if not args.csv:
            print(f"picture   {path}")
    return 0
