"""Sweeps in several processes on this machine; on Slurm: tests/cluster."""

from __future__ import annotations

import csv
import os
import pickle
import signal
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from subprocess import PIPE

import pytest
from commands import COMMAND, random_llava, refused
from hydra._internal.hydra import Hydra
from hydra._internal.utils import create_automatic_config_search_path
from hydra.core.global_hydra import GlobalHydra
from hydra.core.utils import JobReturn, JobStatus
from hydra.errors import ConfigCompositionException
from hydra.plugins.launcher import Launcher
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from processes import run, started

from tokenprune.cli import launching
from tokenprune.cli import main as cli
from tokenprune.cli.configs import compose, compose_all
from tokenprune.cli.loader import Loader
from tokenprune.cli.mistakes import BadInput
from tokenprune.runs.compose import config_dir
from tokenprune.runs.sweeps import run_name, sweep_name

FEW = ["max_new_tokens=2", "num_pictures=0", "data.batch_size=4", "data.test.num_samples=8"]
LAUNCHERS = ("joblib", "submitit_local", "slurm", "ray")


# --------------------------------------------------------------- which launcher, and where


@pytest.mark.parametrize("launcher", LAUNCHERS)
@pytest.mark.parametrize("command", ["eval", "train", "bench", "benchmark"])
@pytest.mark.share(4)
def test_every_launcher_composes(command: str, launcher: str) -> None:
    whole = compose(command, [f"launcher={launcher}"], hydra=True)
    assert whole.hydra.launcher._target_.startswith("hydra_plugins.")
    assert "launcher" not in compose(command, [f"launcher={launcher}"])  # no part of a run


