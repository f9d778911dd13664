"""Composes the configs of a sweep's runs: once for each set of choices, not once for each run.

Hydra reads and merges some twenty files for a run, which takes 0.1 to 0.2 s: too much beside runs
of a second. Here runs that choose the same files share that; values are set in copies of it.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

from hydra._internal.config_loader_impl import get_overrides_dirname
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import OverrideType
from hydra.core.plugins import Plugins
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from tokenprune.runs.compose import config_dir

_MOST = 64
#: By what it is made of; a launcher's processes are given a new loader for each run.
_made: dict[tuple[Any, ...], DictConfig] = {}


class Loader:
    """Hydra's loader of configs, with another way to compose a run's.

    Args:
        loader: Hydra's own.
    """

    def __init__(self, loader: Any) -> None:
        self.loader = loader

    def __getattr__(self, name: str) -> Any:
        if name == "loader":  # while it is unpickled
            raise AttributeError(name)
        return getattr(self.loader, name)

    def load_sweep_config(self, master_config: DictConfig, sweep_overrides: list[str]) -> Any:
        """As Hydra's, whose config it equals."""
        chosen, values = split(sweep_overrides)
        hydra = master_config.hydra
        key = (hydra.job.config_name, *hydra.overrides.hydra, None, *chosen, os.getcwd())

        def make() -> DictConfig:
            found: DictConfig = self.loader.load_sweep_config(master_config, chosen)
            return found

        config = filled(_made, key, make, values)
        if config is None:
            return self.loader.load_sweep_config(master_config, sweep_overrides)
        parsed = [_parse(item) for item in sweep_overrides]
        own = config.hydra
        own.overrides.hydra = [
            *hydra.overrides.hydra,
            *(item.input_line for item in parsed if item.is_hydra_override()),
        ]
        task = [item for item in parsed if not item.is_hydra_override()]
        own.overrides.task = [item.input_line for item in task]
        own.job.override_dirname = get_overrides_dirname(task, **own.job.config.override_dirname)
        OmegaConf.copy_cache(from_config=master_config, to_config=config)
        return config


def connect(context: HydraContext, work: TaskFunction, config: DictConfig) -> tuple[Any, Launcher]:
    """What a sweeper works with: the loader of its runs' configs, and the launcher, set up with it.

    Args:
        context: Hydra's.
        work: What is run.
        config: The sweep's, with the node `hydra`.
    """
    loader: Any = Loader(context.config_loader)
    launcher = Plugins.instance().instantiate_launcher(
        hydra_context=HydraContext(loader, context.callbacks), task_function=work, config=config
    )
    return loader, launcher


def filled(
    made: dict[tuple[Any, ...], DictConfig],
    key: tuple[Any, ...],
    make: Callable[[], DictConfig],
    values: Sequence[tuple[str, Any]],
) -> DictConfig | None:
    """A copy of what choices make, with values set in it; None where a value does not fit.

    Args:
        made: What was made before.
        key: Its name there.
        make: Makes it.
        values: Keys and values.
    """
    if key not in made:
        if len(made) >= _MOST:
            made.clear()
        made[key] = make()
    config = copy.deepcopy(made[key])
    try:
        for name, value in values:
            OmegaConf.update(config, name, value, merge=True)
    except OmegaConfBaseException:
        return None
    return config


def split(overrides: Sequence[str]) -> tuple[list[str], list[tuple[str, Any]]]:
    """Overrides that choose files, add or delete; and keys with their values."""
    chosen, values = [], []
    for item in overrides:
        override = _parse(item)
        key = str(override.key_or_group)
        plain = override.type == OverrideType.CHANGE and override.package is None
        hydra = key.startswith("hydra") and key != "hydra.sweep.subdir"
        # A key without a dot may be a group, of anybody's files.
        group = "." not in key and (config_dir() / key).is_dir()
        if not plain or hydra or group or "/" in key or "${" in item:
            chosen.append(item)
        else:
            values.append((key, override.value()))
    return chosen, values


@lru_cache(maxsize=4096)
def _parse(item: str) -> Any:
    return OverridesParser.create().parse_override(item)
