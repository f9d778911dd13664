"""Sweeps as arrays of Slurm jobs: ended in the middle, started again, and whole in the end."""

from __future__ import annotations

import csv
import os
import shutil
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
from commands import COMMAND, random_llava
from processes import PIPE, Process, run, started
from slurm import Slurm, wait_for

pytestmark = pytest.mark.cluster
STRATEGIES = ("fastv", "none", "random", "uniform")
#: Columns of the table that are measured, and differ from one run to the next.
MEASURED = ("prefill_ms",)


@pytest.fixture(scope="session")
def gate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder: runs go on after their first batch only while the file `open` is in it."""
    return tmp_path_factory.mktemp("gate")


@pytest.fixture(scope="session")
def sweep(checkpoint: Path, gate: Path) -> list[str]:
    """A sweep; which launcher it uses is left open."""
    few = [*random_llava(checkpoint), "max_new_tokens=2", "num_pictures=0"]
    few += ["data.batch_size=4", "data.test.num_samples=8", "hydra.sweep.dir=sweep"]
    few += [f"trainer.callbacks=[{{_target_:stops.Until,folder:{gate}}}]"]
    return [*COMMAND, "eval", "-m", *few, f"strategy={','.join(STRATEGIES)}"]


@pytest.fixture
def on_slurm(sweep: list[str], slurm: Slurm, gate: Path) -> list[str]:
    for path in gate.iterdir():
        path.unlink()
    return [*sweep, "launcher=slurm", "hydra.launcher.gpus=0", "hydra.launcher.cpus=1"]


@pytest.fixture(scope="session")
def undisturbed(sweep: list[str], gate: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the same runs have been done one after another, in one process."""
    folder = tmp_path_factory.mktemp("undisturbed")
    (gate / "open").touch()
    run(sweep, cwd=folder)
    (gate / "open").unlink()
    assert [row["strategy"] for row in table(folder)] == list(STRATEGIES)
    return folder


def table(folder: Path = Path()) -> list[dict[str, str]]:
    """The rows of a sweep's table, without what no two runs have in common."""
    with (folder / "sweep" / "results.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    return [{key: row[key] for key in row if key not in MEASURED} for row in rows]


@contextmanager
def halted(command: Sequence[str], gate: Path) -> Iterator[Process]:
    """A sweep on Slurm two of whose runs are in their midst."""
    with started(command, stdout=PIPE, stderr=PIPE) as launcher:
        wait_for(lambda: len(list(gate.iterdir())) == 2, "two runs to have begun", limit=120)
        yield launcher


def test_an_array_has_a_job_for_each_run(
    on_slurm: list[str], gate: Path, undisturbed: Path
) -> None:
    (gate / "open").touch()
    done = run([*on_slurm, "hydra.launcher.at_once=1"])
    assert "4 jobs: " in done.stdout
    assert table() == table(undisturbed)
    again = run(on_slurm)
    assert "4 of 4 runs: complete already" in again.stdout
    assert "jobs: " not in again.stdout


def test_scancel_in_the_middle_and_once_more(
    on_slurm: list[str], gate: Path, slurm: Slurm, undisturbed: Path
) -> None:
    complete = table(undisturbed)[0]["run"]
    shutil.copytree(undisturbed / "sweep" / complete, Path("sweep", complete))
    with halted(on_slurm, gate) as launcher:
        slurm.run("scancel", slurm.queue()[0][0].partition("_")[0])
        output, error = launcher.communicate(timeout=120)
    assert launcher.returncode == 2, output + error
    (line,) = error.splitlines()
    assert "sweep: expected 4 complete runs, got 3 that failed: " in line
    assert line.count("Slurm says CANCELLED") == 3
    assert [row["run"] for row in table()] == [complete]
    (gate / "open").touch()
    done = run(on_slurm)
    assert "1 of 4 runs: complete already\n3 jobs: " in done.stdout
    assert table() == table(undisturbed)
    assert not list(Path("sweep").rglob(".running"))


def test_the_launcher_and_its_jobs_are_killed_and_started_again(
    on_slurm: list[str], gate: Path, slurm: Slurm, undisturbed: Path
) -> None:
    with halted(on_slurm, gate) as launcher:
        os.kill(launcher.pid, signal.SIGKILL)
        launcher.wait(10)
    slurm.cancel_all()
    assert not list(Path("sweep").rglob("metrics.json"))
    (gate / "open").touch()
    run(on_slurm)
    assert table() == table(undisturbed)


def test_two_launchers_have_the_same_runs(
    on_slurm: list[str], gate: Path, slurm: Slurm, undisturbed: Path
) -> None:
    """Whose jobs are at work or waiting when the other submits its own: each run is done once."""
    with (
        halted(on_slurm, gate) as first,
        started(on_slurm, stdout=PIPE, stderr=PIPE) as second,
    ):
        wait_for(lambda: len(slurm.queue()) == 8, "eight jobs")
        (gate / "open").touch()
        for launcher in (first, second):
            output, error = launcher.communicate(timeout=200)
            assert (launcher.returncode, error) == (0, ""), output + error
    assert len(list(gate.glob("begun-*"))) == len(STRATEGIES)
    assert table() == table(undisturbed)


def test_a_killed_node_s_run_is_done_by_the_other(
    on_slurm: list[str], gate: Path, slurm: Slurm, undisturbed: Path
) -> None:
    with halted(on_slurm, gate) as launcher:
        slurm.kill_node("n1")
        (gate / "open").touch()
        slurm.hurry_requeued()
        output, error = launcher.communicate(timeout=200)
    assert launcher.returncode == 0, output + error
    assert table() == table(undisturbed)


def test_a_run_over_its_time_is_named(on_slurm: list[str], slurm: Slurm) -> None:
    few = [item for item in on_slurm if not item.startswith("strategy=")]
    done = run([*few, "strategy=fastv,random", "hydra.launcher.timeout_min=1"], code=2)
    (line,) = done.stderr.splitlines()
    assert "got 2 that failed: " in line
    assert line.count("over its time limit, hydra.launcher.timeout_min=1") == 2, line


def test_a_node_without_a_package(
    on_slurm: list[str], gate: Path, slurm: Slurm, undisturbed: Path
) -> None:
    """Whose Python finds no transformers, say: told for each job, and nothing is left behind."""
    hide = f"export PYTHONPATH={Path.cwd()}/without:$PYTHONPATH"
    Path("without/transformers").mkdir(parents=True)
    Path("without/transformers/__init__.py").write_text("raise ImportError('none on this node')")
    done = run([*on_slurm, f"hydra.launcher.setup=['{hide}']"], code=2)
    (line,) = done.stderr.splitlines()
    assert line.count("none on this node") == 4
    (gate / "open").touch()
    run(on_slurm)
    assert table() == table(undisturbed)


def test_what_slurm_does_not_take(on_slurm: list[str]) -> None:
    done = run([*on_slurm, "hydra.launcher.partition=nowhere"], code=2)
    line = done.stderr.splitlines()[-1]  # after sbatch's own
    assert "hydra.launcher: expected Slurm to take 4 jobs, got: " in line
    assert "partition" in line
