"""`search=optuna`: which values are tried, what is told of them, and how a search goes on."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import optuna
import pytest
from commands import refused
from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher
from omegaconf import DictConfig, OmegaConf
from synthetic_sweep import plan, write_run

from tokenprune.cli import searching
from tokenprune.cli.configs import compose
from tokenprune.cli.mistakes import BadInput
from tokenprune.cli.searching import Settings, search
from tokenprune.runs.folders import occupied

SPACE = ["search=optuna", "schedule=pyramid", "strategy=fastv,random",
         "schedule.lam=interval(0.2,0.8)", "schedule.num_stages=range(2,5,2)"]  # fmt: skip
BOTH = ("accuracy", "tflops_ratio")


class Made(Launcher):
    """Writes made-up runs; the one of number `ends` fails, or is interrupted."""

    def __init__(self, ends: int | None = None, error: BaseException | None = None) -> None:
        self.ends, self.error, self.launched = ends, error, list[list[str]]()

    def setup(self, **_: object) -> None:
        """Nothing."""

    def launch(
        self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
    ) -> Sequence[JobReturn]:
        found = []
        for job in job_overrides:
            self.launched.append(list(job))
            if len(self.launched) - 1 == self.ends:
                assert self.error is not None
                if not isinstance(self.error, Exception):
                    raise self.error
                found.append(JobReturn(status=JobStatus.FAILED, _return_value=self.error))
                continue
            given = dict(part.split("=", 1) for part in job)
            lam, stages = float(given["schedule.lam"]), int(given["schedule.num_stages"])
            layers = [8 * s // stages for s in range(1, stages)]
            keeps = [lam**s for s in range(1, stages)]
            name = Path(given["hydra.sweep.subdir"].strip("'"))
            run = plan(given["strategy"], "pyramid", layers, keeps, lam=lam, num_stages=stages)
            Path("made").mkdir(exist_ok=True)
            row = write_run(Path("made"), {**run, "seed": len(self.launched)}, 0)
            Path("made", row["run"]).rename(Path("sweep") / name)
            found.append(JobReturn(status=JobStatus.COMPLETED, _return_value=row["accuracy"]))
        return found


def trials(launcher: Made, n_trials: int, *, at_once: int = 1, **more: Any) -> optuna.Study:
    """Searches until there are so many trials; the study."""
    own = ["launcher=joblib", "hydra.mode=MULTIRUN", "hydra.sweep.dir=sweep"]
    config = compose("eval", own, hydra=True)
    settings = Settings(n_trials, at_once, more.pop("objectives", BOTH), "tpe", seed=0)

    class Fake:
        def load_sweep_config(self, master: DictConfig, job: list[str]) -> DictConfig:
            return OmegaConf.create({"hydra": config.hydra})

    loader: Any = Fake()
    search(config, launcher, loader, None, SPACE, settings)
    return study()


def study() -> optuna.Study:
    return optuna.load_study(study_name="search", storage="sqlite:///sweep/.study/study.db")


def rows() -> list[dict[str, str]]:
    with Path("sweep/results.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_every_trial_is_a_row_and_the_best_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    found = trials(launcher := Made(), 6, at_once=2)
    assert [d.name for d in found.directions] == ["MAXIMIZE", "MINIMIZE"]
    assert [trial.user_attrs["run"] for trial in found.trials] == [row["run"] for row in rows()]
    for trial, row, job in zip(found.trials, rows(), launcher.launched, strict=True):
        assert trial.values == [float(row["accuracy"]), float(row["tflops_ratio"])]
        assert 0.2 <= trial.params["schedule.lam"] <= 0.8
        assert trial.params["schedule.num_stages"] in (2, 4)
        assert float(row["lam"]) == pytest.approx(trial.params["schedule.lam"], rel=1e-3)
        assert {"search=optuna", "schedule=pyramid"} <= set(job)
    printed = capsys.readouterr().out
    assert printed.count("best: ") == len(found.best_trials)
    assert all(f"best: {t.user_attrs['run']}: accuracy " in printed for t in found.best_trials)


def test_a_search_goes_on() -> None:
    trials(Made(), 3)
    assert len(trials(launcher := Made(), 5).trials) == 5
    assert len(launcher.launched) == 2
    values = [trial.params["schedule.lam"] for trial in study().trials]
    assert len(set(values)) == 5  # nothing is chosen as if it were the first time
    assert len(rows()) == 5
    assert len(trials(launcher, 5).trials) == 5


def test_an_interrupted_trial_is_done_first() -> None:
    with pytest.raises(KeyboardInterrupt):
        trials(first := Made(1, KeyboardInterrupt()), 3)
    trials(second := Made(), 3)
    given = [part for part in first.launched[1] if part.startswith("schedule.lam=")]
    assert given[0] in second.launched[0]
    states = [trial.state.name for trial in study().trials]
    assert (states.count("COMPLETE"), states.count("FAIL")) == (3, 1)
    assert len(rows()) == 3


def test_a_trial_that_fails_is_named_and_replaced() -> None:
    with pytest.raises(BadInput, match=r"got 1 that failed: \w+,pyramid,.*: memory: expected 1"):
        trials(Made(1, BadInput("memory: expected 1, got 2. Do.")), 3)
    assert len(rows()) == 3


def test_one_search_at_a_time() -> None:
    with occupied(Path("sweep/.study")), pytest.raises(ValueError, match="another run is at work"):
        trials(Made(), 1)


def test_one_aim_alone() -> None:
    found = trials(Made(), 4, objectives=("avg_tokens",))
    assert found.best_value == min(float(row["avg_tokens"]) for row in rows())


def test_an_aim_that_a_run_does_not_have() -> None:
    with pytest.raises(BadInput, match=r"hydra.sweeper.objectives: expected a number, got None"):
        trials(Made(), 1, objectives=("accuracy", "time_ratio"))


def test_values_of_trainings(tmp_path: Path) -> None:
    (tmp_path / "training.json").write_text(json.dumps({"validation": {"loss": 0.5}}))
    assert searching._values(tmp_path, 0.25, ("val_loss", "val_accuracy")) == [0.5, 0.25]


class Measured(Made):
    """Runs are measurements, too: those of `without` have none."""

    def __init__(self, *without: int, found: dict[str, Any]) -> None:
        super().__init__()
        self.without, self.found = without, found

    def launch(
        self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
    ) -> Sequence[JobReturn]:
        first = len(self.launched)
        done = super().launch(job_overrides, initial_job_idx)
        for number, job in enumerate(job_overrides, first):
            name = dict(part.split("=", 1) for part in job)["hydra.sweep.subdir"].strip("'")
            found = self.found if number in self.without else {"status": "ok", "time_ratio": 0.5}
            Path("sweep", name, "training.json").write_text(json.dumps(found))
        return done


@pytest.mark.parametrize(
    ("found", "why"),
    [
        ({"status": "out of memory"}, "counts as failed, out of memory"),
        ({"status": "ok", "time_ratio": float("nan")}, "counts as failed, time_ratio is nan"),
    ],
)
def test_a_trial_without_a_number_counts_as_failed(
    found: dict[str, Any], why: str, capsys: pytest.CaptureFixture[str]
) -> None:
    objectives = ("time_ratio", "avg_tokens")
    own = trials(Measured(1, found=found), 3, at_once=2, objectives=objectives)
    states = [trial.state.name for trial in own.trials]
    assert (states.count("COMPLETE"), states.count("FAIL"), len(states)) == (3, 1, 4)
    assert capsys.readouterr().out.count(why) == 1
    # Given once more, there is nothing left to do.
    assert len(trials(again := Made(), 3, objectives=objectives).trials) == 4
    assert not again.launched


def test_a_search_of_which_nothing_has_a_number_ends() -> None:
    own = trials(
        launcher := Measured(*range(9), found={"status": "out of memory"}),
        3,
        objectives=("time_ratio",),
    )
    assert [trial.state.name for trial in own.trials] == ["FAIL"] * 3
    assert len(launcher.launched) == 3


def test_an_aim_that_is_not_there_leaves_no_trial_open() -> None:
    with pytest.raises(BadInput, match=r"another hydra\.sweep\.dir"):
        trials(Made(), 2, at_once=2, objectives=("pruned_ms",))
    assert "RUNNING" not in {trial.state.name for trial in study().trials}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([], "search: expected values to choose from, got none"),
        (["seed=0,1", "hydra.sweeper.n_trials=0"], "hydra.sweeper.n_trials: expected an integer"),
        (["seed=0,1", "hydra.sweeper.sampler=tpee"], "Did you mean 'tpe'?"),
        (["seed=0,1", "hydra.sweeper.objectives=[acuracy]"], "Did you mean 'accuracy'?"),
        (["seed=0,1", "search=optunaa"], "search: expected one of ['optuna'"),
    ],
)
def test_mistakes(overrides: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert message in refused(["eval", "-m", "search=optuna", *overrides], capsys)


def test_without_optuna(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("tokenprune.cli.checks.find_spec", lambda name: None)
    message = refused(["eval", "-m", "search=optuna", "seed=0,1"], capsys)
    assert "pip install 'tokenprune-vlm[search]'" in message
