"""A search: Optuna chooses the values of runs, and is told what became of them.

The study is a file in the sweep's folder. What an end in the middle has left open is done first
when the command is given once more.
"""

from __future__ import annotations

import importlib
import json
import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.core.config_loader import ConfigLoader
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override, RangeSweep
from hydra.plugins.launcher import Launcher
from omegaconf import DictConfig

from tokenprune.cli.collect import tabulate
from tokenprune.cli.launching import own_names, refuse, start
from tokenprune.cli.mistakes import BadInput, unknown
from tokenprune.runs.folders import occupied
from tokenprune.runs.sweeps import run_name

STUDY = ".study"  # a folder, which one search at a time holds
#: What is better, less or more of it, by its name.
WAYS = {
    **dict.fromkeys(("accuracy", "val_accuracy"), "maximize"),
    **dict.fromkeys(("tflops", "tflops_ratio", "flops_ratio"), "minimize"),
    **dict.fromkeys(("avg_tokens", "final_tokens", "kv_mb", "pruned_kv_mb"), "minimize"),
    **dict.fromkeys(("prefill_ms", "pruned_ms", "time_ratio", "val_loss"), "minimize"),
}
SAMPLERS = ("tpe", "nsgaii", "random")
_RESULTS = ("metrics.json", "bench.json", "training.json")
_DIGITS = 4  # of a value between two ends, so that a run's folder has a name to read


@dataclass(frozen=True)
class Settings:
    """How to search: see configs/search/optuna.yaml."""

    n_trials: int
    at_once: int
    objectives: Sequence[str]
    sampler: str
    seed: int


def check_search(settings: Mapping[str, Any], arguments: Sequence[str]) -> None:
    """Refuses what cannot be searched, before anything is loaded or written.

    Args:
        settings: The sweeper's own config.
        arguments: Overrides of the command line.

    Raises:
        BadInput: Something is wrong with them.
    """
    for key in ("n_trials", "at_once"):
        value = settings[key]
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise BadInput(
                f"hydra.sweeper.{key}: expected an integer >= 1, got {value!r}. "
                f"Set hydra.sweeper.{key}=30."
            )
    if settings["sampler"] not in SAMPLERS:
        raise BadInput(unknown("hydra.sweeper.sampler", str(settings["sampler"]), SAMPLERS))
    for name in settings["objectives"] or ():
        if name not in WAYS:
            raise BadInput(unknown("hydra.sweeper.objectives", str(name), list(WAYS)))
    parsed = OverridesParser.create().parse_overrides(list(arguments))
    if not any(override.is_sweep_override() for override in parsed):
        raise BadInput(
            "search: expected values to choose from, got none. Add strategy=fastv,random or "
            "'schedule.lam=interval(0.2,0.8)'."
        )


def search(
    config: DictConfig,
    launcher: Launcher,
    loader: ConfigLoader,
    work: Any,
    arguments: Sequence[str],
    settings: Settings,
) -> list[Any]:
    """Runs trials until there are as many as asked for; writes the tables, prints the best.

    Args:
        config: The sweep's, with the node `hydra`.
        launcher: Set up.
        loader: Composes the configs of runs.
        work: What is run.
        arguments: Overrides; those that sweep are the space.
        settings: How to search.

    Raises:
        BadInput: Some trials failed; or another search is at work in the folder.
    """
    optuna: Any = importlib.import_module("optuna")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    folder = Path(config.hydra.sweep.dir)
    space, fixed = _space(arguments, optuna)
    names: list[str] = []
    failed: dict[str, str] = {}
    num_failed = 0  # a choice may fail more than once
    with ExitStack() as stack:
        stack.enter_context(occupied(folder / STUDY))
        study = optuna.create_study(
            storage=f"sqlite:///{folder / STUDY}/study.db",
            study_name="search",
            directions=[WAYS[name] for name in settings.objectives],
            load_if_exists=True,
        )
        _check_same(study, {"objectives": list(settings.objectives), "of": run_name(fixed)}, folder)
        _resume(study, optuna)
        study.sampler = _sampler(settings, len(study.trials), optuna)
        while (left := settings.n_trials - _num_done(study, optuna)) > 0:
            trials = [study.ask(space) for _ in range(min(left, settings.at_once))]
            jobs = [[*fixed, *_overrides(trial.params)] for trial in trials]
            own = [run_name(job) for job in jobs]
            own = own_names(config, loader, work, jobs, own)
            for trial, name in zip(trials, own, strict=True):
                trial.set_user_attr("run", name)
            different = dict(zip(own, jobs, strict=True))  # a choice may come twice
            try:
                returned, wrong = start(
                    config,
                    launcher,
                    loader,
                    work,
                    list(different.values()),
                    list(different),
                    first=trials[0].number,
                )
            except SystemExit:  # a run here that failed has been told
                for trial in trials:
                    study.tell(trial, state=optuna.trial.TrialState.FAIL)
                raise
            told: dict[str, list[float]] = {}
            try:
                for name in different:
                    if name not in wrong:
                        told[name] = _values(folder / name, returned.get(name), settings.objectives)
            finally:  # no trial stays open, to come again, for what a run did not come to
                for trial, name in zip(trials, own, strict=True):
                    if told.get(name):
                        study.tell(trial, told[name])
                    else:
                        study.tell(trial, state=optuna.trial.TrialState.FAIL)
            names += own
            failed |= wrong
            num_failed += sum(not told.get(name) for name in own)
            if num_failed >= settings.n_trials:
                break
        done = study.get_trials(states=[optuna.trial.TrialState.COMPLETE])
        tabulate(folder, [trial.user_attrs["run"] for trial in done], config.get("baseline"))
        for trial in study.best_trials if done else ():
            values = zip(settings.objectives, trial.values, strict=True)
            best = ", ".join(f"{name} {value:.4g}" for name, value in values)
            print(f"best: {trial.user_attrs['run']}: {best}", flush=True)
    refuse(failed, len(names))
    return []


