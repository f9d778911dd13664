"""From configs to objects: where the YAML files are, and how strategy and schedule are built.

Hydra composes configs before any model is known, so a schedule config is partial and is completed
here with the model's number of layers.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from tokenprune import POSITIONS, PerStage, PruningStrategy, Schedule
from tokenprune.cost import DecoderShape
from tokenprune.cost.solver import Solution
from tokenprune.runs import budgets, targets

#: In configs: the strategy's published policy where the model takes it, else `original`.
AUTO = "auto"
_DEPTH = 32  # of the papers' models; no policy depends on it


def config_dir() -> Path:
    """Folder of the YAML files: in the package once installed, beside it in a checkout.

    Raises:
        ValueError: If neither exists.
    """
    package = Path(__file__).resolve().parents[1]
    for folder in (package / "configs", package.parent / "configs"):
        if (folder / "eval.yaml").is_file():
            return folder
    raise ValueError(
        f"config_dir: expected configs/eval.yaml in {package} or {package.parent}, got neither. "
        "Install tokenprune again."
    )


@dataclass(frozen=True)
class Pruning:
    """What `tokenprune.prune` needs besides the model.

    Attributes:
        strategy: Says which tokens survive.
        schedule: Says how many.
        positions: `"original"` or `"renumbered"`.
        solution: How the schedule meets a budget, if there is one.
        published: Whether `positions` is the published policy, which gives way to the model, and
            not one that was asked for.
    """

    strategy: PruningStrategy
    schedule: Schedule
    positions: str
    solution: Solution | None = None
    published: bool = False


def explicit_schedule(
    stages: Any,
    rounding: str = "floor",
    of_layers: int | None = None,
    num_layers: int | None = None,
) -> Schedule:
    """A schedule from plain mappings with the keys `layer` and `keep`.

    Args:
        stages: A list of such mappings.
        rounding: See `Schedule`.
        of_layers: See `Schedule.explicit`.
        num_layers: Decoder layers of the model.

    Raises:
        ValueError: If an entry has other keys, or the schedule is refused.
    """
    if isinstance(stages, str) or not isinstance(stages, Sequence):
        raise ValueError(
            f"schedule.stages: expected a list of cuts, got {stages!r}. "
            "Write schedule.stages=[{layer:2,keep:0.5}]."
        )
    for stage in stages:
        if not isinstance(stage, Mapping) or set(stage) != {"layer", "keep"}:
            raise ValueError(
                f"schedule.stages: expected entries with the keys layer and keep, got {stage!r}. "
                "Write schedule.stages=[{layer:2,keep:0.5}]."
            )
    cuts = [(stage["layer"], stage["keep"]) for stage in stages]
    return Schedule.explicit(cuts, rounding, of_layers, num_layers)


def build_schedule(config: DictConfig, num_layers: int) -> Schedule:
    """Completes a partial schedule config with the model's number of layers.

    Raises:
        ValueError: If the schedule does not fit the model.
    """
    partial = targets.build(config, "schedule")
    if isinstance(partial, Schedule):
        schedule = partial
    elif "num_layers" in inspect.signature(partial.func).parameters:
        schedule = partial(num_layers=num_layers)
    else:
        schedule = partial()
    schedule.check_depth(num_layers)
    return schedule


def solve_budget(config: DictConfig, num_layers: int, strategy: PruningStrategy) -> Solution | None:
    """The schedule that meets a config's budget; None if it has no target.

    Args:
        config: Has `schedule`, maybe `budget`, and what `budgets.workload` reads.
        num_layers: Decoder layers of the model.
        strategy: Whose scoring an exact budget counts.

    Raises:
        ValueError: If it cannot be met; says what is possible.
    """
    if budgets.asked(config.get("budget")) is None:
        return None
    partial = targets.build(config.schedule, "schedule")
    name, options = "explicit", {}
    chosen = OmegaConf.select(config, "hydra.runtime.choices.schedule")
    if not isinstance(partial, Schedule):
        name, options = partial.func.__name__, partial.keywords
    parts = entries(config, ("budget", *budgets.SIZES))
    return budgets.solve_config(parts, name, options, num_layers, strategy, chosen)


def build_pruning(config: DictConfig, num_layers: int) -> Pruning | None:
    """Strategy, schedule and position policy of a run; None for the unpruned model.

    Where the model is at hand, `fit_pruning` is to be asked: it may take other positions.

    Args:
        config: Has the keys `strategy`, `schedule` and `positions`; `budget` may decide what the
            schedule leaves open.
        num_layers: Decoder layers of the model.

    Raises:
        ValueError: If a value is out of range or the schedule does not fit the model.
        KeyError: If the strategy is unknown.
    """
    if config.positions not in (AUTO, *POSITIONS):
        raise ValueError(
            f"positions: expected one of {[AUTO, *POSITIONS]}, got {config.positions!r}. "
            "original leaves gaps, renumbered counts anew at each cut, auto is as published."
        )
    if config.get("strategy") is None:
        return None
    strategy = build_strategy(config.strategy)
    solution = solve_budget(config, num_layers, strategy)
    if solution is None:
        schedule = build_schedule(config.schedule, num_layers)
    else:
        schedule = solution.schedule
    if isinstance(strategy, PerStage):
        strategy.check([stage.layer for stage in schedule.stages])
    if config.positions == AUTO:
        return Pruning(strategy, schedule, published_positions(strategy), solution, published=True)
    return Pruning(strategy, schedule, config.positions, solution)


def build_strategy(config: Any) -> PruningStrategy:
    """The strategy that a config's `strategy` names: registered ones by name, any by `_target_`.

    A list has one for each cut.

    Raises:
        ValueError: If it cannot be imported or built, or is none.
        KeyError: If there is none of that name.
    """
    if OmegaConf.is_list(config) or isinstance(config, list):
        return PerStage(
            tuple(
                targets.build(own, f"strategy.{cut}", PruningStrategy)
                for cut, own in enumerate(config)
            )
        )
    # Else strategies inside it would arrive as configs: OmegaConf makes such of dataclasses.
    convert = config.get("_convert_", "all")
    strategy = targets.build(config, "strategy", PruningStrategy, _convert_=convert)
    assert isinstance(strategy, PruningStrategy)
    return strategy


def called(strategy: PruningStrategy) -> str:
    """What a strategy is called: the name it is registered by, or its class's."""
    if isinstance(strategy, PerStage):
        return strategy.title
    return str(getattr(strategy, "name", type(strategy).__name__))


