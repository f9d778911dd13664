"""The machine that is measured."""

from __future__ import annotations

import platform
from importlib import metadata
from pathlib import Path
from typing import Any

import torch


def choose_device(name: str) -> torch.device:
    """The device of a choice: `auto` is a GPU where there is one.

    Args:
        name: `auto`, `cpu` or `cuda`.
    """
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def machine(device: torch.device) -> dict[str, Any]:
    """The machine that is measured: name, threads, versions."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        told = Path("/proc/cpuinfo")
        lines = told.read_text().splitlines() if told.is_file() else []
        models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
        name = models[0] if models else platform.processor() or platform.machine()
    return {
        "machine": name,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": metadata.version("transformers"),
    }
