"""What goes wrong on one of several processes, and on no other."""

from __future__ import annotations

import os
import resource
import signal
import time
from typing import Any

import pytorch_lightning as pl


class Fail(pl.Callback):
    """Fails on one process, in the middle of a step or of an evaluation's batch.

    Args:
        rank: The process.
        at: The how manieth step or batch of this start.
        failure: `"raise"`, `"kill"` (as -9), `"hang"`, or `"disk"`: its files end early then.
        size: Bytes of such a file.
    """

    def __init__(self, rank: int, at: int, failure: str = "raise", size: int = 20_000) -> None:
        self.rank, self.at, self.failure = rank, at, failure
        self.size, self.here = size, 0

    def on_before_optimizer_step(self, trainer: Any, *_: Any) -> None:
        self._fail(trainer)

    def on_predict_batch_end(self, trainer: Any, *_: Any) -> None:
        self._fail(trainer)

    def _fail(self, trainer: Any) -> None:
        self.here += 1
        if self.here != self.at or trainer.global_rank != self.rank:
            return
        if self.failure == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.failure == "raise":
            raise RuntimeError("in the middle of a step")
        if self.failure == "hang":
            time.sleep(600)
        if self.failure == "disk":
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.size, resource.RLIM_INFINITY))
