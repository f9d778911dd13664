"""`tokenprune train`: fine-tunes a model, pruned or not, once or in a sweep."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from tokenprune.cli.jobs import Job, check_own, quiet, tidy
from tokenprune.runs import results, team
from tokenprune.runs.compose import plain
from tokenprune.runs.targets import load_imports
from tokenprune.training.check import MONITORS, check


def main(arguments: Sequence[str]) -> int:
    """Runs the command; the exit code."""
    return Job("train", _task, check, "tokenprune.training.run", _wanted, _complete, True).run(
        arguments
    )


def _wanted(config: DictConfig) -> tuple[str, str]:
    return config.monitor, f"{MONITORS[config.monitor]}imize"


def _complete(config: DictConfig, folder: Path) -> bool:
    from tokenprune.training.summary import SUMMARY

    load_imports(config)
    resolved = plain(config)
    return results.changes(folder, resolved, results.fingerprint(resolved), SUMMARY) == []


def _task(config: DictConfig) -> float | None:
    """Trains; returns what `monitor` names, for sweepers that search; None without validation."""
    folder = Path(HydraConfig.get().runtime.output_dir)
    sweeps = HydraConfig.get().mode == RunMode.MULTIRUN
    with tidy(folder), quiet():
        from tokenprune.training.checkpoints import LAST, Stopped
        from tokenprune.training.summary import SUMMARY

        load_imports(config)
        if sweeps:
            resolved = plain(config)
            check_own(folder, resolved, trains=True)
            marks = results.fingerprint(resolved)
            label = f"[{HydraConfig.get().job.num}] {folder.name}"
            changes = results.changes(folder, resolved, marks, SUMMARY)
            if changes == []:
                print(f"{label}: complete already", flush=True)
                return _monitored(config, folder / SUMMARY)
            if changes:
                print(f"{label}: again, {', '.join(changes)} changed", flush=True)
            elif results.changes(folder, resolved, marks, LAST) == []:
                print(f"{label}: goes on from its checkpoint", flush=True)
                config.ckpt_path = "last"
            elif config.ckpt_path == "last":  # of a sweep that had not come so far
                config.ckpt_path = None
        try:
            team.together(_train, plain(config), folder)
        except Stopped as stop:
            print(f"tokenprune: training was stopped {stop}", file=sys.stderr)
            raise SystemExit(128 + stop.signum) from None
        return _monitored(config, folder / SUMMARY)


def _train(resolved: dict[str, Any], folder: Path) -> None:
    """Trains, in each of the processes that do it."""
    with quiet():
        from tokenprune.training.run import train

        load_imports(resolved)
        config = OmegaConf.create(resolved)
        assert isinstance(config, DictConfig)
        train(config, folder)


def _monitored(config: DictConfig, summary: Path) -> float | None:
    found = json.loads(summary.read_text(encoding="utf-8"))["validation"]
    return found.get(config.monitor.removeprefix("val_"))  # type: ignore[no-any-return]
