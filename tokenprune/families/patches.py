"""Which patches make up a token, where several do: runs of them, or squares of their grid.

Shape suffixes: P patches, T visual tokens, K patches of a token.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor


def runs(numbers: Tensor, edge: int) -> Tensor:
    """Patches that stand in the order of the squares that become tokens, (T, edge ** 2)."""
    return numbers.reshape(-1, edge**2)


def squares(numbers: Tensor, edge: int) -> Tensor:
    """Squares of raster-ordered grids (..., rows, columns), in raster order, (T, edge ** 2)."""
    cut = numbers.unfold(-2, edge, edge).unfold(-2, edge, edge)
    return cut.reshape(-1, edge**2)


def grids(numbers: Tensor, sizes: Iterable[tuple[int, ...]]) -> list[Tensor]:
    """Numbers (P,) of several raster-ordered grids, one after another, each in its size."""
    shapes = [tuple(map(int, size)) for size in sizes]
    parts = torch.split(numbers.flatten(), [torch.Size(shape).numel() for shape in shapes])
    return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]


def times_rows_columns(named: Mapping[str, Any]) -> Tensor:
    """The grids of a call's images or videos, int64 (images, 3), on the host."""
    grid: Tensor = named["image_grid_thw" if "image_grid_thw" in named else "video_grid_thw"]
    return grid.cpu()


def frames(model: Any, named: Mapping[str, Any]) -> Tensor:
    """The frame of each patch, through all images or videos of a call."""
    time, height, width = times_rows_columns(named).T
    return of_sizes((height * width).repeat_interleave(time))


def of_sizes(sizes: Tensor) -> Tensor:
    """The number of the group of each patch, int64 (P,), of groups one after another."""
    return torch.arange(len(sizes)).repeat_interleave(sizes)
