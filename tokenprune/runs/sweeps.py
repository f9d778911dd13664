"""Which runs a sweep consists of, and what their folders are called."""

from __future__ import annotations

import hashlib
import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Glob, Override, Transformer
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf

from tokenprune.runs import results
from tokenprune.runs.tabulation import finish_sweep, listed

_LONGEST_NAME = 120  # most file systems end at 255 bytes


def expand(
    grids: Sequence[Mapping[str, object]],
    arguments: Sequence[str],
    choices: Callable[[str], Sequence[str]] = lambda group: (),
) -> list[list[str]]:
    """Overrides of every run: the product of each grid, one grid after another.

    Args:
        grids: Maps overrides to values; several values are separated by commas.
        arguments: Overrides from the command line, which win over every grid.
        choices: All choices of a group, for patterns such as `strategy=glob(*)`.

    Raises:
        ValueError: If a value asks for a sweep that is no list, or a pattern fits nothing.
    """
    parser = OverridesParser.create()
    given = parser.parse_overrides(list(arguments))
    own = {override.get_key_element().lstrip("+~") for override in given}
    jobs: list[list[str]] = []
    for grid in grids or [{}]:
        lines = [f"{key}={value}" for key, value in grid.items() if key.lstrip("+~") not in own]
        axes: list[list[str]] = []
        for override in [*parser.parse_overrides(lines), *given]:
            key = override.get_key_element()
            if override.is_discrete_sweep():
                axes.append([f"{key}={value}" for value in _values(override, choices)])
            elif override.is_sweep_override():
                raise ValueError(
                    f"{key}: expected values separated by commas, got {override.input_line!r}. "
                    "Intervals need search=optuna."
                )
            elif override.is_delete():
                axes.append([override.input_line or key])
            else:
                axes.append([f"{key}={override.get_value_element_as_str()}"])
        for job in itertools.product(*axes):
            if list(job) not in jobs:
                jobs.append(list(job))
    return jobs


def _values(override: Override, choices: Callable[[str], Sequence[str]]) -> list[str]:
    """What a swept override stands for.

    Raises:
        ValueError: If that is nothing.
    """
    value: Any = override.value()
    group = override.key_or_group
    if isinstance(value, Glob):
        return _fitting(value, group, choices, str(override.input_line).partition("=")[2])
    found: list[str] = []
    for own in override.sweep_iterator(_text):
        if isinstance(own, Glob):
            found += _fitting(own, group, choices, _written(own))
        else:
            found.append(str(own))
    return found


def _text(value: Any) -> Any:
    """A value as an override has it; a pattern among values stays one."""
    return value if isinstance(value, Glob) else Transformer.str(value)


def _written(pattern: Glob) -> str:
    include = ",".join(pattern.include)
    return f"glob({include})" if len(pattern.include) == 1 else f"glob([{include}])"


def _fitting(
    pattern: Glob, group: str, choices: Callable[[str], Sequence[str]], given: str
) -> list[str]:
    """The choices of a group that a pattern fits.

    Raises:
        ValueError: If there are none.
    """
    # Hydra's own iterator leaves out what is in folders of hydra.searchpath.
    known = list(choices(group))
    values: list[str] = pattern.filter(known)
    if values:
        return values
    if known:
        raise ValueError(
            f"{group}: expected a pattern that fits some of {known}, got {given!r}. "
            f"{group}=glob(*) fits all."
        )
    raise ValueError(
        f"{group}: expected values separated by commas, got {given!r}. Patterns are for groups of "
        "configs, such as strategy=glob(*)."
    )


def is_grid(config: DictConfig) -> bool:
    """Whether the sweeper of a config lists its runs beforehand: ours for grids does."""
    return str(OmegaConf.select(config, "hydra.sweeper._target_")).endswith(".GridSweeper")


