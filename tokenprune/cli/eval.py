"""`tokenprune eval`: a model's answers with its visual tokens pruned, once or in a sweep."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from tokenprune.cli.jobs import Job, check_own, names, quiet, tell, tidy, told
from tokenprune.evaluation.metrics import build_metric
from tokenprune.runs import results, team
from tokenprune.runs.compose import entries, plain
from tokenprune.runs.devices import check_nodes, parse_shard
from tokenprune.runs.extras import check_logger
from tokenprune.runs.tabulation import listed
from tokenprune.runs.targets import load_imports


def main(arguments: Sequence[str]) -> int:
    """Runs the command; the exit code."""
    return Job("eval", _task, _check, "tokenprune.evaluation.run", _wanted, _complete, True).run(
        arguments
    )


def _check(config: DictConfig) -> None:
    build_metric(config.metric)
    listed(config.baseline)
    check_logger(config)
    check_nodes(entries(config.trainer, ("num_nodes", "devices")))
    parse_shard(config.get("shard"))
    timeout = config.get("shard_timeout", 1)
    if isinstance(timeout, bool) or not isinstance(timeout, int | float) or timeout <= 0:
        raise ValueError(
            f"shard_timeout: expected seconds above 0, got {timeout!r}. Set shard_timeout=1800."
        )


def _wanted(config: DictConfig) -> tuple[str, str]:
    return "accuracy", "maximize"


def _complete(config: DictConfig, folder: Path) -> bool:
    load_imports(config)
    resolved = plain(config)
    return results.changes(folder, resolved, results.fingerprint(resolved)) == []


def _task(config: DictConfig) -> float | None:
    """Evaluates; returns the accuracy, for sweepers that search; None where shards are to come."""
    folder = Path(HydraConfig.get().runtime.output_dir)
    shard = config.get("shard")
    part = "" if shard is None else f"-{str(shard).replace('/', '-of-')}"
    with tidy(folder, part), quiet():
        load_imports(config)
        resolved = plain(config)
        check_own(folder, resolved)
        changes = results.changes(folder, resolved, results.fingerprint(resolved))
        metrics = team.together(_evaluate, resolved, folder, names(resolved))
        if metrics is None:
            print(f"shard {shard} is done, others are not: {folder}", flush=True)
            return None
    with told(folder):  # nothing that goes wrong from here on costs the run
        tell(folder, metrics, changes)
    return float(metrics["accuracy"])


def _evaluate(resolved: dict[str, Any], folder: Path, named: dict[str, str]) -> Any:
    """Evaluates, in each of the processes that do it."""
    with quiet():
        from tokenprune.evaluation.run import evaluate
        from tokenprune.report.logged import kept_pictures

        load_imports(resolved)
        config = OmegaConf.create(resolved)
        assert isinstance(config, DictConfig)
        return evaluate(config, folder, named, kept_pictures)
