"""Trainings of tiny models, which tests run in their own process or let others run."""

from __future__ import annotations

import csv
import dataclasses
import json
import os
import re
import signal
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import models
import pytest
import pytorch_lightning as pl
import torch
from omegaconf import DictConfig
from processes import preload
from pytorch_lightning.loggers import CSVLogger
from pytorch_lightning.loops import utilities as loop_utilities
from pytorch_lightning.strategies import DDPStrategy
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import CLIPImageProcessorPil, LlavaProcessor, PreTrainedTokenizerFast

import tokenprune as tp
from tokenprune import training
from tokenprune.data.collate import IGNORED, ConversationCollator
from tokenprune.data.module import VQADataModule
from tokenprune.data.scenes import COLOURS, SYMBOLS, SceneDataset
from tokenprune.runs.compose import Pruning
from tokenprune.runs.models import LoadedModel
from tokenprune.training.checkpoints import Stopped
from tokenprune.training.module import FineTune
from tokenprune.training.sharding import Sharded

SPECIAL = ["<pad>", "</s>", "<unk>"]
WORDS = re.findall(
    r"\S+",
    "USER ASSISTANT : ? Which symbol is colour Is there a left of above What does the sign say "
    "yes no",
)
SCHEDULE = tp.Schedule.pyramid(num_layers=models.NUM_LAYERS, num_stages=3, lam=0.5)

# Of pytorch_lightning with this torch, and advice on settings that are right for a test.
LIGHTNING = [
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*in eval mode at the start of training"),
    pytest.mark.filterwarnings("ignore:.*overridden `transfer_batch_to_device`"),
]


def build_processor() -> LlavaProcessor:
    words = [*SPECIAL, *WORDS, *SYMBOLS, *COLOURS]
    ids = {word: number for number, word in enumerate(words)} | {"<image>": models.IMAGE}
    core = Tokenizer(WordLevel(ids, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        extra_special_tokens={"image_token": "<image>"},
        padding_side="left",
    )
    images = CLIPImageProcessorPil(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}
    )
    return LlavaProcessor(
        images,
        tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )


class Watched(FineTune):
    """Keeps and logs the gradients of each step: AdamW would hide their size."""

    def on_before_optimizer_step(self, optimizer):
        super().on_before_optimizer_step(optimizer)
        found = [p.grad for p in self.parameters() if p.grad is not None]
        self.gradients = [getattr(g, "full_tensor", g.clone)() for g in found]
        norms = torch.stack([gradient.norm() for gradient in self.gradients])
        self.log("gradient", norms.norm())


# --------------------------------------------------------------------------- one or two processes


#: Several processes are forks of a server that has imported all they need, and run nothing.
SERVER = "forkserver"
DDP = (
    "trainer=ddp",
    "trainer.strategy={_target_:pytorch_lightning.strategies.DDPStrategy,start_method:forkserver}",
    "trainer.accelerator=cpu",
    "trainer.devices=2",
    "data.batch_size=2",
)
FSDP = (
    "trainer=fsdp",
    "trainer.strategy.start_method=forkserver",
    "trainer.accelerator=cpu",
    "trainer.devices=2",
    "data.batch_size=2",
)


class Apart(pl.Callback):
    """Gives each process weights of its own: forks of Lightning's server would share them."""

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        for tensor in (*pl_module.parameters(), *pl_module.buffers()):
            tensor.data = tensor.data.clone()
        preload()  # for the workers of loaders


class Masking(ConversationCollator):
    """Takes the labels from some samples."""

    def __init__(self, processor, masked):
        super().__init__(processor)
        self.masked = masked

    def __call__(self, samples):
        batch = super().__call__(samples)
        for row, sample in enumerate(samples):
            if sample.id in self.masked:
                batch["inputs"]["labels"][row] = IGNORED
        return batch


class Blind(SceneDataset):
    """Takes the pictures from some samples."""

    blind: frozenset[str] = frozenset()

    def __getitem__(self, index):
        sample = super().__getitem__(index)
        return dataclasses.replace(sample, images=()) if sample.id in self.blind else sample


