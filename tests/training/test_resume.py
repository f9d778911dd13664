"""An interrupted training goes on bit for bit: same losses, same weights, whatever stopped it.

The children have sessions of their own, so that SIGKILL reaches a whole training: all its
processes, and the workers that prepare their batches.
"""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint import save_checkpoint
from processes import call
from safetensors.torch import load_file
from trainings import DDP, FSDP, LIGHTNING, train

from tokenprune import training
from tokenprune.cli.configs import compose
from tokenprune.training.checkpoints import BEST, LAST
from tokenprune.training.sharding import META

pytestmark = [
    *LIGHTNING,
    pytest.mark.filterwarnings("ignore:.*The number of training batches"),
]

STEPS = 11  # of 4 or 3 per epoch: the last batch of an epoch is smaller


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
            f"trainer.callbacks=[{{_target_:trainings.Recorder,{told}}}]",
            "+trainer.enable_progress_bar=false",
            "trainer.val_check_interval=5",
            f"trainer.max_steps={STEPS}",
            "checkpoint_every=2",
            "learning_rate=3e-3",
            "logger=none",
            *overrides,
        ],
    )


def in_child(own: Any, folder: Path, code: int = 0) -> str:
    """Trains in a process of its own, which must end with this code; returns what it says."""
    folder.mkdir(exist_ok=True)
    done = call(train, own, folder)
    assert done.returncode == code, done.stdout
    return done.stdout


def losses(folder: Path, name: Any) -> dict[int, list[Any]]:
    """What each step saw, lost and drew; a step that ran twice must have done the same twice."""
    found: dict[int, list[Any]] = {}
    for line in (folder / f"losses.{name}").read_text().splitlines():
        step, *rest = json.loads(line)
        assert found.setdefault(step, rest) == rest, f"step {step}"
    return found


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model" / "model.safetensors")


SETTINGS = {
    "one": (),
    "one-workers": ("data.num_workers=2",),
    "two": DDP,
    "two-workers": (*DDP, "data.num_workers=2"),
    "fsdp": FSDP,
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
            in_child(config(checkpoint, done[name], *SETTINGS[name]), done[name])
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
        pytest.param("one", "kill", 9, marks=matrix),  # checkpoint at the end of one
        pytest.param("one-workers", "raise", 3, marks=matrix),
        pytest.param("two", "kill", 7, marks=matrix),
        pytest.param("one", "ask", 7, marks=matrix),
        pytest.param("one-workers", "kill", 7, marks=matrix),
        pytest.param("two-workers", "kill", 7, marks=matrix),
        pytest.param("two-workers", "ask", 3, marks=matrix),
        pytest.param("accumulated", "kill", 11, marks=matrix),
        pytest.param("fsdp", "kill", 7, marks=matrix),
        pytest.param("fsdp", "ask", 9, marks=matrix),
    ],
)
@pytest.mark.matrix
def test_it_goes_on_bit_for_bit(
    checkpoint: str, tmp_path: Path, whole: Any, setting: str, stop: str, at: int
) -> None:
    overrides = SETTINGS[setting]
    own = config(checkpoint, tmp_path, *overrides, stop=stop, at=at)
    in_child(own, tmp_path, {"kill": -signal.SIGKILL, "ask": 0, "raise": 1}[stop])
    in_child(config(checkpoint, tmp_path, *overrides, "ckpt_path=last"), tmp_path)
    processes = 2 if "trainer.devices=2" in overrides else 1
    # Who asks for an end gets a validation.
    check_same(tmp_path, whole(setting), processes, more=stop == "ask")


@matrix
def test_a_step_is_saved_whole(checkpoint: str, tmp_path: Path, whole: Any) -> None:
    """Interrupted twice between the two batches of a step."""
    own = SETTINGS["accumulated"]
    in_child(config(checkpoint, tmp_path, *own, stop="raise", at=5), tmp_path, 1)
    own = (*own, "ckpt_path=last")
    in_child(config(checkpoint, tmp_path, *own, stop="raise", at=2), tmp_path, 1)
    in_child(config(checkpoint, tmp_path, *own), tmp_path)
    check_same(tmp_path, whole("accumulated"), 1)


@pytest.mark.parametrize(
    ("setting", "stop"),
    [
        ("one", {"stop": "SIGTERM"}),
        # Ctrl-C, at whatever is running.
        pytest.param("one-workers", {"stop": "SIGINT", "to": "group"}, marks=matrix),
        pytest.param("two", {"stop": "SIGTERM", "to": "parent"}, marks=matrix),
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
    code = 128 + signal.Signals[stop["stop"]]
    in_child(config(checkpoint, tmp_path, *overrides, at=3, **stop), tmp_path, code)
    last = tmp_path / LAST
    content = last / META if last.is_dir() else last
    done = torch.load(content, weights_only=True)["global_step"]
    expected = 2 if setting == "accumulated" else 3  # two batches a step
    two = "trainer.devices=2" in overrides  # of which one may be a step ahead of the signal
    assert expected <= done <= expected + two
    in_child(config(checkpoint, tmp_path, *overrides, "ckpt_path=last"), tmp_path)
    check_same(tmp_path, whole(setting), 1 + two)


@matrix
@pytest.mark.parametrize("stop", ["raise", "SIGKILL"])
def test_one_process_that_fails_ends_all(checkpoint: str, tmp_path: Path, stop: str) -> None:
    own = config(checkpoint, tmp_path, *SETTINGS["two"], stop=stop, at=3, rank=1)
    told = {"raise": "RuntimeError: out of memory", "SIGKILL": "terminated with signal SIGKILL"}
    assert told[stop] in in_child(own, tmp_path, 1)


@pytest.mark.parametrize("at", [2, 4, pytest.param(3, marks=matrix)])
@pytest.mark.matrix
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


# The second validation is the best; patience ends with the fourth.
EARLY = ("trainer.val_check_interval=2", "checkpoint_every=2", "patience=2", "keep=best")
EARLY += ("learning_rate=0.03", "trainer.max_steps=30", "trainer.num_sanity_val_steps=0")


@pytest.fixture(scope="module")
def early(checkpoint: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A training that ends early and keeps its best, uninterrupted."""
    folder = tmp_path_factory.mktemp("early")
    training.train(config(checkpoint, folder, *EARLY), folder)
    told = losses(folder, "validations")
    first, best, third, fourth = (float.fromhex(told[step][0]) for step in (2, 4, 6, 8))
    assert best < min(first, third, fourth) - 0.1  # whatever rounding does
    return folder


@pytest.mark.matrix
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
    assert after["steps"] == before["steps"] == 8
    assert after["validation"] == before["validation"]
