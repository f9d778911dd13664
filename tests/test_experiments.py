"""The paper's experiments: configs that compose and fit together, tables that are their CSVs'."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from tokenprune.cli.configs import compose
from tokenprune.runs.compose import build_pruning, describe
from tokenprune.runs.sweeps import expand, run_names

PAPER = Path(__file__).parent.parent / "experiments" / "paper"
COMMANDS = {"training": "train", "inference": "eval", "one_cut": "eval", "steps": "bench"}
NUM_LAYERS = 8


def jobs(name: str) -> list[list[str]]:
    """Overrides of all runs of a sweep."""
    config: Any = OmegaConf.load(PAPER / "experiment" / f"{name}.yaml")
    grids: Any = OmegaConf.to_container(config.hydra.sweeper.grids)
    return expand(grids, [])


def composed(name: str, job: list[str]) -> Any:
    return compose(COMMANDS[name], [f"experiment={name}", *job], str(PAPER))


def test_every_experiment_has_a_command() -> None:
    assert {path.stem for path in (PAPER / "experiment").glob("*.yaml")} == set(COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_a_file_describes_itself(name: str) -> None:
    assert 10 <= len(describe(PAPER / "experiment" / f"{name}.yaml")) <= 110


@pytest.mark.parametrize("name", ["inference", "one_cut"])
@pytest.mark.share(2)
def test_models_come_from_the_trainings(name: str) -> None:
    trained = {f"outputs/paper/training/{folder}/model" for folder in run_names(jobs("training"))}
    # The two overrides that name a model; the others are another test's.
    chosen = {tuple(o for o in job if o.startswith(("trained=", "seed="))) for job in jobs(name)}
    paths = {composed(name, list(job)).model.path for job in chosen}
    assert len(paths) == len(chosen)
    assert paths == trained if name == "inference" else paths < trained


@pytest.mark.matrix
def test_trainings_differ_in_schedule_and_seed_only() -> None:
    schedules: dict[Any, set[int]] = {}
    rest = []
    for job in jobs("training"):
        config = composed("training", job)
        pruning = build_pruning(config, NUM_LAYERS)
        key = None if pruning is None else pruning.schedule
        schedules.setdefault(key, set()).add(config.seed)
        rest.append((config.positions, config.learning_rate, config.trainer.max_steps))
    assert len(schedules) == 4
    assert set(map(tuple, schedules.values())) == {(0, 1, 2)}
    assert set(rest) == {("original", 1e-4, 300)}


@pytest.mark.matrix
def test_every_model_meets_every_schedule() -> None:
    met: dict[tuple[str, ...], set[Any]] = {}
    schedules: dict[tuple[str, ...], Any] = {}
    for job in jobs("inference"):
        own = tuple(o for o in job if o.startswith(("strategy", "schedule")))
        met.setdefault(own, set()).add(tuple(set(job) - set(own)))
        if own not in schedules:
            pruning = build_pruning(composed("inference", list(own)), NUM_LAYERS)
            assert pruning is None or pruning.positions == "original"
            schedules[own] = None if pruning is None else (pruning.strategy, pruning.schedule)
    assert len(set(schedules.values())) == len(schedules) == 6
    assert {len(models) for models in met.values()} == {12}


@pytest.mark.matrix
def test_steps_are_timed_under_the_schedules_of_the_trainings() -> None:
    timed = {str(composed("steps", job).schedule) for job in jobs("steps")}
    trained = [composed("training", job) for job in jobs("training")]
    assert timed == {str(config.schedule) for config in trained if config.strategy is not None}


def test_the_tables_are_those_of_the_runs() -> None:
    spec = importlib.util.spec_from_file_location("paper", PAPER / "publish.py")
    assert spec is not None
    assert spec.loader is not None
    publish = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(publish)
    assert publish.tables() == (PAPER / "results" / "tables.md").read_text(encoding="utf-8")
