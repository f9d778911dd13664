"""Samples, tokens and FLOPs per second, logged at the step that they are about."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import ThroughputMonitor

from tokenprune import Trace
from tokenprune.cost import DecoderShape, flops


class Throughput(ThroughputMonitor):
    """Rows of the curve at the step that they are about.

    The share of a GPU's peak (`mfu`) is among them where Lightning knows it. It warns of a GPU
    or a precision that is missing in its list, which nobody can do anything about.
    """

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="FLOPs not found for")
            warnings.filterwarnings("ignore", message=".*does not support torch")
            super().setup(trainer, pl_module, stage)

    def _compute(self, trainer: pl.Trainer, iter_num: int | None = None) -> None:
        super()._compute(trainer, trainer.global_step)


def size(batch: Mapping[str, Any]) -> int:
    """Samples of a batch."""
    return len(batch["samples"])


def length(batch: Mapping[str, Any]) -> int:
    """Tokens of a batch before any is pruned, without pads."""
    return sum(batch["lengths"])


def forward_flops(shape: DecoderShape, lengths: Sequence[int], trace: Trace | None) -> float:
    """What a forward pass of a batch costs in the decoder's layers; see `tokenprune.cost.flops`.

    A backward pass costs twice as much, or as much where only what flows through the weights is
    needed (PaLM, arXiv 2204.02311, appendix B).

    Args:
        shape: Sizes of the decoder.
        lengths: Tokens of each row before any is pruned.
        trace: How many each layer processed; None if all.
    """
    rows = [[length] * shape.num_layers for length in lengths]
    if trace is not None and trace.lengths.shape[1] == len(rows):
        rows = trace.lengths.T.tolist()
    # Papers count multiply-accumulates; each is two operations.
    return 2 * sum(flops(shape, row) for row in rows)
