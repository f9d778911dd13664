"""Checks configs before anything heavy is loaded, or written: a mistake costs a moment.

What needs neither torch nor transformers comes first, for every run of a sweep.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from hydra.types import RunMode
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from tokenprune import Schedule
from tokenprune.cli.configs import compose, missing, reject_sweep_values, single
from tokenprune.cli.mistakes import BadInput
from tokenprune.cost import DecoderShape
from tokenprune.runs import budgets
from tokenprune.runs.compose import build_pruning, explicit_schedule
from tokenprune.runs.models import check_choices, load_config
from tokenprune.runs.sweeps import expand, sweep_name


def single_run(overrides: Sequence[str]) -> DictConfig:
    """A checked config for a command that runs no evaluation."""
    reject_sweep_values(overrides)
    config = compose("eval", overrides)
    check([config])
    return config


def check_jobs(
    command: str, args: argparse.Namespace, own: Callable[[DictConfig], None] | None = None
) -> None:
    """Composes every run and checks it: mistakes show before any folder.

    Args:
        command: Name of the primary config.
        args: Hydra's options; a sweep without a name of its own gets one.
        own: Checks that the command adds.
    """
    # What decides whether and how to sweep; a key of the task may fit the swept choices only.
    leading = [o for o in single(args.overrides) if re.match(r"[+~]*(hydra|experiment)\b", o)]
    master = compose(command, leading, args.config_dir, hydra=True)
    moves = [o for o in args.overrides if o.lstrip("+~").startswith("hydra.job.chdir=")]
    if OmegaConf.select(master, "hydra.job.chdir") or set(moves) - set(leading):
        raise BadInput(
            "hydra.job.chdir: expected false, for relative paths mean the folder that the command "
            "is started in, got true. Leave it out; hydra.run.dir says where results go."
        )
    sweeps = args.multirun or OmegaConf.select(master, "hydra.mode") == RunMode.MULTIRUN
    if not sweeps:
        reject_sweep_values(args.overrides)
        check([compose(command, args.overrides, args.config_dir)], own)
        return
    target = OmegaConf.select(master, "hydra.sweeper._target_")
    if not str(target).endswith("GridSweeper"):
        return  # another sweeper finds its own values
    keys = {override.split("=")[0].lstrip("+") for override in args.overrides}
    if not keys & {"experiment", "hydra.sweep.dir"}:
        name = sweep_name([command, *args.overrides])
        args.overrides.append(f"hydra.sweep.dir=outputs/{name}")
    task = [item for item in args.overrides if not item.lstrip("+~").startswith("hydra")]
    grids: Any = OmegaConf.to_container(master.hydra.sweeper.grids)
    check((compose(command, job, args.config_dir) for job in expand(grids, task)), own)


def check(configs: Iterable[DictConfig], own: Callable[[DictConfig], None] | None = None) -> None:
    """Refuses what can be known of runs before their models and data are loaded."""
    right = []
    for config in configs:
        _check_values(config)
        if own is not None:
            own(config)
        _check_pruning(config)
        right.append(config)
    for config in right:
        _check_model(config)


def _check_values(config: DictConfig) -> None:
    open_keys = sorted(missing(config))
    if open_keys:
        raise BadInput(f"{open_keys[0]}: expected a value, got none. Add {open_keys[0]}=... .")
    for key, lowest in (("max_new_tokens", 1), ("num_pictures", 0), ("seed", None)):
        value = config.get(key, lowest or 0)
        wrong = isinstance(value, bool) or not isinstance(value, int)
        if wrong or (lowest is not None and value < lowest):
            bound = "" if lowest is None else f" >= {lowest}"
            raise BadInput(f"{key}: expected an integer{bound}, got {value!r}. Set {key}=8.")
    if _has_model(config):
        check_choices(config.model.get("dtype", "auto"), config.model.get("attention", "sdpa"))


def _check_pruning(config: DictConfig) -> None:
    """Strategy and schedule, on the decoder where its sizes are at hand, on any one elsewhere."""
    if not _has_model(config):
        return
    known = budgets.known_model(config.model.path, config.model.get("revision"))
    if known is not None:
        build_pruning(config, known[0].num_layers)
        return
    if config.strategy is not None:
        instantiate(config.strategy)
        _check_fractions(instantiate(config.schedule))


def _check_fractions(schedule: Any) -> None:
    """What no decoder of any depth can be pruned by."""
    if isinstance(schedule, Schedule):
        return
    if schedule.func == Schedule.pyramid:
        given = {k: v for k, v in schedule.keywords.items() if k in ("lam", "rounding")}
        Schedule.pyramid(layers=schedule.keywords.get("layers") or (), **given)
    elif schedule.func in (Schedule.one_shot, explicit_schedule):
        schedule()


def _check_model(config: DictConfig) -> None:
    """The checkpoint's own config, by transformers, unless it is the one that ships with us."""
    if not _has_model(config) or config.model.path == "tiny":
        return
    model = config.model
    shape = DecoderShape.from_config(
        load_config(model.path, revision=model.revision, trust_remote_code=model.trust_remote_code)
    )
    build_pruning(config, shape.num_layers)


def _has_model(config: DictConfig) -> bool:
    """Whether a checkpoint is asked for in our own way."""
    return bool(OmegaConf.select(config, "model._target_") == "tokenprune.runs.models.load")
