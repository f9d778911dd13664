"""Trainings of two nodes, started by srun."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import pytest
import torch
from slurm import Slurm, wait_for

pytestmark = pytest.mark.cluster

LAST = Path("run/checkpoints/last.ckpt")


def train(checkpoint: Path, how: str, steps: int, *more: str) -> list[str]:
    """The command, on two nodes."""
    own = ["-m", "tokenprune.cli", "train", "model=hub", f"model.path={checkpoint}"]
    own += [f"trainer={how}", "trainer.accelerator=cpu", "data.batch_size=2", "logger=csv"]
    own += ["data.train.num_samples=12", "data.validation.num_samples=4", "checkpoint_every=2"]
    own += ["trainer.callbacks=[]", "+trainer.enable_progress_bar=false", "hydra.run.dir=run"]
    step = ["srun", "--nodes=2", "--ntasks-per-node=1", sys.executable]
    return [*step, *own, f"trainer.max_steps={steps}", *more]


@pytest.fixture(autouse=True)
def _meet(monkeypatch: pytest.MonkeyPatch) -> None:
    """Names of this cluster's nodes are known to Slurm alone."""
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")


def test_nodes_that_cannot_be_found_are_named(
    slurm: Slurm, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MASTER_ADDR")
    said = slurm.run(*train(checkpoint, "ddp", 4), code=2, limit=200)
    assert "srun: expected all processes to meet at n1:" in said
    assert "Set MASTER_ADDR and MASTER_PORT" in said


@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_two_nodes_train_one_model(slurm: Slurm, checkpoint: Path, how: str) -> None:
    said = slurm.run(*train(checkpoint, how, 4, "trainer.num_nodes=2"), limit=200)
    assert said.count("4 steps") == 1
    assert json.loads(Path("run/training.json").read_text())["steps"] == 4
    assert [path.name for path in Path().iterdir()] == ["run"]


def test_a_cancelled_training_goes_on(slurm: Slurm, checkpoint: Path) -> None:
    """`scancel` in the middle: a checkpoint, and the same command goes on from it."""
    script = " ".join(f"'{part}'" for part in train(checkpoint, "ddp", 5000))
    batch = ["sbatch", "--nodes=2", "--ntasks-per-node=1", "--output=said", "--wrap", script]
    slurm.run(*batch)
    wait_for(LAST.exists, "a checkpoint", limit=120)
    (job,) = {number for number, _ in slurm.queue()}
    slurm.run("scancel", "--signal=TERM", job)
    wait_for(lambda: not slurm.queue(), "the end of the job", limit=60)
    assert Path("said").read_text().count("training was stopped by SIGTERM") == 1
    done = torch.load(LAST, weights_only=True)["global_step"]
    assert 2 <= done < 5000
    slurm.run(*train(checkpoint, "ddp", done + 2, "ckpt_path=last"), limit=200)
    assert json.loads(Path("run/training.json").read_text())["steps"] == done + 2


def test_a_killed_node_is_named(slurm: Slurm, checkpoint: Path) -> None:
    command = train(checkpoint, "ddp", 5000)
    script = " ".join(f"'{part}'" for part in [command[0], "--no-kill", *command[1:]])
    slurm.run("sbatch", "--no-kill", "--nodes=2", "--output=said", "--wrap", script)
    wait_for(LAST.exists, "a checkpoint", limit=120)
    time.sleep(0.5)
    # The batch script, and with it the first process, is on the first node.
    slurm.kill_node("n2")
    wait_for(lambda: "is gone" in Path("said").read_text(), "a line", limit=60)
    lines = [line for line in Path("said").read_text().splitlines() if "tokenprune: " in line]
    assert len(lines) == 1
    assert "process 1 of 2 (process " in lines[0]
    assert torch.load(LAST, weights_only=True)["global_step"] >= 2
