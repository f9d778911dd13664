"""`tokenprune bench`: what pruning saves, measured, once or in a sweep."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from tokenprune.bench import table
from tokenprune.bench.check import MEASURES, check
from tokenprune.cli.jobs import Job, check_own, names, tidy, told
from tokenprune.cli.launching import here
from tokenprune.cli.mistakes import BadInput, unknown
from tokenprune.runs.compose import plain
from tokenprune.runs.targets import load_imports


def main(arguments: Sequence[str]) -> int:
    """Runs the command; the exit code."""
    if arguments and re.fullmatch(r"\w+", arguments[0]) and arguments[0] not in MEASURES:
        raise BadInput(unknown("bench", arguments[0], MEASURES))
    given = [f"measure={word}" if word in MEASURES else word for word in arguments]
    return Job("bench", _task, check, "tokenprune.bench.run", _wanted).run(given)


def _wanted(config: DictConfig) -> tuple[str, str]:
    return "time_ratio", "minimize"


def _task(config: DictConfig) -> float:
    """Measures; returns the pruned model's share of the unpruned one's time."""
    folder = Path(HydraConfig.get().runtime.output_dir)
    sweeps = HydraConfig.get().mode == RunMode.MULTIRUN
    with tidy(folder):
        from tokenprune.bench.run import run

        load_imports(config)
        check_own(folder, plain(config))
        called = names(plain(config))
        shape = OmegaConf.select(config, "shape.path")
        shape = shape or str(HydraConfig.get().runtime.choices.get("shape"))
        own = {"strategy": called["strategy"], "schedule": called["schedule"], "shape": shape}
        row = run(config, folder, own, again=not sweeps)
    depth = len(Path(HydraConfig.get().sweep.subdir).parts)
    home = folder.parents[depth - 1] if sweeps else folder
    if not here():  # the sweep has a table in the end
        return float(row.get("time_ratio", "nan"))
    with told(home):  # what was measured stays
        rows = table.publish(home)
    table.print_table([row] if sweeps else rows, str(folder if sweeps else home / table.TABLE))
    return float(row.get("time_ratio", "nan"))
