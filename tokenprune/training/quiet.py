"""Keeps back what Lightning says about things that are meant to be so."""

from __future__ import annotations

import logging
import multiprocessing
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from tokenprune.runs.trainers import MEANT

_MESSAGES = (
    *MEANT,
    ".*in eval mode at the start of training",  # what is frozen has no dropout
    ".*Using `DistributedSampler` with the dataloaders",  # ours repeats no sample
    ".*is smaller than the logging interval",
    # 16-mixed leaves out steps that overflow, as the first ones do; the schedule counts them.
    r"Detected call of `lr_scheduler\.step\(\)` before `optimizer\.step\(\)`",
    ".*your dataloader is not resumable",  # the data module is
)


def _ignore() -> None:
    for message in _MESSAGES:
        warnings.filterwarnings("ignore", message=message)


@contextmanager
def quiet() -> Iterator[None]:
    """Without these warnings inside its `with`, and what torch says as it ends processes."""
    ends = logging.getLogger("torch.multiprocessing.spawn")
    level = ends.level
    ends.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            _ignore()
            yield
    finally:
        ends.setLevel(level)


def quiet_if_started() -> None:
    """Without these warnings, and what goes well, where this process was started by a training."""
    # Its parent is not known yet where a process is being set up, but its name is.
    if multiprocessing.current_process().name != "MainProcess":
        _ignore()
        for name in ("pytorch_lightning", "lightning_fabric", "lightning.pytorch"):
            logging.getLogger(name).setLevel(logging.WARNING)