def published_positions(strategy: PruningStrategy) -> str:
    """The position policy of a strategy's published run; `original` for one that has none.

    Of several, that of the first.
    """
    try:
        return strategy.at(0).published(_DEPTH).positions
    except ValueError:
        return "original"


def fit_pruning(config: DictConfig, model: Any) -> Pruning | None:
    """As `build_pruning`, for a model: where it cannot be as published, that is said in a line.

    Args:
        config: As for `build_pruning`.
        model: A Hugging Face model.

    Raises:
        ValueError: As `build_pruning`, or the model cannot be pruned at all.
        KeyError: If the strategy is unknown.
    """
    pruning = build_pruning(config, DecoderShape.from_config(model.config).num_layers)
    if pruning is None or not pruning.published or pruning.positions == "original":
        return pruning
    from tokenprune import fixed_positions  # with torch, which takes a second to load

    reason = fixed_positions(model)
    if reason is None:
        return pruning
    _say(f"positions: original, not {pruning.positions} as published: this model has {reason}")
    return replace(pruning, positions="original")


@lru_cache  # a sweep says it once
def _say(line: str) -> None:
    print(line, flush=True)


def plain(config: DictConfig) -> dict[str, Any]:
    """The resolved config as plain containers."""
    container = OmegaConf.to_container(config, resolve=True)
    assert isinstance(container, dict)
    return {str(key): value for key, value in container.items()}


def entries(config: DictConfig, names: Sequence[str]) -> dict[str, Any]:
    """Some entries as plain values, None where there is none.

    Unlike `plain` it works before there is a run, to whose folder other entries may refer.
    """
    found = {name: config.get(name) for name in names}
    return {
        name: OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
        for name, value in found.items()
    }


def describe(path: Path) -> str:
    """First comment of a YAML file: its one-line description.

    Raises:
        ValueError: It is no UTF-8.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        number = error.object[: error.start].count(b"\n") + 1
        raise ValueError(
            f"{path}, line {number}: expected UTF-8 text, got the byte "
            f"{error.object[error.start]:#04x}. Save it as UTF-8."
        ) from error
    for line in text.splitlines():
        if line.startswith("#") and "@package" not in line:
            return line.lstrip("# ").strip()
    return ""
