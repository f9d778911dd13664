"""Hydra sweeper that searches by Optuna: one aim or several, a study that is resumed, one table.

Hydra's own plug-in wants an Optuna of 2022. This one knows what our runs write, so that every trial
is a run with a folder and a row, and cost is an aim beside accuracy.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig


class SearchSweeper(Sweeper):
    """Runs trials, with any launcher. configs/search/optuna.yaml says what the settings mean."""

    def __init__(self, **settings: Any) -> None:
        self.settings = settings
        self.config: DictConfig | None = None
        self.launcher: Launcher | None = None
        self.work: TaskFunction | None = None

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        # Hydra imports every plugin in every application: nothing heavy at the top of this file.
        from tokenprune.cli.loader import connect

        self.config, self.work = config, task_function
        self.loader, self.launcher = connect(hydra_context, task_function, config)

    def sweep(self, arguments: Sequence[str]) -> Any:
        from tokenprune.cli.searching import Settings, search

        assert self.config is not None
        assert self.launcher is not None
        settings = Settings(**self.settings)
        return search(self.config, self.launcher, self.loader, self.work, arguments, settings)
