"""Callbacks that stop a run from outside, as far as it can tell."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytorch_lightning as pl


class Interrupt(pl.Callback):
    """Ends an evaluation as Ctrl-C does."""

    def on_predict_batch_end(self, *arguments: object) -> None:
        os.kill(os.getpid(), signal.SIGINT)


class Terminate(pl.Callback):
    """Ends an evaluation as a scheduler does."""

    def on_predict_batch_end(self, *arguments: object) -> None:
        os.kill(os.getpid(), signal.SIGTERM)


class Wait(pl.Callback):
    """Stays in an evaluation until somebody ends it.

    Args:
        path: A file that says that it waits.
    """

    def __init__(self, path: str) -> None:
        self.path = path

    def on_predict_batch_end(self, *arguments: object) -> None:
        Path(self.path).touch()
        time.sleep(600)