@pytest.mark.parametrize(
    ("launcher", "module", "extra"),
    [
        ("joblib", "hydra_plugins.hydra_joblib_launcher", "launchers"),
        ("submitit_local", "submitit", "launchers"),
        ("slurm", "submitit", "launchers"),
        ("ray", "hydra_plugins.hydra_ray_launcher", "ray"),
    ],
)
def test_one_that_is_not_installed_names_its_extra(
    launcher: str,
    module: str,
    extra: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("tokenprune.cli.checks.find_spec", lambda name: None)
    message = refused(["eval", "-m", f"launcher={launcher}", "seed=0,1"], capsys)
    assert f"launcher: expected {module} to be installed for '{launcher}'" in message
    assert f"pip install 'tokenprune-vlm[{extra}]'" in message


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["launcher=joblib"], "launcher: expected a sweep, got launcher=joblib with a single run"),
        (["-m", "launcher=joblib,slurm"], "launcher: expected one, got 'joblib,slurm'"),
        (["-m", "launcher=slrum"], "launcher: expected one of ['joblib', 'ray', 'slurm'"),
    ],
)
def test_mistakes(overrides: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert message in refused(["eval", "seed=0", *overrides], capsys)


def test_slurm_where_there_is_none(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert cli.main(["eval", "-m", "launcher=slurm", "seed=0,1", "hydra.sweep.dir=sweep"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("tokenprune: launcher: expected Slurm's sbatch on this machine")
    assert error.count("\n") == 1


def test_where_runs_are_done_makes_no_other_runs() -> None:
    plain = ["eval", "strategy=fastv,random"]
    assert sweep_name([*plain, "launcher=slurm", "hydra.launcher.gpus=8"]) == sweep_name(plain)
    assert run_name(["strategy=fastv", "launcher=slurm", "search=optuna"]) == "fastv"


def test_configs_of_a_sweep_are_those_of_its_runs() -> None:
    jobs = [
        ["strategy=fastv", "schedule=pyramid", "schedule.lam=0.3", "seed=1"],
        ["strategy=fastv", "schedule=pyramid", "schedule.lam=0.5", "data.test.num_samples=null"],
        ["strategy=fastv", "schedule=pyramid", "schedule.layers=[2,4]", "+data.mine={a: 1}"],
        ["strategy=none", "seed=2", "metric='exact'"],
    ]
    for job, config in zip(jobs, compose_all("eval", jobs), strict=True):
        assert config == compose("eval", job)
    with pytest.raises(BadInput, match=r"schedule.lamm: expected a key of the config"):
        list(compose_all("eval", [["schedule.lam=0.3"], ["schedule.lamm=0.3"]]))


@pytest.mark.matrix
def test_hydra_s_loader_composes_the_same() -> None:
    """Of whatever a run's job may hold, the node `hydra` included."""
    path = create_automatic_config_search_path(None, None, str(config_dir()))
    hydra = Hydra.create_main_hydra2(task_name="eval", config_search_path=path)
    given = ["hydra.sweep.dir=sweep", "launcher=joblib", "hydra.mode=MULTIRUN"]
    master = hydra.compose_config("eval", given, RunMode.MULTIRUN, with_log_configuration=False)
    GlobalHydra.instance().clear()
    jobs = [
        ["strategy=fastv", "schedule=pyramid", "schedule.lam=0.3", "seed=1"],
        ["strategy=fastv", "schedule=pyramid", "schedule.lam=0.5", "seed=2", "launcher=joblib"],
        ["strategy=none", "+data.mine={a: 1}", "seed=3", "data.mine.a=2"],
        ["data.image_scale=0.5", "~data.image_scale", "metric='exact'"],
        ["schedule.layers=[2,4]", "data.test.num_samples=null", "++seed=${max_new_tokens}"],
    ]
    known = hydra.config_loader
    quick = pickle.loads(pickle.dumps(Loader(known)))
    for number, job in enumerate(jobs):
        own = [*job, f"hydra.sweep.subdir='run,{number}'"]
        mine, theirs = (each.load_sweep_config(master, own) for each in (quick, known))
        assert OmegaConf.to_yaml(mine) == OmegaConf.to_yaml(theirs)
        assert mine == theirs
    with pytest.raises(ConfigCompositionException, match=r"Could not override 'schedule\.lamm'"):
        quick.load_sweep_config(master, ["schedule.lamm=1"])


# ----------------------------------------------------------------------- what becomes of the runs


class Made(Launcher):
    """Does runs as told, in this process, as if they were others'."""

    def __init__(self, ends: dict[str, object]) -> None:
        self.ends, self.launched = ends, list[str]()

    def setup(self, **_: object) -> None:
        """Nothing."""

    def launch(
        self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
    ) -> Sequence[JobReturn]:
        found = []
        for name, *_ in job_overrides:
            self.launched.append(name)
            end = self.ends.get(name, 1.0)
            if name == "crash":
                Path("sweep/crash").mkdir(parents=True)
                Path("sweep/crash/.running").touch()
                raise RuntimeError("a worker was killed")
            failed = isinstance(end, Exception)
            status = JobStatus.FAILED if failed else JobStatus.COMPLETED
            found.append(JobReturn(status=status, _return_value=end))
        return found


def start(names: list[str], **ends: object) -> tuple[dict[str, object], dict[str, str], Made]:
    launcher = Made(ends)
    own = ["launcher=joblib", "hydra.mode=MULTIRUN", "hydra.sweep.dir=sweep"]
    config = compose("eval", own, hydra=True)

    class Fake:
        def load_sweep_config(self, master: DictConfig, job: list[str]) -> DictConfig:
            return OmegaConf.create({"name": job[0], "hydra": config.hydra})

    work = launching.Work(lambda config: 0, lambda config, folder: config.name == "whole")
    jobs = [[name] for name in names]
    loader: object = Fake()
    done = launching.start(config, launcher, loader, work, jobs, names)  # type: ignore[arg-type]
    return (*done, launcher)


def test_only_what_is_missing_is_launched(capsys: pytest.CaptureFixture[str]) -> None:
    Path("sweep/whole").mkdir(parents=True)
    Path("sweep/half").mkdir()
    returned, failed, launcher = start(["whole", "half", "new"])
    assert launcher.launched == ["half", "new"]
    assert (returned, failed) == ({"half": 1.0, "new": 1.0}, {})
    assert "1 of 3 runs: complete already" in capsys.readouterr().out


def test_those_that_fail_are_named_and_the_others_are_done() -> None:
    ours = BadInput("memory: expected 1, got 2. Do.")
    returned, failed, _ = start(["a", "b", "c"], a=ours, c=KeyError("x"))
    assert returned == {"b": 1.0}
    assert failed == {"a": "memory: expected 1, got 2. Do", "c": "KeyError: 'x'"}
    with pytest.raises(BadInput, match=r"expected 3 complete runs, got 2 that failed: a: mem.*; c"):
        launching.refuse(failed, 3)
    assert pickle.loads(pickle.dumps(ours)).args == ours.args  # as it comes from elsewhere


def test_a_launcher_that_ends_itself_leaves_the_run_at_work_named() -> None:
    _, failed, _ = start(["a", "crash", "b"])
    why = "RuntimeError: a worker was killed"
    assert failed == {"crash": why, "a": f"not done, {why}", "b": f"not done, {why}"}


def test_many_failures_take_one_line() -> None:
    failed = {f"run{number}": "no reason" for number in range(100)}
    with pytest.raises(BadInput, match=r"run4: no reason; and 95 more\. The same command"):
        launching.refuse(failed, 100)


# ------------------------------------------------------------------- processes themselves


def rows(folder: str) -> list[dict[str, str]]:
    with Path(folder, "results.csv").open(newline="") as file:
        found = list(csv.DictReader(file))
    return [{key: row[key] for key in row if key != "prefill_ms"} for row in found]


@pytest.fixture
def sweep(checkpoint: Path) -> list[str]:
    """Of runs that wait in their midst until there is a file `open`."""
    until = f"trainer.callbacks=[{{_target_:stops.Until,folder:{Path.cwd()}/gate}}]"
    Path("gate").mkdir()
    return ["eval", "-m", *random_llava(checkpoint), *FEW, until, "strategy=fastv,none,random"]


@pytest.mark.matrix
@pytest.mark.parametrize("launcher", ["joblib", "submitit_local"])
def test_killed_with_its_runs_and_started_again(
    launcher: str, sweep: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    Path("gate/open").touch()
    assert cli.main([*sweep, "hydra.sweep.dir=undisturbed"]) == 0
    for path in Path("gate").iterdir():
        path.unlink()
    command = [*COMMAND, *sweep, "hydra.sweep.dir=sweep", f"launcher={launcher}"]
    with started(command, stdout=PIPE, stderr=PIPE) as process:
        while len(list(Path("gate").iterdir())) < 2:
            assert process.poll() is None
        os.killpg(process.pid, signal.SIGKILL)
    assert not list(Path("sweep").rglob("metrics.json"))
    Path("gate/open").touch()
    run(command)
    assert rows("sweep") == rows("undisturbed")
    assert "3 of 3 runs: complete already" in run(command).stdout


@pytest.mark.matrix
def test_a_process_that_dies_is_one_line(sweep: list[str]) -> None:
    command = [*COMMAND, *sweep, "hydra.sweep.dir=sweep", "launcher=joblib"]
    with started(command, stdout=PIPE, stderr=PIPE) as process:
        while len(found := list(Path("gate").iterdir())) < 2:
            assert process.poll() is None
        os.kill(int(found[0].name.split("-")[1]), signal.SIGKILL)
        _, error = process.communicate(timeout=120)
    assert process.returncode == 2
    last = error.splitlines()[-1]
    assert last.startswith("tokenprune: sweep: expected 3 complete runs, got 3 that failed: ")
    assert "SIGKILL" in last


@pytest.mark.matrix
@pytest.mark.parametrize(
    ("launcher", "limit", "told"),
    [
        ("joblib", "hydra.launcher.timeout=30", "took longer than hydra.launcher.timeout allows"),
        ("submitit_local", "hydra.launcher.timeout_min=0.5", "over its time limit"),
    ],
)
def test_a_run_that_never_ends_is_named(
    launcher: str, limit: str, told: str, sweep: list[str]
) -> None:
    command = [*COMMAND, *sweep, "hydra.sweep.dir=sweep", f"launcher={launcher}", limit]
    done = run(command, code=2)
    last = done.stderr.splitlines()[-1]
    assert last.count(told) == 3
    assert "fastv" in last


@pytest.mark.matrix
def test_what_a_run_is_refused_for_comes_home(checkpoint: Path) -> None:
    few = [*random_llava(checkpoint), *FEW, "hydra.sweep.dir=sweep", "launcher=joblib"]
    wrong = "trainer.callbacks=[{_target_:stops.Refuse}],[]"
    done = run([*COMMAND, "eval", "-m", *few, wrong], code=2)
    assert "got 1 that failed: " in done.stderr
    assert "stops: expected nothing, got a run" in done.stderr
    assert len(rows("sweep")) == 1


@pytest.mark.matrix
def test_two_launchers_share_a_folder(sweep: list[str]) -> None:
    command = [*COMMAND, *sweep, "hydra.sweep.dir=sweep", "launcher=joblib"]
    with (
        started(command, stdout=PIPE, stderr=PIPE) as first,
        started(command, stdout=PIPE, stderr=PIPE) as second,
    ):
        while len(list(Path("gate").iterdir())) < 2:
            assert first.poll() is None
        Path("gate/open").touch()
        for process in (first, second):
            output, error = process.communicate(timeout=200)
            assert process.returncode == 0, output + error
    assert [row["strategy"] for row in rows("sweep")] == ["fastv", "none", "random"]
    assert len(list(Path("gate").glob("begun-*"))) == 3  # each once


@pytest.mark.matrix
@pytest.mark.skipif(find_spec("ray") is None, reason="Ray is not installed: 400 MB")
def test_ray(sweep: list[str]) -> None:
    Path("gate/open").touch()
    few = ["launcher=ray", "hydra.sweep.dir=sweep", "strategy=fastv,none"]
    run([*COMMAND, *sweep[:-1], *few], env=os.environ | {"RAY_AUTH_MODE": "disabled"})
    assert [row["strategy"] for row in rows("sweep")] == ["fastv", "none"]
