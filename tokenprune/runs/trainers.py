"""Lightning's trainer, as a config describes it."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytorch_lightning as pl
from lightning_fabric.plugins.environments.cluster_environment import ClusterEnvironment
from lightning_fabric.plugins.environments.lightning import (
    LightningEnvironment,
    find_free_network_port,
)
from pytorch_lightning.strategies import DDPStrategy

from tokenprune.runs import launchers, targets

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

    It joins the processes that torchrun or srun has started; where there are none, it starts its
    own, whatever is around it.

    Args:
        config: Its `_target_` and arguments.
        arguments: Further ones.

    Raises:
        ValueError: It asks for other processes than there are.
    """
    launch = launchers.launched()
    if config.get("plugins") is None:
        arguments["plugins"] = [OwnProcesses() if launch is None else Launched(launch)]
    options = dict(config) | launchers.fit_trainer(config, launch)
    with quiet():
        # Partial: arguments are objects, which a config does not hold.
        trainer = targets.build(options, "trainer", _partial_=True)(**arguments)
    assert isinstance(trainer, pl.Trainer)
    if launch is not None and isinstance(trainer.strategy, DDPStrategy):
        trainer.strategy._start_method = "popen"  # which starts none where all are there
        trainer.strategy._configure_launcher()
    return trainer


class Launched(ClusterEnvironment):
    """Processes that a launcher has started, on any number of machines."""

    def __init__(self, launch: launchers.Launch) -> None:
        self.launch = launch

    @property
    def creates_processes_externally(self) -> bool:
        return True

    @staticmethod
    def detect() -> bool:
        return launchers.launched() is not None

    @property
    def main_address(self) -> str:
        return self.launch.address

    @property
    def main_port(self) -> int:
        return self.launch.port

    def world_size(self) -> int:
        return self.launch.size

    def set_world_size(self, size: int) -> None:
        """They are as many as there are."""

    def global_rank(self) -> int:
        return self.launch.rank

    def set_global_rank(self, rank: int) -> None:
        """It is the launcher's."""

    def local_rank(self) -> int:
        return self.launch.local_rank

    def node_rank(self) -> int:
        return self.launch.node_rank


class OwnProcesses(LightningEnvironment):
    """Processes of one run on this machine.

    Lightning would take a batch job of Slurm's for a process that srun has started, of as many as
    the job may have tasks, and would have processes meet wherever MASTER_ADDR, MASTER_PORT and
    NODE_RANK say, which schedulers set.
    """

    @property
    def main_address(self) -> str:
        return "127.0.0.1"

    @property
    def main_port(self) -> int:
        if self._main_port == -1 and not launchers.is_own_child():
            self._main_port = find_free_network_port()
        return super().main_port

    def node_rank(self) -> int:
        return 0
