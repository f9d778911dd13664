"""What is known of a pass, brought to the device of a layer at once."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from tokenprune.engine.trees import exchanged, tensors

HOST = torch.device("cpu")
#: Bytes at whose multiples numbers of any kind may start.
_STEP = 8


def bring(tables: Sequence[Any], device: torch.device) -> list[Any]:
    """Tables with their tensors on a device, by one transfer.

    Args:
        tables: Plans and levels, on one device, some of them more than once. Side tensors, which
            are made anew where they are needed, stay behind.
        device: Where to.
    """
    found = {id(tensor): tensor for tensor in tensors(tables)}
    if all(tensor.device == device for tensor in found.values()):
        return [*tables]
    there = dict(zip(found, _moved([*found.values()], device), strict=True))
    moved: list[Any] = exchanged([*tables], there)
    return moved


def _moved(given: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """Tensors of any kind on another device, side by side on the way there."""
    ends = list(itertools.accumulate(-(-t.numel() * t.itemsize // _STEP) * _STEP for t in given))

    def parts(flat: Tensor) -> Iterator[Tensor]:
        for tensor, start in zip(given, [0, *ends], strict=False):
            own = flat[start : start + tensor.numel() * tensor.itemsize]
            yield own.view(tensor.dtype).view(tensor.shape)

    together = torch.empty(ends[-1], dtype=torch.uint8, device=given[0].device)
    for part, tensor in zip(parts(together), given, strict=True):
        part.copy_(tensor)
    return [*parts(together.to(device, non_blocking=True))]
