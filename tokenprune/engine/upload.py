"""What is known of a pass, brought to the device of a layer at once."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

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
    found = {id(tensor): tensor for table in tables for tensor in _tensors(table)}
    if all(tensor.device == device for tensor in found.values()):
        return [*tables]
    there = dict(zip(found, _moved([*found.values()], device), strict=True))

    def moved(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: there[id(own)] for key, own in value.items() if id(own) in there}
        return there.get(id(value), value)

    once = {id(table): table for table in tables}
    brought = {
        number: replace(
            table, **{f.name: moved(getattr(table, f.name)) for f in fields(table) if f.init}
        )
        for number, table in once.items()
    }
    return [brought[id(table)] for table in tables]


def _tensors(table: Any) -> Iterator[Tensor]:
    """The tensors in a table's fields, and in its dicts."""
    for field in fields(table):
        value = getattr(table, field.name)
        for own in value.values() if isinstance(value, dict) else [value]:
            if isinstance(own, Tensor):
                yield own


def _moved(tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """Tensors of any kind on another device, side by side on the way there."""
    ends = list(itertools.accumulate(-(-t.numel() * t.itemsize // _STEP) * _STEP for t in tensors))

    def parts(flat: Tensor) -> Iterator[Tensor]:
        for tensor, start in zip(tensors, [0, *ends], strict=False):
            own = flat[start : start + tensor.numel() * tensor.itemsize]
            yield own.view(tensor.dtype).view(tensor.shape)

    together = torch.empty(ends[-1], dtype=torch.uint8, device=tensors[0].device)
    for part, tensor in zip(parts(together), tensors, strict=True):
        part.copy_(tensor)
    return [*parts(together.to(device, non_blocking=True))]
