"""Checks configs before anything heavy is loaded, or written: a mistake costs a moment.

What needs neither torch nor transformers comes first, for every run of a sweep.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Collection, Iterable, Sequence
from functools import lru_cache, partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from hydra.core.plugins import Plugins
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from tokenprune import Schedule
from tokenprune.cli.configs import (
    choices,
    compose,
    compose_all,
    missing,
    reject_sweep_values,
    single,
)
from tokenprune.cli.mistakes import BadInput
from tokenprune.cost import DecoderShape
from tokenprune.runs import budgets, targets
from tokenprune.runs.compose import build_pruning, build_strategy, explicit_schedule
from tokenprune.runs.models import LEVELS, SHIPPED, check_choices, load_config
from tokenprune.runs.sweeps import check_baseline, expand, is_grid, sweep_name

#: The folder of configs/hydra/default.yaml: of a sweep that nobody has named.
_UNNAMED = "outputs/sweep"
#: Where plugins are that are extras of ours, a module of theirs, and the extra's name.
_EXTRAS = {
    "hydra_plugins.hydra_joblib_launcher": ("hydra_plugins.hydra_joblib_launcher", "launchers"),
    "hydra_plugins.tokenprune_submitit": ("submitit", "launchers"),
    "hydra_plugins.tokenprune_search": ("optuna", "search"),
    "hydra_plugins.hydra_ray_launcher": ("hydra_plugins.hydra_ray_launcher", "ray"),
}


def single_run(overrides: Sequence[str], extra_dir: str | None = None) -> DictConfig:
    """A checked config for a command that runs no evaluation.

    Args:
        overrides: As on the command line.
        extra_dir: A folder with further configs (`--config-dir`).
    """
    reject_sweep_values(overrides)
    ignored = [o for o in overrides if re.match(r"[+~]*hydra[./](?!searchpath=)", o)]
    if ignored:
        raise BadInput(
            f"{ignored[0].lstrip('+~').partition('=')[0]}: expected settings that this command "
            f"follows, got {ignored[0]!r}: it makes no run's folder and no sweep. Leave it out."
        )
    config = compose("eval", overrides, extra_dir)
    check([config])
    return config


def check_jobs(
    command: str,
    args: argparse.Namespace,
    own: Callable[[DictConfig], None],
    wanted: Callable[[DictConfig], tuple[str, str]],
) -> bool:
    """Composes every run and checks it: mistakes show before any folder.

    Args:
        command: Name of the primary config.
        args: Hydra's options; a sweep without a name of its own gets one.
        own: Checks that the command adds.
        wanted: Of a config, what sweepers that search look at, and whether to `maximize` or to
            `minimize` it.

    Returns:
        Whether this process does the runs itself.
    """
    # What decides whether and how to sweep; a key of the task may fit the swept choices only.
    leading = [
        o
        for o in single(args.overrides)
        if re.match(r"[+~]*(hydra|launcher|search|experiment|baseline|shard)\b", o)
    ]
    for key in ("baseline", "launcher", "search", "shard"):
        swept = [o for o in args.overrides if o.startswith(f"{key}=") and o not in leading]
        if swept:  # it would run everything once for each
            given = swept[0].partition("=")[2]
            more = f" or a list, got {given!r}. Write baseline=[{given}]."
            raise BadInput(
                f"{key}: expected one{more if key == 'baseline' else f', got {given!r}.'}"
            )
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
        if (launcher := master.hydra.runtime.choices.get("launcher")) is not None:
            raise BadInput(
                f"launcher: expected a sweep, got launcher={launcher} with a single run. Add -m."
            )
        check([compose(command, args.overrides, args.config_dir)], own)
        return True
    _check_plugins(master)
    alone = str(master.hydra.launcher._target_).endswith(".BasicLauncher")
    given = {override.split("=")[0].lstrip("+") for override in args.overrides}
    folder = OmegaConf.to_container(master.hydra.sweep)["dir"]  # type: ignore[call-overload,index]
    if "hydra.sweep.dir" not in given and folder == _UNNAMED:
        name = sweep_name([command, *args.overrides])
        folder = f"outputs/{name}"
        args.overrides.append(f"hydra.sweep.dir={folder}")
    if not is_grid(master):  # another sweeper finds its own values
        fixed = compose(command, single(args.overrides), args.config_dir, hydra=True)
        if str(fixed.hydra.sweeper._target_).endswith(".SearchSweeper"):
            args.overrides += _search(fixed, args.overrides, wanted(fixed)[0])
            check([compose(command, single(args.overrides), args.config_dir)], own)
        args.overrides += _direction(fixed, given, *wanted(fixed))
        return alone
    task = [item for item in args.overrides if not item.lstrip("+~").startswith("hydra")]
    grids: Any = OmegaConf.to_container(master.hydra.sweeper.grids)
    known = partial(choices, overrides=args.overrides, extra_dir=args.config_dir)
    places = [item for item in args.overrides if item.startswith("hydra.searchpath=")]
    jobs = expand(grids, task, known)
    choice = str(OmegaConf.select(master, "hydra.runtime.choices.strategy"))
    check_baseline(OmegaConf.select(master, "baseline"), jobs, Path(folder), choice)
    jobs = [[*places, *job] for job in jobs]
    _check_experiments(command, jobs, args.config_dir)
    check(compose_all(command, jobs, args.config_dir), own)
    return alone


def _check_plugins(config: DictConfig) -> None:
    """Refuses a sweeper or launcher that Hydra does not have, or whose package is not installed."""
    plugins = Plugins.instance().class_name_to_class
    for part in ("sweeper", "launcher"):
        target = str(config.hydra[part]._target_)
        for start, (module, extra) in _EXTRAS.items():
            if target.startswith(f"{start}.") and find_spec(module) is None:
                group = "search" if part == "sweeper" else part
                choice = config.hydra.runtime.choices.get(group) or target
                raise BadInput(
                    f"{part}: expected {module} to be installed for {choice!r}, got no such "
                    f"package. Install it: pip install 'tokenprune-vlm[{extra}]'."
                )
        if target not in plugins:
            raise BadInput(
                f"hydra.{part}._target_: expected a plugin of Hydra's package hydra_plugins, got "
                f"{target!r}. Choose hydra/{part}=..., or install its package."
            )


def _check_experiments(command: str, jobs: Sequence[Sequence[str]], extra_dir: str | None) -> None:
    """Refuses a sweep over experiments that are sweeps: their grids would be left out."""
    chosen = {item: job for job in jobs for item in job if re.match(r"\+?experiment=", item)}
    for item in sorted(chosen) if len(chosen) > 1 else ():
        if compose(command, chosen[item], extra_dir, hydra=True).hydra.mode == RunMode.MULTIRUN:
            own = item.lstrip("+")
            raise BadInput(
                f"experiment: expected several that are no sweeps themselves, got {own}. "
                f"Run tokenprune {command} {own} alone."
            )


def _search(config: DictConfig, overrides: Sequence[str], name: str) -> list[str]:
    """Checks a search of ours; overrides that say what is looked for.

    Args:
        config: What does not change.
        overrides: Of the command line.
        name: What the command returns.
    """
    from tokenprune.cli.searching import check_search

    task = [item for item in overrides if not item.lstrip("+~").startswith(("hydra", "launcher"))]
    check_search(config.hydra.sweeper, task)
    if config.hydra.sweeper.objectives:
        return []
    cost = ",tflops_ratio" if name == "accuracy" else ""
    return [f"hydra.sweeper.objectives=[{name}{cost}]"]


def _direction(config: DictConfig, given: Collection[str], name: str, way: str) -> list[str]:
    """Overrides that tell a sweeper which way is better, where it has a key for that.

    Args:
        config: Has the sweeper's own config.
        given: Keys that the user has set.
        name: What is searched by.
        way: `maximize` or `minimize`.
    """
    ways: dict[str, str | bool] = {
        "hydra.sweeper.direction": way,  # Optuna's
        "hydra.sweeper.optim.maximize": way == "maximize",  # Nevergrad's
        "hydra.sweeper.ax_config.experiment.minimize": way == "minimize",  # Ax's
    }
    for key, right in ways.items():
        value = OmegaConf.select(config, key)
        value = getattr(value, "name", value)  # of an enumeration
        if value is not None and value != right and key not in given:
            override = f"{key}={str(right).lower()}"
            print(f"{override}, for {name}; another one can be set", flush=True)
            return [override]
    return []


def check(configs: Iterable[DictConfig], own: Callable[[DictConfig], None] | None = None) -> None:
    """Refuses what can be known of runs before their models and data are loaded."""
    right = []
    for config in configs:
        targets.load_imports(config)
        targets.check(config)
        _check_values(config)
        if own is not None:
            own(config)
        _check_pruning(config)
        _check_scenes(config)
        right.append(config)
    _num_layers.cache_clear()  # a checkpoint may have changed since
    for config in right:
        _check_model(config)


def _check_values(config: DictConfig) -> None:
    open_keys = sorted(missing(config))
    if open_keys:
        raise BadInput(f"{open_keys[0]}: expected a value, got none. Add {open_keys[0]}=... .")
    for key, lowest in (("max_new_tokens", 1), ("num_pictures", 0), ("graphs", 0), ("seed", None)):
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
    known = budgets.known_model(config.model.path)
    if known is not None:
        build_pruning(config, known[0].num_layers)
        return
    if config.strategy is not None:
        build_strategy(config.strategy)
        _check_fractions(targets.build(config.schedule, "schedule"))


def _check_scenes(config: DictConfig) -> None:
    """Each shipped model has learnt one level of the generated scenes, and its words."""
    if not _has_model(config) or config.model.path not in SHIPPED or "data" not in config:
        return
    name = config.model.path
    for part in ("test", "train", "validation"):
        node = config.data.get(part)
        if node is None or not str(node.get("_target_")).endswith("scenes.SceneDataset"):
            continue
        if (level := node.get("level", "easy")) != LEVELS[name]:
            raise BadInput(
                f"data.{part}.level: expected {LEVELS[name]} for model={name}, got {level}. "
                f"Add data={'scenes' if level == 'hard' else 'scenes_hard'}."
            )


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
    """The checkpoint's own config, by transformers, unless it is one that ships with us."""
    if not _has_model(config) or config.model.path in SHIPPED:
        return
    model = config.model
    build_pruning(config, _num_layers(model.path, model.revision, model.trust_remote_code))


@lru_cache(maxsize=8)  # all runs of a sweep, each a question to the Hub
def _num_layers(path: str, revision: str | None, trust_remote_code: bool) -> int:
    config = load_config(path, revision=revision, trust_remote_code=trust_remote_code)
    return DecoderShape.from_config(config).num_layers


def _has_model(config: DictConfig) -> bool:
    """Whether a checkpoint is asked for in our own way."""
    return bool(OmegaConf.select(config, "model._target_") == "tokenprune.runs.models.load")
