"""Callbacks that stop a run from outside, as far as it can tell."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytorch_lightning as pl

from tokenprune.cli.mistakes import BadInput


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


class Refuse(pl.Callback):
    """Refuses a run, in words as ours."""

    def on_predict_start(self, *arguments: object) -> None:
        raise BadInput("stops: expected nothing, got a run. Leave it.")


class Until(pl.Callback):
    """Stays in an evaluation until there is a file `open` in a folder.

    Args:
        folder: Also gets a file for each run that has begun.
    """

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)

    def on_predict_start(self, *arguments: object) -> None:
        (self.folder / f"begun-{os.getpid()}-{time.monotonic_ns()}").touch()
        while not (self.folder / "open").exists():
            time.sleep(0.1)
