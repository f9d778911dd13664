"""Packages that only some configs need: which extra brings them, told before anything is loaded."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

from omegaconf import OmegaConf

#: Class of a logger, its package, and the extra of ours that brings it.
_LOGGERS = {
    "WandbLogger": ("wandb", "wandb"),
    "MLFlowLogger": ("mlflow", "mlflow"),
    "TensorBoardLogger": ("tensorboard", "train"),
}


def check_logger(config: Any) -> None:
    """Refuses a logger whose package is not installed.

    Args:
        config: A run's.

    Raises:
        ValueError: Names the package and the extra.
    """
    target = str(OmegaConf.select(config, "logger._target_") or "")
    package, extra = _LOGGERS.get(target.rpartition(".")[2], ("", ""))
    if package and find_spec(package) is None:
        raise ValueError(
            f"logger: expected the package {package!r} for {target.rpartition('.')[2]}, got none. "
            f"pip install 'tokenprune-vlm[{extra}]', or choose logger=csv."
        )
