"""Commands that share folders, at once or one after another, and where relative paths lead."""

from __future__ import annotations

import csv
import json
import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from subprocess import PIPE

import pytest
from commands import COMMAND, TINY, console_in, random_llava, refused
from PIL import Image
from processes import call, run, started

from tokenprune.cli import main as cli
from tokenprune.runs.folders import LOCK, occupied


def sweep(checkpoint: Path, *own: str) -> list[str]:
    few = [*random_llava(checkpoint), *TINY, "data.test.num_samples=2"]
    return ["eval", "-m", *few, "hydra.sweep.dir=shared", *own]


def strategies() -> list[str]:
    with Path("shared/results.csv").open(newline="") as file:
        return sorted(row["strategy"] for row in csv.DictReader(file))


# ------------------------------------------------------------------------------------------ paths


@pytest.mark.parametrize(
    "own",
    [
        ["eval", "data=folder", "data.path=rel/q.jsonl", "hydra.job.chdir=true"],
        ["train", "data=folder", "data.train_path=rel/q.jsonl", "hydra.job.chdir=True"],
        ["train", "ckpt_path=last", "++hydra.job.chdir=true"],
        ["bench", "prefill", "hydra.job.chdir=true"],
        ["eval", "-m", "seed=0,1", "hydra.job.chdir=true"],
        ["eval", "-m", "hydra.job.chdir=true,false"],
        ["eval", "model=hub", "model.path=rel", "hydra.job.chdir=true"],
    ],
    ids=" ".join,
)
@pytest.mark.share(3)
def test_f2_no_run_moves_elsewhere(own: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    message = refused(own, capsys)
    assert "hydra.job.chdir: expected false, for relative paths mean the folder" in message


def test_f2_relative_paths_mean_the_start_folder(checkpoint: Path, tmp_path: Path) -> None:
    Path("rel").mkdir()
    Image.new("RGB", (32, 32)).save("rel/a.png")
    row = {"image": "a.png", "question": "what ?", "answer": "red"}
    Path("rel/q.jsonl").write_text(json.dumps(row))
    Path("rel/model").symlink_to(checkpoint)
    own = ["model=hub", "model.path=rel/model", *TINY, "data=folder", "data.path=rel/q.jsonl"]
    assert cli.main(["eval", *own, "hydra.job.chdir=false", "hydra.run.dir=run"]) == 0
    assert json.loads(Path("run/metrics.json").read_text())["num_samples"] == 1


# ----------------------------------------------------------------------------------------- sweeps


@pytest.mark.matrix
def test_f3_sweeps_one_after_another_make_one_table(
    checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(sweep(checkpoint, "strategy=fastv,random")) == 0
    assert cli.main(sweep(checkpoint, "strategy=uniform")) == 0
    assert strategies() == ["fastv", "random", "uniform"]
    assert "3 runs: shared/results.csv" in capsys.readouterr().out


@pytest.fixture
def two(checkpoint: Path) -> tuple[list[str], list[str]]:
    """Commands of two experiments in one folder, each with a run `none`, of other questions."""
    Path("mine/experiment").mkdir(parents=True)
    for name, asked in (("few", 2), ("more", 3)):
        Path(f"mine/experiment/{name}.yaml").write_text(
            "# @package _global_\n"
            "defaults: [override /model: hub]\n"
            f"model: {{path: {checkpoint}}}\n"
            f"data: {{batch_size: 4, test: {{num_samples: {asked}}}}}\n"
            "max_new_tokens: 2\nnum_pictures: 1\ntrainer: {callbacks: []}\n"
            "hydra: {mode: MULTIRUN, sweep: {dir: shared}, sweeper: {grids: [{strategy: none}]}}\n"
        )
    few, more = (["eval", "--config-dir", "mine", f"experiment={n}"] for n in ("few", "more"))
    return few, more


def test_runs_of_one_name_are_both_kept(
    two: tuple[list[str], list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    for command in two:
        assert cli.main(command) == 0
    assert "1 of 1 runs: beside others of their names, which have another data, in folders" in (
        printed := capsys.readouterr().out
    )
    assert "2 runs: shared/results.csv" in printed
    first, second = sorted(path.parent for path in Path("shared").rglob("metrics.json"))
    assert first.name == "none"
    assert second.name.startswith("none-")
    assert f" {second.name} " in printed  # nothing else in the table tells them apart
    made = [json.loads((run / "metrics.json").read_text()) for run in (first, second)]
    assert [run["num_samples"] for run in made] == [2, 3]
    for command in two:
        assert cli.main(command) == 0
    assert capsys.readouterr().out.count("complete already") == 2


@pytest.mark.matrix
def test_runs_of_one_name_are_both_kept_by_a_launcher(two: tuple[list[str], list[str]]) -> None:
    for _ in range(2):
        for command in two:
            done = run([*COMMAND, *command, "launcher=joblib"])
    assert "1 of 1 runs: complete already" in done.stdout
    assert len(list(Path("shared").rglob("metrics.json"))) == 2


def test_a_run_that_came_meanwhile_stays(
    two: tuple[list[str], list[str]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Two sweeps look for folders before either has written anything."""
    assert cli.main(two[0]) == 0
    whole = Path("shared/none/metrics.json").read_bytes()
    monkeypatch.setattr("tokenprune.cli.launching.own_names", lambda *arguments: arguments[-1])
    assert cli.main(two[1]) == 2
    error = capsys.readouterr().err
    assert "hydra.sweep.dir: expected no other run in" in error
    assert "got one with another data. Choose" in error
    assert Path("shared/none/metrics.json").read_bytes() == whole


@pytest.mark.matrix
def test_trainings_of_one_name_are_both_kept(checkpoint: Path) -> None:
    """Interrupted or not: a training's checkpoints are hours of work."""
    Path("mine/experiment").mkdir(parents=True)
    for name, rate in (("slow", 1e-5), ("fast", 1e-3)):
        Path(f"mine/experiment/{name}.yaml").write_text(
            f"# @package _global_\nlearning_rate: {rate}\n"
        )
    own = ["train", "-m", "--config-dir", "mine", *random_llava(checkpoint), "strategy=none"]
    own += ["trainer.max_steps=1", "data.train.num_samples=2", "data.validation.num_samples=2"]
    own += ["data.batch_size=2", "trainer.callbacks=[]", "hydra.sweep.dir=shared", "logger=csv"]
    assert cli.main([*own, "experiment=slow"]) == 0
    (first,) = Path("shared").iterdir()
    (first / "training.json").unlink()
    kept = (first / "checkpoints/last.ckpt").read_bytes()
    assert cli.main([*own, "experiment=fast"]) == 0
    assert (first / "checkpoints/last.ckpt").read_bytes() == kept
    (second,) = (path for path in Path("shared").iterdir() if path != first)
    assert (second / "csv/metrics.csv").is_file()  # what refers to the folder means the new one
    assert second.name.startswith(f"{first.name}-")


@pytest.mark.matrix
def test_f3_sweeps_at_once_make_one_table(checkpoint: Path) -> None:
    both = [sweep(checkpoint, "strategy=fastv,random"), sweep(checkpoint, "strategy=uniform")]
    with ThreadPoolExecutor() as pool:
        for done in pool.map(partial(call, console_in, Path.cwd()), both):
            assert done.returncode == 0, done.stdout
    assert strategies() == ["fastv", "random", "uniform"]
    assert not list(Path("shared").rglob(".*"))


def test_f3_what_is_no_evaluation_is_no_row(checkpoint: Path) -> None:
    Path("shared/notes").mkdir(parents=True)
    Path("shared/notes/metrics.json").write_text("[1, 2]")
    assert cli.main(sweep(checkpoint, "strategy=uniform")) == 0
    assert strategies() == ["uniform"]


# ------------------------------------------------------------------------------------- one folder


@pytest.mark.parametrize("command", ["eval", "train", "bench"])
@pytest.mark.share(3)
def test_f3_a_folder_is_one_run_s_at_a_time(
    command: str, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = {
        "eval": [*random_llava(checkpoint), *TINY, "data.test.num_samples=2"],
        "train": [*random_llava(checkpoint), "trainer.callbacks=[]", "trainer.max_steps=1"],
        "bench": ["prefill", "shape=tiny"],
    }[command]
    with occupied(Path("run")):
        Path("run/mine").write_text("")
        assert cli.main([command, *own, "hydra.run.dir=run"]) == 2
        assert sorted(path.name for path in Path("run").iterdir()) == [LOCK, "mine"]
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "hydra.run.dir: expected a folder of its own, got" in error
    assert f"another run is at work (process {os.getpid()} on" in error


@pytest.mark.matrix
def test_f3_a_killed_run_leaves_its_folder_free(
    checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = [*random_llava(checkpoint), *TINY, "data.test.num_samples=2", "hydra.run.dir=run"]
    wait = ["trainer.callbacks=[{_target_:stops.Wait,path:started}]"]
    with started([*COMMAND, "eval", *own, *wait], stdout=PIPE, stderr=PIPE) as process:
        while not Path("started").exists() and process.poll() is None:
            time.sleep(0.05)
        assert cli.main(["eval", *own]) == 2
        refusal = capsys.readouterr().err
        assert "another run is at work" in refusal
        assert f"process {process.pid} on" in refusal
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert Path("run", LOCK).exists()
    assert cli.main(["eval", *own]) == 0
    assert not Path("run", LOCK).exists()
