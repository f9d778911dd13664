"""`tokenprune eval`: a model's answers with its visual tokens pruned, once or in a sweep."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from tokenprune.cli.jobs import Job, names, quiet, tell, tidy
from tokenprune.evaluation.metrics import build_metric
from tokenprune.runs import results
from tokenprune.runs.compose import entries, plain
from tokenprune.runs.devices import check_nodes
from tokenprune.runs.tabulation import listed
from tokenprune.runs.targets import load_imports


def main(arguments: Sequence[str]) -> int:
    """Runs the command; the exit code."""
    return Job("eval", _task, _check, "tokenprune.evaluation.run", _wanted, _complete).run(
        arguments
    )


def _check(config: DictConfig) -> None:
    build_metric(config.metric)
    listed(config.baseline)
    check_nodes(entries(config.trainer, ("num_nodes",)))


def _wanted(config: DictConfig) -> tuple[str, str]:
    return "accuracy", "maximize"


def _complete(config: DictConfig, folder: Path) -> bool:
    load_imports(config)
    resolved = plain(config)
    return results.changes(folder, resolved, results.fingerprint(resolved)) == []


def _task(config: DictConfig) -> float:
    """Evaluates; returns the accuracy, for sweepers that search."""
    folder = Path(HydraConfig.get().runtime.output_dir)
    with tidy(folder), quiet():
        from tokenprune.evaluation.run import evaluate

        load_imports(config)
        resolved = plain(config)
        changes = results.changes(folder, resolved, results.fingerprint(resolved))
        metrics = evaluate(config, folder, names(resolved))
        tell(folder, metrics, changes)
    return float(metrics["accuracy"])
