"""A training says nothing alarming about what is meant to be so."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from checkpoint import save_checkpoint
from pytorch_lightning.plugins import MixedPrecision, Precision
from pytorch_lightning.trainer.states import RunningStage, TrainerState

from tokenprune import training
from tokenprune.cli.configs import compose
from tokenprune.training.throughput import Throughput, length, size


def peak(card: str, dtype: str, monkeypatch: pytest.MonkeyPatch) -> int | None:
    """Operations per second that the throughput of a training on a card is compared with."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: card)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    precision = Precision() if dtype == "float32" else MixedPrecision("bf16-mixed", "cuda")
    trainer = SimpleNamespace(
        strategy=SimpleNamespace(root_device=torch.device("cuda", 0)),
        precision_plugin=precision,
        enable_validation=False,
        world_size=1,
        state=TrainerState(stage=RunningStage.TRAINING),
    )
    monitor = Throughput(size, length, window_size=2)
    monitor.setup(trainer, None, "fit")
    return monitor.available_flops


def test_a_card_whose_peak_is_unknown_is_no_news(monkeypatch: pytest.MonkeyPatch) -> None:
    assert peak("NVIDIA H200", "float32", monkeypatch) is None
    assert peak("A card of next year", "float32", monkeypatch) is None
    assert peak("Tesla T4", "bfloat16", monkeypatch) is None
    assert peak("NVIDIA A100-SXM4-80GB", "bfloat16", monkeypatch) == 312e12


def test_steps_that_overflow_are_no_news(tmp_path: Path) -> None:
    """Under float16 a scale too large for its gradients is halved until they fit."""
    checkpoint = save_checkpoint(tmp_path / "checkpoint")
    scaler = "{_target_:torch.amp.GradScaler,device:cpu,init_scale:1e38}"
    plugin = "_target_:pytorch_lightning.plugins.MixedPrecision,precision:16-mixed,device:cpu"
    config = compose(
        "train",
        [
            "model=hub",
            f"model.path={checkpoint}",
            "data.batch_size=2",
            "data.train.num_samples=8",
            "data.validation.num_samples=2",
            "trainer.callbacks=[]",
            "+trainer.enable_progress_bar=false",
            "trainer.max_steps=2",
            "logger=none",
            f"+trainer.plugins=[{{{plugin},scaler:{scaler}}}]",
        ],
    )
    training.train(config, tmp_path / "run")
    state = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)
    assert state["global_step"] == 2
    assert state["MixedPrecision"]["scale"] == pytest.approx(0.25e38)  # both steps overflowed
