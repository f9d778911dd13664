"""Sharded training: FSDP2 in processes that this one starts, on GPUs or CPUs.

Lightning's `ModelParallelStrategy` would start the whole command again for every process, which a
sweep cannot bear; here processes are spawned, as `ddp_spawn` does, and the whole weights come back.
"""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.strategies import ModelParallelStrategy
from pytorch_lightning.strategies.launchers.multiprocessing import _MultiProcessingLauncher

from tokenprune.families.anatomy import examine


class Sharded(ModelParallelStrategy):
    """Shards parameters, gradients and optimiser states over all processes.

    Checkpoints are single files with whole weights, as those of other strategies.

    Args:
        process_group_backend: None is nccl on GPUs, gloo on CPUs.
        start_method: How processes start: `"spawn"`, `"fork"` or `"forkserver"`.
    """

    def __init__(
        self, process_group_backend: str | None = None, start_method: str = "spawn"
    ) -> None:
        super().__init__(
            save_distributed_checkpoint=False, process_group_backend=process_group_backend
        )
        self._start_method: Any = start_method

    def setup_environment(self) -> None:
        # The base class would split tensors within a machine.
        self._data_parallel_size = self.num_nodes * self.num_processes
        self._tensor_parallel_size = 1
        super().setup_environment()

    def _configure_launcher(self) -> None:
        assert self.cluster_environment is not None
        if self.cluster_environment.creates_processes_externally:
            raise ValueError(
                "trainer.strategy: expected to start the processes of a sharded training itself, "
                f"got them from {type(self.cluster_environment).__name__}. Start the command once, "
                "without torchrun or srun."
            )
        self._launcher = _Launcher(self, self._start_method)


class _Launcher(_MultiProcessingLauncher):
    """Brings whole weights back from the processes, not the first one's shards."""

    def _collect_rank_zero_results(self, trainer: pl.Trainer, results: Any) -> Any:
        whole = trainer.strategy.lightning_module_state_dict()
        vars(trainer.lightning_module)["state_dict"] = lambda: whole
        return super()._collect_rank_zero_results(trainer, results)


def shard(model: Any, mesh: Any) -> None:
    """Shards a model: each decoder layer is gathered when it runs, all else with the whole.

    The vision tower belongs to all else, so that a process whose batch shows no image does not
    leave the others waiting for it.

    Args:
        model: A Hugging Face vision-language model; changed in place.
        mesh: One-dimensional device mesh of the processes.
    """
    from torch.distributed.fsdp import FSDPModule, fully_shard

    if isinstance(model, FSDPModule):  # by an earlier loop in the same processes
        return
    for layer in examine(model).layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    # A backward pass gathers the layers once more, which takes all processes: it must get there
    # even where nothing before the layers is trained by this process's batch.
    model.get_input_embeddings().register_forward_hook(_require_gradient)


def _require_gradient(module: Any, args: Any, output: torch.Tensor) -> None:
    if torch.is_grad_enabled():
        output.requires_grad_(True)
