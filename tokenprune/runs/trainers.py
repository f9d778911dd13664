"""Lightning's trainer, as a config describes it."""

from __future__ import annotations

import warnings
from typing import Any

import pytorch_lightning as pl

# Remarks that a trainer makes when it is built, on things that are meant to be so.
_MEANT = (
    # On a cluster's login node: a run of one process, or of those that it starts itself.
    ".*`srun` command is available on your system but is not used",
    ".*GPU available but not used",  # trainer=cpu was asked for
)


def build_trainer(config: Any, **arguments: Any) -> pl.Trainer:
    """The trainer that a config names.

    Args:
        config: Its `_target_` and arguments.
        arguments: Further ones.
    """
    from hydra.utils import instantiate

    with warnings.catch_warnings():
        for message in _MEANT:
            warnings.filterwarnings("ignore", message=message)
        # Partial: arguments are objects, which a config does not hold.
        trainer = instantiate(config, _partial_=True)(**arguments)
    assert isinstance(trainer, pl.Trainer)
    return trainer
