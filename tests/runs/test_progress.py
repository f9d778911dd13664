"""The progress bar counts what there is to do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from hydra.utils import instantiate

from tokenprune.cli.configs import compose
from tokenprune.runs.progress import ProgressBar

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
]


class Line(pl.LightningModule):
    """The smallest training there is: three batches an epoch."""

    def __init__(self) -> None:
        super().__init__()
        self.slope = torch.nn.Linear(1, 1)

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        return self.slope(batch).sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-3)

    def train_dataloader(self) -> Any:
        return torch.utils.data.DataLoader(torch.ones(3, 1))


class Watch(pl.Callback):
    """What the bar shows after each batch."""

    def __init__(self, bar: ProgressBar) -> None:
        self.bar, self.shown = bar, []

    def on_train_batch_end(self, *_: Any) -> None:
        own = self.bar.train_progress_bar
        self.shown.append((own.description.strip(), int(own.completed), int(own.total)))


def shown(tmp_path: Path, **options: Any) -> list[tuple[str, int, int]]:
    bar = ProgressBar()
    watch = Watch(bar)  # after the bar
    trainer = pl.Trainer(
        accelerator="cpu",
        callbacks=[bar, watch],
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
        log_every_n_steps=1,
        **options,
    )
    trainer.fit(Line())
    return watch.shown


def test_steps_end_a_training_in_no_known_epoch(tmp_path: Path) -> None:
    found = shown(tmp_path, max_steps=5)
    assert found == [*(("Epoch 0", i, 3) for i in (1, 2, 3)), *(("Epoch 1", i, 2) for i in (1, 2))]


def test_steps_of_several_batches(tmp_path: Path) -> None:
    found = shown(tmp_path, max_steps=2, accumulate_grad_batches=2)
    assert found == [("Epoch 0", i, 3) for i in (1, 2, 3)]


def test_epochs_that_are_known_are_counted(tmp_path: Path) -> None:
    found = shown(tmp_path, max_epochs=2)
    assert found == [(f"Epoch {epoch}/1", i, 3) for epoch in (0, 1) for i in (1, 2, 3)]


@pytest.mark.parametrize("command", ["eval", "train"])
def test_the_commands_have_it(command: str) -> None:
    (bar,) = instantiate(compose(command, []).trainer.callbacks)
    assert isinstance(bar, ProgressBar)
