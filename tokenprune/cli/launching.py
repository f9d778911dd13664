"""The runs of a sweep: started by Hydra's launcher, tabulated, and told where they failed.

In this process one run after another, until one fails. In other processes (`launcher=joblib`) only
what is missing is started, all of it is waited for, and what failed is told in the end.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.core.config_loader import ConfigLoader
from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobStatus
from hydra.plugins.launcher import Launcher
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict, read_write

from tokenprune.cli import process
from tokenprune.cli.collect import tabulate
from tokenprune.cli.mistakes import BadInput, explain, one_line
from tokenprune.runs import results, targets
from tokenprune.runs.compose import plain
from tokenprune.runs.folders import LOCK
from tokenprune.runs.tabulation import finish_sweep

_NUM_NAMED = 5


@dataclass(frozen=True)
class Work:
    """What Hydra runs: a command's task.

    Attributes:
        task: Does one run.
        complete: Whether a folder holds a config's run, complete; None where only the run can say.
        trains: Whether all of a trainer's config makes a run, see `results.changes`.
    """

    task: Callable[[DictConfig], Any]
    complete: Callable[[DictConfig, Path], bool] | None = None
    trains: bool = False

    def __call__(self, config: DictConfig) -> Any:
        if not here():
            process.outlive()
        return self.task(config)


def here(config: DictConfig | None = None) -> bool:
    """Whether runs are this process's own, rather than of those that a launcher starts.

    Args:
        config: Has the node `hydra`; None for the run that is at work.
    """
    hydra = HydraConfig.get() if config is None else config.hydra
    basic = str(hydra.launcher._target_).endswith(".BasicLauncher")
    return basic or hydra.mode != RunMode.MULTIRUN


def run_all(
    config: DictConfig,
    launcher: Launcher,
    loader: ConfigLoader,
    work: Any,
    jobs: Sequence[Sequence[str]],
    names: Sequence[str],
) -> None:
    """Runs the jobs of a sweep and writes its tables; arguments as for `start`.

    Raises:
        BadInput: Some did not run to their end in other processes.
    """
    names = own_names(config, loader, work, jobs, names)
    _, failed = start(config, launcher, loader, work, jobs, names)
    folder, baseline = Path(config.hydra.sweep.dir), config.get("baseline")
    if here(config):  # a measurement has written its own
        finish_sweep(folder, names, baseline)
    else:
        tabulate(folder, names, baseline)
    refuse(failed, len(jobs))


def own_names(
    config: DictConfig,
    loader: ConfigLoader,
    work: Any,
    jobs: Sequence[Sequence[str]],
    names: Sequence[str],
) -> list[str]:
    """The folders of a sweep's runs: beside those that hold other runs of the same names.

    Two experiments may share a sweep's folder and have a run `none` each, of other models.
    """
    folder, found, told = Path(config.hydra.sweep.dir), list(names), dict[str, None]()
    trains = getattr(work, "trains", False)
    for number, (job, name) in enumerate(zip(jobs, names, strict=True)):
        if not (folder / name / results.CONFIG).is_file():
            continue
        own = _compose(config, loader, _call(job, name), folder / name)
        targets.load_imports(own)
        resolved = plain(own)
        if differing := results.others(folder / name, resolved, not trains):
            place = results.beside(folder / name, resolved, not trains)
            found[number] = str(place.relative_to(folder))
            told |= dict.fromkeys(differing)
    HydraConfig.instance().set_config(config)
    if moved := [name for name, first in zip(found, names, strict=True) if name != first]:
        print(
            f"{len(moved)} of {len(jobs)} runs: beside others of their names, which have another "
            f"{', '.join(told)}, in folders such as {moved[0]}",
            flush=True,
        )
    return found


def _call(job: Sequence[str], name: str) -> list[str]:
    """The overrides of a run in its folder."""
    return [*job, f"hydra.sweep.subdir='{name}'"]


def _compose(config: DictConfig, loader: ConfigLoader, call: list[str], folder: Path) -> DictConfig:
    """The config of a run in a folder, which Hydra's own node is told, as its task is given it."""
    own = loader.load_sweep_config(config, call)
    with read_write(own.hydra.runtime), open_dict(own.hydra.runtime):
        own.hydra.runtime.output_dir = str(folder.absolute())  # entries may refer to it
    HydraConfig.instance().set_config(own)
    OmegaConf.set_struct(own, False)
    del own["hydra"]
    return own


