"""Lightning's trainer, as a config describes it."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytorch_lightning as pl

from tokenprune.runs import targets

#: Remarks of any trainer, when it is built and when it runs, on things that are meant to be so.
MEANT = (
    # On a cluster's login node: a run of one process, or of those that it starts itself.
    ".*`srun` command is available on your system but is not used",
    ".*GPU available but not used",  # trainer=cpu was asked for
    ".*overridden `transfer_batch_to_device`",  # pictures stay where they are
    ".*does not have many workers",
    ".*isinstance.treespec, LeafSpec",  # Lightning's own
)


@contextmanager
def quiet(messages: Sequence[str] = ()) -> Iterator[None]:
    """Without these warnings inside its `with`, and what any trainer remarks."""
    with warnings.catch_warnings():
        for message in (*MEANT, *messages):
            warnings.filterwarnings("ignore", message=message)
        yield


def build_trainer(config: Any, **arguments: Any) -> pl.Trainer:
    """The trainer that a config names.

    Args:
        config: Its `_target_` and arguments.
        arguments: Further ones.
    """
    with quiet():
        # Partial: arguments are objects, which a config does not hold.
        trainer = targets.build(config, "trainer", _partial_=True)(**arguments)
    assert isinstance(trainer, pl.Trainer)
    return trainer
