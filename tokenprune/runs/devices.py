"""What a run asks of the machine, checked before anything is loaded."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from tokenprune.runs.launchers import fit_trainer, launched

#: Precisions in which weights keep small updates.
PRECISIONS = (None, "32", "32-true", "64", "64-true", "bf16-mixed", "16-mixed")

_NOT_ON_CPU = (
    "trainer.precision: expected one that a CPU can train in, got '16-mixed'. "
    "Set trainer.precision=bf16-mixed or null."
)


def check_nodes(trainer: Mapping[str, Any]) -> None:
    """Refuses a trainer's config of other processes than there are, which would wait for them.

    Args:
        trainer: Arguments of `pytorch_lightning.Trainer`.

    Raises:
        ValueError: It asks for several machines where no launcher has started any, or for other
            numbers than a launcher has.
    """
    launch, nodes = launched(), trainer.get("num_nodes")
    if launch is not None:
        fit_trainer(trainer, launch)
        return
    if nodes not in (None, 1) or isinstance(nodes, bool):
        raise ValueError(
            f"trainer.num_nodes: expected 1, this machine, got {nodes!r}. Leave it out, and "
            "start the command by torchrun or srun on as many machines as there are "
            "(docs/scale.md)."
        )


def check_devices(trainer: Mapping[str, Any]) -> None:
    """Refuses a trainer's config that this machine cannot honour.

    Args:
        trainer: Arguments of `pytorch_lightning.Trainer`.

    Raises:
        ValueError: There is no GPU, or there are fewer of them, or of a CPU's cores, than
            processes; or it asks for other machines.
    """
    check_nodes(trainer)
    launch = launched()
    trainer = dict(trainer) | fit_trainer(trainer, launch)
    accelerator, devices = trainer.get("accelerator", "auto"), trainer.get("devices", "auto")
    gpus = _num_gpus(trainer)
    if accelerator in ("gpu", "cuda") and gpus == 0:
        raise ValueError(
            f"trainer.accelerator: expected a device of this machine, got {accelerator!r} without "
            "any GPU that torch can use. Set trainer=cpu, or install a CUDA build of torch."
        )
    uses_gpus = accelerator in ("gpu", "cuda", "auto") and gpus > 0
    if uses_gpus and (most := _num_devices(devices)) > gpus:
        remedy = "Set trainer.devices=auto."
        if launch is not None:
            remedy = "Give each process all GPUs of its machine (srun: no --gpus-per-task)."
        raise ValueError(
            f"trainer.devices: expected at most {gpus}, the GPUs of this machine, got "
            f"{devices!r}: {most} processes. {remedy}"
        )
    cores = os.cpu_count() or 1
    # Who starts processes by a launcher has decided how many.
    own = launch is None and not uses_gpus and _on_cpu(trainer)
    if own and (most := _num_devices(devices)) > cores:
        raise ValueError(
            f"trainer.devices: expected at most {cores}, the cores of this CPU, got {devices!r}. "
            "Lower trainer.devices."
        )


def check_settings(trainer: Mapping[str, Any]) -> None:
    """Refuses a trainer's config that no machine can train with.

    Args:
        trainer: Arguments of `pytorch_lightning.Trainer`.

    Raises:
        ValueError: Training has no end, the precision keeps no small updates, or it asks for other
            machines.
    """
    check_nodes(trainer)
    steps, epochs = (trainer.get(name) for name in ("max_steps", "max_epochs"))
    if steps in (None, -1) and epochs in (None, -1):
        raise ValueError(
            f"trainer.max_steps: expected a number of steps, by which the learning rate falls, got "
            f"{steps} with trainer.max_epochs={epochs}. Set one of them."
        )
    precision = trainer.get("precision")
    if (None if precision is None else str(precision)) not in PRECISIONS:
        raise ValueError(
            f"trainer.precision: expected float32 weights, got {precision!r}. "
            "Set trainer.precision=bf16-mixed, 16-mixed or null."
        )
    if precision == "16-mixed" and trainer.get("accelerator") == "cpu":
        raise ValueError(_NOT_ON_CPU)
    if precision == "16-mixed" and _shards(trainer):
        raise ValueError(
            "trainer.precision: expected bf16-mixed or float32 for a sharded training, got "
            "'16-mixed'. Set trainer.precision=bf16-mixed."
        )


def check_training(trainer: Mapping[str, Any]) -> None:
    """Refuses a trainer's config that cannot train on this machine.

    Args:
        trainer: Arguments of `pytorch_lightning.Trainer`.

    Raises:
        ValueError: As `check_devices` and `check_settings`; or the device does not have the
            precision.
    """
    check_devices(trainer)
    check_settings(trainer)
    on_cpu, precision = _on_cpu(trainer), trainer.get("precision")
    if precision == "16-mixed" and on_cpu:
        raise ValueError(_NOT_ON_CPU)
    if precision == "bf16-mixed" and not on_cpu and _lacks_bf16(trainer):
        raise ValueError(
            "trainer.precision: expected one that this GPU has, got 'bf16-mixed', which needs "
            "compute capability 8.0. Set trainer.precision=16-mixed."
        )


def check_evaluation(trainer: Mapping[str, Any]) -> None:
    """Refuses a trainer's config that cannot evaluate on this machine.

    Args:
        trainer: Arguments of `pytorch_lightning.Trainer`.

    Raises:
        ValueError: As `check_devices`; or the model would be sharded.
    """
    check_devices(trainer)
    if _shards(trainer):
        raise ValueError(
            "trainer: expected a whole model in each process to evaluate, got a strategy that "
            "shards it. Set trainer=ddp; a model that one GPU does not hold fits several with "
            "model.device_map=auto and trainer=gpu."
        )


def parse_shard(shard: object) -> tuple[int, int] | None:
    """A shard's number and how many there are: (3, 8) of `3/8`; None where there are none.

    Raises:
        ValueError: It is no shard.
    """
    if shard is None:
        return None
    rank, _, size = str(shard).partition("/")
    if not (rank.isdecimal() and size.isdecimal() and int(rank) < int(size)):
        raise ValueError(
            f"shard: expected null, or a number and how many there are, counted from 0, got "
            f"{shard!r}. Set shard=0/8 to shard=7/8 for eight."
        )
    return int(rank), int(size)


def default_device() -> str:
    """Where a model goes that no trainer moves: a GPU, if there is one."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