def start(
    config: DictConfig,
    launcher: Launcher,
    loader: ConfigLoader,
    work: Any,
    jobs: Sequence[Sequence[str]],
    names: Sequence[str],
    first: int = 0,
) -> tuple[dict[str, Any], dict[str, str]]:
    """Runs jobs.

    Args:
        config: The sweep's, with the node `hydra`.
        launcher: Set up.
        loader: Composes the configs of runs.
        work: What is run, of which Hydra need not know that it is `Work`.
        jobs: Overrides of every run.
        names: Their folders in that of the sweep.
        first: The number of the first.

    Returns:
        What those returned that were started, and why those failed that did, in other processes;
        by name. In this process a failure is raised.
    """
    folder = Path(config.hydra.sweep.dir)
    calls = [_call(job, name) for job, name in zip(jobs, names, strict=True)]
    if here(config):
        done = launcher.launch(calls, initial_job_idx=first)
        # The property raises what the job raised.
        return {name: job.return_value for name, job in zip(names, done, strict=True)}, {}

    def complete(number: int) -> bool:
        known = getattr(work, "complete", None)
        if known is None or not (folder / names[number]).is_dir():
            return False
        own = _compose(config, loader, calls[number], folder / names[number])
        return bool(known(own, folder / names[number]))

    missing = [number for number in range(len(jobs)) if not complete(number)]
    if len(missing) < len(jobs):
        print(f"{len(jobs) - len(missing)} of {len(jobs)} runs: complete already", flush=True)
    HydraConfig.instance().set_config(config)
    returned: dict[str, Any] = {}
    failed: dict[int, str] = {}
    try:
        calls_left = [calls[number] for number in missing]
        done = launcher.launch(calls_left, initial_job_idx=first) if missing else []
        for number, job in zip(missing, done, strict=True):
            if job.status == JobStatus.FAILED:
                failed[number] = _reason(job._return_value)
            else:
                returned[names[number]] = job.return_value
    except (Exception, SystemExit) as error:
        if explain(error) is not None:
            raise
        why = _reason(error)
        begun = {number for number in missing if (folder / names[number] / LOCK).exists()}
        # Of those that leave no sign of their end, what has begun is all that is known.
        unknown = begun and getattr(work, "complete", None) is None
        failed = {
            number: why if number in begun or not begun else f"not done, {why}"
            for number in missing
            if number in begun or not unknown
        }
    return returned, {names[n]: why for n, why in failed.items() if not complete(n)}


def refuse(failed: Mapping[str, str], num_runs: int) -> None:
    """Tells which runs failed.

    Args:
        failed: Why, by name.
        num_runs: How many there were.

    Raises:
        BadInput: There are any.
    """
    if failed:
        told = [f"{name}: {why}" for name, why in list(failed.items())[:_NUM_NAMED]]
        more = f"; and {len(failed) - _NUM_NAMED} more" if len(failed) > _NUM_NAMED else ""
        raise BadInput(
            f"sweep: expected {num_runs} complete runs, got {len(failed)} that failed: "
            f"{'; '.join(told)}{more}. The same command runs only what is missing."
        )


def _reason(error: Any) -> str:
    """Why a run failed, in one line without a full stop."""
    told = explain(error) if isinstance(error, BaseException) else None
    if told is None:
        text = str(error).strip()
        kind = type(error).__name__
        said = "took longer than hydra.launcher.timeout allows" if kind == "TimeoutError" else text
        told = said if kind == "RuntimeError" and text.startswith("job ") else f"{kind}: {said}"
    return one_line(told).rstrip(".")
