"""Going on from a checkpoint: which one, whether it fits, and what the curves may keep."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch

from tokenprune.runs.loggers import CSVCurve
from tokenprune.training.checkpoints import LAST
from tokenprune.training.module import FineTune
from tokenprune.training.sharding import META, WEIGHTS, Sharded


def find_checkpoint(choice: str | None, folder: Path) -> str | None:
    """The checkpoint to go on from; None to start anew.

    Args:
        choice: None, `last`, `auto`, which is `last` where there is one, or a path.
        folder: The run's, which has the last one.

    Raises:
        ValueError: If there is none, or it is something else.
    """
    if choice is None or (choice == "auto" and not (folder / LAST).exists()):
        return None
    path = folder / LAST if choice in ("last", "auto") else Path(choice).expanduser()
    if not (path / META if path.is_dir() else path).is_file():
        raise ValueError(
            f"ckpt_path: expected a checkpoint, got {str(path)!r}, which does not exist. Set "
            "hydra.run.dir to the folder of the interrupted run, or ckpt_path=null to start anew."
        )
    try:
        content = _read(path)
        reason = "" if isinstance(content, dict) and "loops" in content else "it has no loops"
    except (RuntimeError, OSError, EOFError, ValueError, pickle.UnpicklingError) as error:
        reason = str(error).strip().split("\n")[0].rstrip(".")
    if reason:
        raise ValueError(
            f"ckpt_path: expected a checkpoint that `tokenprune train` wrote, got {str(path)!r}: "
            f"{reason}. Choose another one, or ckpt_path=null to start anew."
        )
    return str(path)


def check_strategy(path: str, strategy: Any) -> None:
    """Refuses a checkpoint of shards where the model is whole.

    Raises:
        ValueError: It is one.
    """
    if Path(path).is_dir() and not isinstance(strategy, Sharded):
        raise ValueError(
            f"trainer: expected trainer=fsdp to go on from the shards in {path!r}, got "
            f"{type(strategy).__name__}. trainer=fsdp goes on with any number of processes, "
            "trainer.devices=1 as well."
        )


def _read(path: Path) -> Any:
    """A checkpoint, but for the weights of one in shards."""
    # Mapped, not read; pickled code does not run.
    file = path / META if path.is_dir() else path
    return torch.load(file, map_location="cpu", weights_only=True, mmap=True)


def check_weights(path: str, module: FineTune) -> None:
    """Refuses a checkpoint whose weights are not those that this training trains."""
    content = _read(Path(path))
    known = content.get(WEIGHTS)
    if known is None:  # a file from before shapes were noted
        known = {name: value.shape for name, value in content["state_dict"].items()}
    buffers = dict(module.named_buffers())
    state = {name: tuple(shape) for name, shape in known.items() if name not in buffers}
    trained = [(name, value) for name, value in module.named_parameters() if value.requires_grad]
    own = {name: tuple(value.shape) for name, value in trained}
    whose = f"the weights that are trained here, of {type(module.model).__name__}"
    for name in sorted(own.keys() | state.keys()):
        shapes = [held.get(name) for held in (own, state)]
        if shapes[0] == shapes[1]:
            continue
        found = "lacks it" if shapes[1] is None else f"has it as {shapes[1]}"
        wanted = "not trained" if shapes[0] is None else f"{shapes[0]}"
        raise ValueError(
            f"ckpt_path: expected {whose}, with {name} {wanted}, got {path!r}, which {found}. "
            "Use the model, parts, model.tuning and model.lora of the interrupted run."
        )


def cut_curves(trainer: pl.Trainer, start: str | None) -> None:
    """Leaves of the curves what the checkpoint to start from knows."""
    step = -1
    if start is not None:
        step = _read(Path(start))["global_step"]
    for logger in trainer.loggers:
        if isinstance(logger, CSVCurve):
            logger.cut(step)
