"""What a run asks of the machine, checked before anything is loaded."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

#: Precisions in which weights keep small updates.
PRECISIONS = (None, "32", "32-true", "64", "64-true", "bf16-mixed", "16-mixed")

_NOT_ON_CPU = (
    "trainer.precision: expected one that a CPU can train in, got '16-mixed'. "
    "Set trainer.precision=bf16-mixed or null."
)


def check_nodes(trainer: Mapping[str, Any]) -> None:
    """Refuses a trainer's config of several machines, which would wait for each other.

    Args:
        trainer: Arguments of `pytorch_lightning.Trainer`.

    Raises:
        ValueError: There are several.
    """
    nodes = trainer.get("num_nodes")
    if nodes not in (None, 1):
        raise ValueError(
            f"trainer.num_nodes: expected 1, this machine, got {nodes!r}. Leave it out; "
            "trainer.devices says how many processes run here."
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
    accelerator, devices = trainer.get("accelerator", "auto"), trainer.get("devices", "auto")
    num_gpus = _num_gpus(trainer)
    if accelerator in ("gpu", "cuda") and num_gpus == 0:
        raise ValueError(
            f"trainer.accelerator: expected a device of this machine, got {accelerator!r} without "
            "any GPU that torch can use. Set trainer=cpu, or install a CUDA build of torch."
        )
    uses_gpus = accelerator in ("gpu", "cuda", "auto") and num_gpus > 0
    if uses_gpus and (most := _num_devices(devices)) > num_gpus:
        raise ValueError(
            f"trainer.devices: expected at most {num_gpus}, the GPUs of this machine, got "
            f"{devices!r}: {most} processes. Set trainer.devices=auto."
        )
    cores = os.cpu_count() or 1
    if not uses_gpus and _on_cpu(trainer) and (most := _num_devices(devices)) > cores:
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


def default_device() -> str:
    """Where a model goes that no trainer moves: a GPU, if there is one."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


# torch takes a second to load: it is asked only where its answer counts.
def _num_gpus(trainer: Mapping[str, Any]) -> int:
    """GPUs that torch can use, where the trainer would take one."""
    if trainer.get("accelerator", "auto") == "cpu":
        return 0
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


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
