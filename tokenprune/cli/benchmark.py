"""`tokenprune benchmark`: tasks of lmms-eval on a pruned model, once or in a sweep."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from tokenprune.cli.jobs import Job, check_own, names, quiet, tell, tidy, told
from tokenprune.runs import results
from tokenprune.runs.compose import plain
from tokenprune.runs.tabulation import listed
from tokenprune.runs.targets import load_imports

_FORMS = ("chat", "simple")


def main(arguments: Sequence[str]) -> int:
    """Runs the command; the exit code."""
    needs = "tokenprune.evaluation.benchmark"
    return Job("benchmark", _task, _check, needs, _wanted, _complete).run(arguments)


def _check(config: DictConfig) -> None:
    listed(config.baseline)
    tasks = config.tasks
    if not OmegaConf.is_list(tasks) or not tasks or not all(isinstance(t, str) for t in tasks):
        raise ValueError(
            f"tasks: expected names of lmms-eval's tasks, got {tasks!r}. Write tasks=[pope,mme]."
        )
    for key, lowest in (("batch_size", 1), ("limit", 1)):
        value = config[key]
        optional = key == "limit" and value is None
        if not optional and (
            isinstance(value, bool) or not isinstance(value, int) or value < lowest
        ):
            raise ValueError(f"{key}: expected an integer >= {lowest}, got {value!r}. Set {key}=8.")
    if config.form not in _FORMS:
        raise ValueError(
            f"form: expected one of {list(_FORMS)}, got {config.form!r}. chat is what lmms-eval "
            "prefers."
        )
    folder = config.include_path
    if folder is not None and not Path(folder).expanduser().is_dir():
        raise ValueError(
            f"include_path: expected a folder of tasks, got {folder!r}. Check the path."
        )
    if find_spec("lmms_eval") is None:
        raise ValueError(
            "benchmark: expected lmms-eval to be installed, got no such package. "
            "Install it: pip install 'tokenprune-vlm[harness]'."
        )


def _wanted(config: DictConfig) -> tuple[str, str]:
    return "accuracy", "maximize"


def _complete(config: DictConfig, folder: Path) -> bool:
    from tokenprune.evaluation.benchmark import fingerprint

    load_imports(config)
    resolved = plain(config)
    return results.changes(folder, resolved, fingerprint(resolved)) == []


def _task(config: DictConfig) -> float:
    """Runs the tasks; returns the mean of their values, for sweepers that search."""
    folder = Path(HydraConfig.get().runtime.output_dir)
    with tidy(folder), quiet():
        from tokenprune.evaluation.benchmark import benchmark, fingerprint, names_of_tasks

        load_imports(config)
        resolved = plain(config)
        check_own(folder, resolved)
        changes = results.changes(folder, resolved, fingerprint(resolved))
        named = names(resolved) | {"data": names_of_tasks(resolved["tasks"])}
        metrics = benchmark(config, folder, named)
    with told(folder):  # nothing that goes wrong from here on costs the run
        if metrics is None:
            raise ValueError(
                "tasks: expected at least one whose metric is a share of the best, got none. "
                f"{folder / 'harness/results.json'} has what lmms-eval says."
            )
        tell(folder, metrics, changes)
    return float(metrics["accuracy"])
