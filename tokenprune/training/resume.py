"""Going on from a checkpoint: which one, whether it fits, and what the curves may keep."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytorch_lightning as pl
import torch

from tokenprune.runs.loggers import CSVCurve
from tokenprune.training.checkpoints import LAST
from tokenprune.training.module import FineTune


def find_checkpoint(choice: str | None, folder: Path) -> str | None:
    """The checkpoint to go on from; None to start anew.

    Args:
        choice: None, `last`, or a path.
        folder: The run's, which has the last one.

    Raises:
        ValueError: If there is none, or it is something else.
    """
    if choice is None:
        return None
    path = folder / LAST if choice == "last" else Path(choice).expanduser()
    if not path.is_file():
        raise ValueError(
            f"ckpt_path: expected a checkpoint, got {str(path)!r}, which does not exist. Set "
            "hydra.run.dir to the folder of the interrupted run, or ckpt_path=null to start anew."
        )
    try:
        # Mapped, not read; pickled code does not run.
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        reason = "" if isinstance(content, dict) and "loops" in content else "it has no loops"
    except (RuntimeError, OSError, EOFError, ValueError, pickle.UnpicklingError) as error:
        reason = str(error).strip().split("\n")[0].rstrip(".")
    if reason:
        raise ValueError(
            f"ckpt_path: expected a checkpoint that `tokenprune train` wrote, got {str(path)!r}: "
            f"{reason}. Choose another one, or ckpt_path=null to start anew."
        )
    return str(path)


def check_weights(path: str, module: FineTune) -> None:
    """Refuses a checkpoint whose weights are not those that this training trains."""
    state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)["state_dict"]
    state = {name: state[name] for name in state.keys() - dict(module.named_buffers()).keys()}
    own = {name: value for name, value in module.named_parameters() if value.requires_grad}
    whose = f"the weights that are trained here, of {type(module.model).__name__}"
    for name in sorted(own.keys() | state.keys()):
        shapes = [tuple(held[name].shape) if name in held else None for held in (own, state)]
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
        step = torch.load(start, map_location="cpu", weights_only=True, mmap=True)["global_step"]
    for logger in trainer.loggers:
        if isinstance(logger, CSVCurve):
            logger.cut(step)