class Tabulate(Callback):
    """Writes and prints the tables at the end of a sweep whose sweeper is another's.

    They have all complete runs in the sweep's folder, those of earlier searches included.
    """

    def on_multirun_end(self, config: DictConfig, **_: Any) -> None:
        if not str(config.hydra.sweeper._target_).startswith("hydra_plugins.tokenprune_"):
            finish_sweep(Path(config.hydra.sweep.dir), baseline=config.get("baseline"))


def check_baseline(
    baseline: object, jobs: Sequence[Sequence[str]], folder: Path, strategy: str
) -> None:
    """Refuses, before anything runs, what a sweep has neither a strategy nor a run for.

    Args:
        baseline: The config's key.
        jobs: Overrides of every run.
        folder: The sweep's, where earlier runs may be.
        strategy: The choice of runs that name none.

    Raises:
        ValueError: Says what there is.
    """
    names = run_names(jobs)
    key = r"[+]*strategy(?:\.name|\._target_)?="
    parts = [part for job in jobs for part in job if re.match(key, part)]
    chosen = {re.sub(key, "", part).rpartition(".")[2] for part in parts}
    known = {strategy, *chosen, results.DOWNSAMPLE} - {"none"}
    for name in listed(baseline):
        there = name in names or (folder / name / results.METRICS).is_file()
        if not there and name.partition("(")[0] not in known:
            raise ValueError(
                f"baseline: expected a strategy or a run of this sweep, got {name!r}. Name one "
                f"of {sorted(known)}, or a run's folder, such as {names[0]!r}."
            )


def run_name(overrides: Sequence[str]) -> str:
    """Folder of a run: its overrides, so that the same run finds the same folder again."""
    # Where it runs, that a training goes on, what a sweep is compared with, how an evaluation is
    # shared out: no other one.
    goes_on = "|".join(way or "null|" for way in results.GOES_ON)
    left_out = (
        r"[+]*((experiment|hydra|launcher|search|baseline|shard|shard_timeout)\b|"
        rf"ckpt_path=({goes_on})$)"
    )
    # The order in which they were given is no matter; the method comes first.
    parts = sorted((o for o in overrides if not re.match(left_out, o)), key=_place)
    # strategy=fastv, schedule=pyramid, schedule.lam=0.3 -> fastv,pyramid,lam=0.3; but not
    # strategy.seed=1 -> seed=1, which is another run.
    pattern = r"^(strategy=|schedule[=.])"
    short = ",".join(re.sub(pattern, "", part.lstrip("+")) for part in parts)
    safe = re.sub(r"[^\w.,=+-]", "_", short)
    if safe != short or len(safe) > _LONGEST_NAME:
        safe = f"{safe[: _LONGEST_NAME - 9]}-{_digest(parts)}"
    return safe or "default"


def _place(override: str) -> tuple[int, str]:
    """Where an override stands in a run's name: the strategy's, the schedule's, others."""
    starts = ("strategy=", "strategy.", "schedule=", "schedule.", "")
    bare = override.lstrip("+")
    return next(n for n, start in enumerate(starts) if bare.startswith(start)), bare


def run_names(jobs: Sequence[Sequence[str]]) -> list[str]:
    """Folders of a sweep's runs, each with one of its own."""
    names = [run_name(job) for job in jobs]
    return [
        name if names.count(name) == 1 else f"{name}-{_digest(job)}"
        for name, job in zip(names, jobs, strict=True)
    ]


def _digest(parts: Sequence[str]) -> str:
    return hashlib.blake2b(",".join(parts).encode(), digest_size=4).hexdigest()


def sweep_name(overrides: Sequence[str]) -> str:
    """Folder of a sweep that has no name of its own; the order of its overrides is no matter."""
    left_out = ("baseline=", "launcher=", "hydra.launcher.", "shard=", "shard_timeout=")
    key = "\n".join(sorted(o for o in overrides if not o.startswith(left_out)))
    return f"sweep-{hashlib.blake2b(key.encode(), digest_size=4).hexdigest()}"