class Data(VQADataModule):
    masked: frozenset[str] = frozenset()

    def train_dataloader(self):
        loader = super().train_dataloader()
        loader.collate_fn = Masking(self.processor, self.masked)
        return loader


def six_steps(
    folder: Path,
    strategy: str,
    how: str = "auto",
    batch_size: int = 4,
    devices: int = 1,
    batches: int = 1,
    **options: Any,
) -> dict[str, Any]:
    """Losses of six steps, two validation losses, and the trained weights.

    Args:
        folder: For the curves.
        strategy: What prunes, or `"none"`.
        how: `"auto"` in one process, `"ddp"` or `"fsdp"` in several.
        batch_size: Of each process.
        devices: Processes.
        batches: That make up a step.
        options: `masked`, `blind`: ids of samples that lose labels, pictures. `num_samples`.
            `double`: in float64. Others are the module's.
    """
    masked, double = options.pop("masked", frozenset()), options.pop("double", False)
    train = Blind("train", options.pop("num_samples", 24))
    train.blind = options.pop("blind", frozenset())
    module_options = {"learning_rate": 1e-3, "weight_decay": 0.1} | options
    torch.manual_seed(0)
    model = models.build("llava")
    loaded = LoadedModel(model.double() if double else model, build_processor())
    data = Data(
        train=train,
        validation=SceneDataset("validation", 5),
        processor=loaded.processor,
        batch_size=batch_size,
    )
    data.masked = masked
    own = None
    if strategy != "none":
        own = Pruning(tp.build_strategy(strategy), SCHEDULE, "renumbered")
    module = Watched(loaded, own, **module_options)
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=devices,
        strategy={"ddp": DDPStrategy(start_method=SERVER), "fsdp": Sharded(None, SERVER)}.get(
            how, how
        ),
        callbacks=[Apart()],
        logger=CSVLogger(folder, version=""),
        log_every_n_steps=1,
        max_steps=6,
        val_check_interval=3 * batches,
        accumulate_grad_batches=batches,
        gradient_clip_val=1.0,
        num_sanity_val_steps=1,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, datamodule=data)
    with (folder / "lightning_logs" / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    trained = {name: p.detach().clone() for name, p in module.named_parameters() if p.requires_grad}
    found = {"rows": rows, "trained": trained}
    for name in ("train_loss", "val_loss", "gradient", "unsupervised_batches"):
        found[name] = [float(row[name]) for row in rows if row.get(name)]
    return found


def save_six_steps(folder: Path, *arguments: Any, **options: Any) -> None:
    """The same, written to `result.pt` in the folder."""
    torch.save(six_steps(folder, *arguments, **options), folder / "result.pt")


def save_batches(data: VQADataModule, file: Path) -> None:
    """Ids and labels of the training's batches, as its loader gives them."""
    loader = data.train_dataloader()
    batches = [([s.id for s in b["samples"]], b["inputs"]["labels"]) for b in loader]
    torch.save(batches, file)


# ----------------------------------------------------------------------------------- interruptions


def train(config: DictConfig, folder: Path) -> None:
    """Trains and leaves with the exit code of `tokenprune train`."""
    try:
        training.train(config, folder)
    except Stopped as stop:
        sys.exit(128 + stop.signum)


class Recorder(Apart):
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
                # The one that started the others leads their session.
                os.kill({"self": os.getpid(), "parent": os.getsid(0)}[self.to], signum)

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        loss = float(trainer.callback_metrics["val_loss"]).hex()
        self.write("validations", trainer.global_step, loss)
        self.validations += 1
        if self.stop == "validation" and self.validations == self.at:
            raise RuntimeError("out of memory")


class UnderNccl(Apart):
    """Lets Lightning take its processes for a group on GPUs."""

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        loop_utilities.dist = SimpleNamespace(get_backend=lambda: "nccl")
