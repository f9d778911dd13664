"""Hydra sweeper over several grids. Hydra accepts plugins from the package `hydra_plugins` only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig


class GridSweeper(Sweeper):
    """Runs the product of each grid in turn, with any launcher, and tabulates the results.

    Args:
        grids: Maps overrides to values, several separated by commas. Empty: the command line alone.
    """

    def __init__(self, grids: Sequence[Mapping[str, Any]] = ()) -> None:
        self.grids = grids
        self.config: DictConfig | None = None
        self.launcher: Launcher | None = None
        self.work: TaskFunction | None = None

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        # Hydra imports every plugin in every application: nothing heavy at the top of this file.
        from tokenprune.cli.loader import connect

        self.config = config
        self.work = task_function
        self.loader, self.launcher = connect(hydra_context, task_function, config)

    def _choices(self, group: str) -> list[str]:
        assert self.config is not None
        found: list[str] = self.loader.get_group_options(
            group, overrides=list(self.config.hydra.overrides.hydra)
        )
        return found

    def sweep(self, arguments: list[str]) -> None:
        from tokenprune.cli.launching import run_all
        from tokenprune.runs.sweeps import expand, run_names

        assert self.config is not None
        assert self.launcher is not None
        jobs = expand(self.grids, arguments, self._choices)
        run_all(self.config, self.launcher, self.loader, self.work, jobs, run_names(jobs))