def _check_same(study: Any, asked: dict[str, Any], folder: Path) -> None:
    """Refuses to go on with trials of other runs, or to other ends.

    Raises:
        BadInput: The study has these.
    """
    known = study.user_attrs.get("asked", asked)
    if known != asked:
        raise BadInput(
            f"hydra.sweep.dir: expected the folder of a search for {asked['objectives']} of "
            f"{asked['of']}, got {str(folder)!r}, which has one for {known['objectives']} of "
            f"{known['of']}. Choose another folder."
        )
    study.set_user_attr("asked", asked)


def _space(arguments: Sequence[str], optuna: Any) -> tuple[dict[str, Any], list[str]]:
    """Distributions by key, and the overrides that stay."""
    space, fixed = {}, []
    for override in OverridesParser.create().parse_overrides(list(arguments)):
        if override.is_sweep_override():
            space[override.get_key_element()] = _distribution(override, optuna.distributions)
        else:
            fixed.append(str(override.input_line))
    return space, fixed


def _distribution(override: Override, kinds: Any) -> Any:
    value: Any = override.value()
    if isinstance(value, IntervalSweep):
        low: Any = value.start
        high: Any = value.end
        whole = isinstance(low, int) and isinstance(high, int)
        kind = kinds.IntDistribution if whole else kinds.FloatDistribution
        return kind(low, high, log="log" in value.tags)
    if isinstance(value, RangeSweep):
        ends: Any = (value.start, value.stop, value.step)
        if all(isinstance(end, int) for end in ends) and len(range(*ends)):
            return kinds.IntDistribution(ends[0], range(*ends)[-1], step=ends[2])
    return kinds.CategoricalDistribution(list(override.sweep_string_iterator()))


def _overrides(params: Mapping[str, Any]) -> list[str]:
    return [
        f"{key}={float(f'{value:.{_DIGITS}g}') if isinstance(value, float) else value}"
        for key, value in params.items()
    ]


def _sampler(settings: Settings, num_trials: int, optuna: Any) -> Any:
    seed = settings.seed + num_trials  # or a search that goes on would choose the same again
    if settings.sampler == "tpe":
        return optuna.samplers.TPESampler(seed=seed)
    kind = {"nsgaii": optuna.samplers.NSGAIISampler, "random": optuna.samplers.RandomSampler}
    return kind[settings.sampler](seed=seed)


def _resume(study: Any, optuna: Any) -> None:
    """Has trials that an end in the middle has left open done anew."""
    for trial in study.get_trials(states=[optuna.trial.TrialState.RUNNING]):
        study.tell(trial.number, state=optuna.trial.TrialState.FAIL)
        study.enqueue_trial(trial.params)


def _num_done(study: Any, optuna: Any) -> int:
    return len(study.get_trials(states=[optuna.trial.TrialState.COMPLETE]))


def _values(folder: Path, returned: Any, names: Sequence[str]) -> list[float]:
    """What a run came to, by metrics' names; none of it, and a line that says why, where one has
    no number: it ran out of memory, or diverged.

    Raises:
        BadInput: It has no such metric.
    """
    files = [folder / name for name in _RESULTS if (folder / name).is_file()]
    found = {k: v for file in files for k, v in json.loads(file.read_text("utf-8")).items()}
    values: list[float] = []
    for name in names:
        own: Any = found.get(name)
        if name.startswith("val_"):
            own = found.get("validation", {}).get(name.removeprefix("val_"), returned)
        is_number = isinstance(own, int | float) and not isinstance(own, bool)
        if is_number and math.isfinite(own):
            values.append(float(own))
        elif is_number or found.get("status", "ok") != "ok":
            why = f"{name} is {own}" if is_number else found["status"]
            print(f"{folder.name}: counts as failed, {why}", flush=True)
            return []
        else:
            raise BadInput(
                f"hydra.sweeper.objectives: expected a number, got {own!r} for {name!r} in "
                f"{folder}. Name another of {list(WAYS)}, and another hydra.sweep.dir."
            )
    return values