# torch takes a second to load: it is asked only where its answer counts.
def num_gpus() -> int:
    """GPUs that torch can use."""
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def _num_gpus(trainer: Mapping[str, Any]) -> int:
    """The same, where the trainer would take one."""
    return 0 if trainer.get("accelerator", "auto") == "cpu" else num_gpus()


def _lacks_bf16(trainer: Mapping[str, Any]) -> bool:
    if _num_gpus(trainer) == 0:
        return False
    import torch

    return not torch.cuda.is_bf16_supported(False)


def _on_cpu(trainer: Mapping[str, Any]) -> bool:
    accelerator = trainer.get("accelerator", "auto")
    return accelerator == "cpu" or (accelerator == "auto" and _num_gpus(trainer) == 0)


def _shards(trainer: Mapping[str, Any]) -> bool:
    text = str(trainer.get("strategy")).lower()
    return any(name in text for name in ("sharded", "fsdp", "modelparallel", "deepspeed"))


def _num_devices(devices: Any) -> int:
    """Processes that `devices` asks for at least; 0 for all there are."""
    if isinstance(devices, (list, tuple)):
        return max([len(devices), *(int(device) + 1 for device in devices)])
    text = str(devices)
    if "," in text:
        return _num_devices([part for part in text.split(",") if part.strip()])
    return int(text) if text.isdigit() else 0
