"""Sharded training: FSDP2, on GPUs or CPUs, in this machine's processes or those of a launcher.

Lightning's `ModelParallelStrategy` would start the whole command again for every process, which a
sweep cannot bear; here processes are spawned, as `ddp_spawn` does, and the whole weights come back.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.strategies import ModelParallelStrategy
from pytorch_lightning.strategies.launchers.multiprocessing import _MultiProcessingLauncher

from tokenprune.families.anatomy import examine


class Sharded(ModelParallelStrategy):
    """Shards parameters, gradients and optimiser states over all processes.

    A checkpoint to go on from is a folder, to which each process writes its own shards; any number
    of processes can go on from it. Weights alone are a single file, as those of other strategies.

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
            super()._configure_launcher()  # which starts none
        else:
            self._launcher = _Launcher(self, self._start_method)

    @contextmanager
    def in_shards(self) -> Iterator[None]:
        """Inside its `with`, checkpoints are folders of shards."""
        self._save_distributed_checkpoint = True
        try:
            yield
        finally:
            self._save_distributed_checkpoint = False

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> Any:
        path = Path(self.broadcast(checkpoint_path))
        if not path.is_dir():
            return super().load_checkpoint(path, weights_only)
        from torch.distributed.checkpoint import state_dict as states
        from torch.distributed.checkpoint.state_dict_loader import load

        # Lightning would ask for what is frozen, too, which checkpoints leave out.
        module: Any = self.model
        saved = torch.load(path / META, map_location="cpu", weights_only=True)
        own = states.get_model_state_dict(module)
        state: dict[str, Any] = {"state_dict": {name: own[name] for name in saved[WEIGHTS]}}
        load(state, checkpoint_id=path)
        options = states.StateDictOptions(strict=False)
        states.set_model_state_dict(module, state["state_dict"], options=options)
        for number, optimizer in enumerate(self.optimizers):
            key = f"optimizer_{number}"
            state = {key: states.get_optimizer_state_dict(module, optimizer)}
            load(state, checkpoint_id=path)
            states.set_optimizer_state_dict(module, optimizer, state[key])
        return saved

    def whole_weights(self, names: Collection[str]) -> dict[str, torch.Tensor]:
        """Weights as they are without sharding, in every process; all must ask."""
        whole: dict[str, Any] = self.lightning_module_state_dict()  # empty in all but the first
        found: dict[str, Any] = {name: self.broadcast(whole.get(name)) for name in sorted(names)}
        return found


#: In a checkpoint's folder, what is no tensor of a shard.
META = "meta.pt"
#: There, the shapes of the weights by their names.
WEIGHTS = "shapes"


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
