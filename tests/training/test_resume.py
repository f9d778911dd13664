"""An interrupted training goes on bit for bit: same losses, same weights, whatever stopped it.

The children are forks that set sessions of their own, so that SIGKILL reaches a whole training:
all its processes, and the workers that prepare their batches.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import sys
import traceback
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from checkpoint import save_checkpoint
from safetensors.torch import load_file

from tokenprune import training
from tokenprune.cli.configs import compose
from tokenprune.training.checkpoints import BEST, LAST, Stopped

# Of pytorch_lightning with this torch, and advice on settings that are right for a test.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*The number of training batches"),
]

FORK = multiprocessing.get_context("fork")
STEPS = 11  # of 4 or 3 per epoch: the last batch of an epoch is smaller


class Recorder(pl.Callback):
    """Writes every loss as it is, and stops a training where it is told to."""

    def __init__(
        self, path: str, stop: str | None = None, at: int = 0, rank: int = 0, to: str = "self"
    ) -> None:
        self.path, self.stop, self.at, self.rank, self.to = path, stop, at, rank, to
        self.here = self.validations = 0

    def write(self, name: Any, *line: Any) -> None:
        with Path(f"{self.path}.{name}").open("a") as file:
            file.write(json.dumps(line) + "\n")

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        loss = float(outputs["loss"]).hex()
        drawn = float(torch.rand(())).hex()  # as dropout does, from each process's generator
        ids = [sample.id for sample in batch["samples"]]
        step = trainer.fit_loop.epoch_loop.total_batch_idx
        self.write(trainer.global_rank, step, ids, loss, drawn)
        self.here += 1
        if self.here != self.at:
            return
        if self.stop == "ask":
            trainer.should_stop = True
        if trainer.global_rank != self.rank:
            return
        if self.stop == "kill":
            os.killpg(0, signal.SIGKILL)
        if self.stop == "raise":
            raise RuntimeError("out of memory")
        if self.stop is not None and self.stop.startswith("SIG"):
            signum = signal.Signals[self.stop]
            if self.to == "group":
                os.killpg(0, signum)
            else:
                os.kill({"self": os.getpid(), "parent": os.getppid()}[self.to], signum)

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        loss = float(trainer.callback_metrics["val_loss"]).hex()
        self.write("validations", trainer.global_step, loss)
        self.validations += 1
        if self.stop == "validation" and self.validations == self.at:
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
    return compose(
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
        except Stopped as stop:
            sys.exit(128 + stop.signum)
        except BaseException:
            (folder / "error").write_text(traceback.format_exc())
            raise

    folder.mkdir(exist_ok=True)
    child = FORK.Process(target=work)
    child.start()
    child.join(120)
    if child.is_alive():
        os.killpg(child.pid, signal.SIGKILL)
        pytest.fail("it hangs")
    assert child.exitcode is not None
    return child.exitcode


def losses(folder: Path, name: Any) -> dict[int, list[Any]]:
    """What each step saw, lost and drew; a step that ran twice must have done the same twice."""
    found: dict[int, list[Any]] = {}
    for line in (folder / f"losses.{name}").read_text().splitlines():
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
    "fsdp": (
        *("trainer=fsdp", "trainer.strategy.start_method=fork", "trainer.accelerator=cpu"),
        *("trainer.devices=2", "data.batch_size=2"),
    ),
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


def check_same(parts: Path, whole: Path, processes: int, more: int = 0) -> None:
    """Same steps, same validations but for `more` of them, same weights."""
    for rank in range(processes):
        assert losses(parts, rank) == losses(whole, rank)
    validations, expected = losses(parts, "validations"), losses(whole, "validations")
    assert expected.items() <= validations.items()
    assert len(validations) == len(expected) + more
    own, other = weights(parts), weights(whole)
    assert own.keys() == other.keys()
    for name, value in own.items():
        assert torch.equal(value, other[name]), name


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
        pytest.param("fsdp", "kill", 7, marks=matrix),
        pytest.param("fsdp", "ask", 9, marks=matrix),
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
    processes = 2 if "trainer.devices=2" in overrides else 1
    # Who asks for an end gets a validation.
    check_same(tmp_path, whole(setting), processes, more=stop == "ask")


@matrix
def test_a_step_is_saved_whole(checkpoint: str, tmp_path: Path, whole: Any) -> None:
    """Interrupted twice between the two batches of a step."""
    own = SETTINGS["accumulated"]
    assert in_child(config(checkpoint, tmp_path, *own, stop="raise", at=5), tmp_path) == 1
    own = (*own, "ckpt_path=last")
    assert in_child(config(checkpoint, tmp_path, *own, stop="raise", at=2), tmp_path) == 1
    assert in_child(config(checkpoint, tmp_path, *own), tmp_path) == 0
    check_same(tmp_path, whole("accumulated"), 1)


@pytest.mark.parametrize(
    ("setting", "stop"),
    [
        ("one", {"stop": "SIGTERM"}),
        ("one-workers", {"stop": "SIGINT", "to": "group"}),  # Ctrl-C, at whatever is running
        ("two", {"stop": "SIGTERM", "to": "parent"}),
        pytest.param("two-workers", {"stop": "SIGTERM", "to": "group"}, marks=matrix),
        pytest.param("two-workers", {"stop": "SIGINT", "to": "group"}, marks=matrix),
        pytest.param("two", {"stop": "SIGTERM", "rank": 1}, marks=matrix),
        pytest.param("fsdp", {"stop": "SIGTERM", "to": "parent"}, marks=matrix),
        pytest.param("accumulated", {"stop": "SIGTERM"}, marks=matrix),
    ],
)
def test_a_signal_ends_it_with_a_checkpoint(
    checkpoint: str, tmp_path: Path, whole: Any, setting: str, stop: dict[str, Any]
) -> None:
    overrides = (*SETTINGS[setting], "checkpoint_every=100")
    code = in_child(config(checkpoint, tmp_path, *overrides, at=3, **stop), tmp_path)
    assert code == 128 + signal.Signals[stop["stop"]], (tmp_path / "error").read_text()
    done = torch.load(tmp_path / LAST, weights_only=True)["global_step"]
    expected = 2 if setting == "accumulated" else 3  # two batches a step
    two = "trainer.devices=2" in overrides  # of which one may be a step ahead of the signal
    assert expected <= done <= expected + two
    assert in_child(config(checkpoint, tmp_path, *overrides, "ckpt_path=last"), tmp_path) == 0
    check_same(tmp_path, whole(setting), 1 + two)


@pytest.mark.parametrize("stop", ["raise", pytest.param("SIGKILL", marks=matrix)])
def test_one_process_that_fails_ends_all(checkpoint: str, tmp_path: Path, stop: str) -> None:
    own = config(checkpoint, tmp_path, *SETTINGS["two"], stop=stop, at=3, rank=1)
    assert in_child(own, tmp_path) == 1
    told = {"raise": "RuntimeError: out of memory", "SIGKILL": "terminated with signal SIGKILL"}
    assert told[stop] in (tmp_path / "error").read_text()


@pytest.mark.parametrize("at", [6, 8, pytest.param(2, marks=matrix), pytest.param(7, marks=matrix)])
def test_it_validates_as_if_nothing_had_happened(
    checkpoint: str, tmp_path: Path, early: Path, at: int
) -> None:
    """Stopped in a validation whose step is due for a checkpoint."""
    folder = tmp_path / "run"
    folder.mkdir()
    with pytest.raises(RuntimeError, match="out of memory"):
        training.train(config(checkpoint, folder, *EARLY, stop="validation", at=at), folder)
    training.train(config(checkpoint, folder, *EARLY, "ckpt_path=last"), folder)
    check_same(folder, early, 1)
    told, expected = (json.loads((f / training.SUMMARY).read_text()) for f in (folder, early))
    assert told["steps"] == expected["steps"]
    assert told["validation"] == expected["validation"]
    states = [torch.load(f / BEST, weights_only=True)["state_dict"] for f in (folder, early)]
    for name, value in states[0].items():
        assert torch.equal(value, states[1][name]), name


# The sixth validation is the best; patience ends with the eighth.
EARLY = ("trainer.val_check_interval=2", "checkpoint_every=2", "patience=2", "keep=best")
EARLY += ("learning_rate=0.3", "trainer.max_steps=30", "trainer.num_sanity_val_steps=0")


@pytest.fixture(scope="module")
def early(checkpoint: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A training that ends early and keeps its best, uninterrupted."""
    folder = tmp_path_factory.mktemp("early")
    training.train(config(checkpoint, folder, *EARLY), folder)
    return folder


def test_patience_that_was_over_stays_so(
    checkpoint: str, tmp_path: Path, early: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Stopped between the last step and the end, or not at all."""
    folder = tmp_path / "moved"
    shutil.copytree(early, folder)
    steps = losses(folder, 0)
    own = config(checkpoint, folder, *EARLY, "ckpt_path=last")
    training.train(own, folder)
    assert "nothing left to train" in capsys.readouterr().out
    before = json.loads((folder / training.SUMMARY).read_text())
    (folder / training.SUMMARY).unlink()
    training.train(own, folder)
    assert losses(folder, 0) == steps
    after = json.loads((folder / training.SUMMARY).read_text())
    assert after["steps"] == before["steps"] == 16
    assert after["validation"] == before["validation"]
