"""An interrupted training goes on bit for bit: same losses, same weights, whatever stopped it.

The children are forks that set sessions of their own, so that SIGKILL reaches a whole training:
all its processes, and the workers that prepare their batches.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import traceback
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from checkpoint import save_checkpoint
from safetensors.torch import load_file

from tokenprune import cli, training

# Of pytorch_lightning with this torch, and advice on settings that are right for a test.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*The number of training batches"),
]

FORK = multiprocessing.get_context("fork")
STEPS = 11  # of 4 or 3 per epoch: the last batch of an epoch is smaller


class Recorder(pl.Callback):
    """Writes every loss as it is, and stops a training where it is told to."""

    def __init__(self, path: str, stop: str | None = None, at: int = 0) -> None:
        self.path, self.stop, self.at = path, stop, at
        self.here = 0

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        loss = float(outputs["loss"]).hex()
        drawn = float(torch.rand(())).hex()  # as dropout does, from each process's generator
        ids = [sample.id for sample in batch["samples"]]
        line = [trainer.fit_loop.epoch_loop.total_batch_idx, ids, loss, drawn]
        with Path(f"{self.path}.{trainer.global_rank}").open("a") as file:
            file.write(json.dumps(line) + "\n")
        self.here += 1
        if self.here == self.at and self.stop == "kill" and trainer.is_global_zero:
            os.killpg(0, signal.SIGKILL)
        if self.here == self.at and self.stop == "ask":
            trainer.should_stop = True
        if self.here == self.at and self.stop == "raise":
            raise RuntimeError("out of memory")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny random LLaVA with dropout."""
    folder = save_checkpoint(tmp_path_factory.mktemp("checkpoint"))
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["attention_dropout"] = 0.2
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


def config(checkpoint: str, folder: Path, *overrides: str, **recorder: Any) -> Any:
    options = {"path": str(folder / "losses"), **recorder}
    told = ",".join(f"{key}:{value}" for key, value in options.items())
    return cli.compose(
        "train",
        [
            "model=hub",
            f"model.path={checkpoint}",
            "data.batch_size=4",
            "data.train.num_samples=15",
            "data.validation.num_samples=4",
            f"trainer.callbacks=[{{_target_:test_resume.Recorder,{told}}}]",
            "+trainer.enable_progress_bar=false",
            "trainer.val_check_interval=5",
            f"trainer.max_steps={STEPS}",
            "checkpoint_every=2",
            "learning_rate=3e-3",
            "logger=none",
            *overrides,
        ],
    )


def in_child(own: Any, folder: Path) -> int:
    """Trains in a process of its own; returns its exit code."""

    def work() -> None:
        os.setsid()
        torch.set_num_threads(1)
        try:
            training.train(own, folder)
        except BaseException:
            (folder / "error").write_text(traceback.format_exc())
            raise

    folder.mkdir(exist_ok=True)
    child = FORK.Process(target=work)
    child.start()
    child.join(120)
    assert not child.is_alive()
    assert child.exitcode is not None
    return child.exitcode


def losses(folder: Path, rank: int) -> dict[int, list[Any]]:
    """What each step saw, lost and drew; a step that ran twice must have done the same twice."""
    found: dict[int, list[Any]] = {}
    for line in (folder / f"losses.{rank}").read_text().splitlines():
        step, *rest = json.loads(line)
        assert found.setdefault(step, rest) == rest, f"step {step}"
    return found


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model" / "model.safetensors")


TWO = (
    "trainer=ddp",
    "trainer.strategy=ddp_fork",
    "trainer.accelerator=cpu",
    "trainer.devices=2",
    "data.batch_size=2",
)
SETTINGS = {
    "one": (),
    "one-workers": ("data.num_workers=2",),
    "two": TWO,
    "two-workers": (*TWO, "data.num_workers=2"),
    "accumulated": ("trainer.accumulate_grad_batches=2", "data.batch_size=2"),
}


@pytest.fixture(scope="module")
def whole(checkpoint: str, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The uninterrupted training of a setting; workers change nothing."""
    done: dict[str, Path] = {}

    def get(name: str) -> Path:
        name = name.removesuffix("-workers")
        if name not in done:
            done[name] = tmp_path_factory.mktemp(name)
            assert in_child(config(checkpoint, done[name], *SETTINGS[name]), done[name]) == 0
        return done[name]

    return get


def check_same(parts: Path, whole: Path, processes: int) -> None:
    for rank in range(processes):
        assert losses(parts, rank) == losses(whole, rank)
    own, expected = weights(parts), weights(whole)
    assert own.keys() == expected.keys()
    for name, value in own.items():
        assert torch.equal(value, expected[name]), name


matrix = pytest.mark.matrix


@pytest.mark.parametrize(
    ("setting", "stop", "at"),
    [
        ("one", "kill", 7),  # checkpoint in the middle of an epoch
        ("one", "kill", 9),  # checkpoint at the end of one
        ("one-workers", "raise", 3),
        ("two-workers", "kill", 7),
        pytest.param("one", "ask", 7, marks=matrix),
        pytest.param("one-workers", "kill", 7, marks=matrix),
        pytest.param("two", "kill", 7, marks=matrix),
        pytest.param("two-workers", "ask", 3, marks=matrix),
        pytest.param("accumulated", "kill", 11, marks=matrix),
    ],
)
def test_it_goes_on_bit_for_bit(
    checkpoint: str, tmp_path: Path, whole: Any, setting: str, stop: str, at: int
) -> None:
    overrides = SETTINGS[setting]
    own = config(checkpoint, tmp_path, *overrides, stop=stop, at=at)
    code = in_child(own, tmp_path)
    assert code == {"kill": -signal.SIGKILL, "ask": 0, "raise": 1}[stop]
    own = config(checkpoint, tmp_path, *overrides, "ckpt_path=last")
    assert in_child(own, tmp_path) == 0, (tmp_path / "error").read_text()
    check_same(tmp_path, whole(setting), 2 if "trainer.devices=2" in overrides else 1)
