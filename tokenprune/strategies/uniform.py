"""Uniform: the baseline that looks at no content at all.

With a known grid, tokens fall in the order of a Bayer matrix (Bayer, 1973): a quarter of a grid is
every second row and column, a half its checkerboard, and every later cut is as even. Without a
grid, an even stride over the sequence.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, ClassVar

from tokenprune.strategy import PruningStrategy, Published, Selection, TokenView, register

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_BITS = 10  # grids up to 1024 x 1024


@register("uniform")
@dataclass(frozen=True)
class Uniform(PruningStrategy):
    """Keeps an even stride over each image's grid; images share the budget by size."""

    keeps_exactly: ClassVar[bool] = True

    def select(self, view: TokenView, keep: Tensor) -> Selection:
        import torch

        from tokenprune.tensors import grid_units, split_budget

        places, valid_BV = view.places, view.valid
        unit_BV, sizes_BU = grid_units(places, valid_BV)
        quota_BV = split_budget(keep, sizes_BU).gather(1, unit_BV)
        size_BV = sizes_BU.gather(1, unit_BV).clamp_min(1)
        start_BV = (sizes_BU.cumsum(1) - sizes_BU).gather(1, unit_BV)
        # In a grid the emptiest spot comes first; in a sequence the order is its own.
        threshold_BV = _bayer(places[..., 2], places[..., 3])
        in_grid_BV = places[..., 2] >= 0
        order_BV = torch.where(
            in_grid_BV, threshold_BV, torch.arange(unit_BV.shape[1], device=keep.device)
        )
        sorted_BV = (unit_BV * 4**_BITS + order_BV).argsort(dim=1, stable=True)
        rank_BV = sorted_BV.argsort(dim=1) - start_BV
        strided_BV = _stride(rank_BV + 1, quota_BV, size_BV) > _stride(rank_BV, quota_BV, size_BV)
        kept_BV = torch.where(in_grid_BV, rank_BV < quota_BV, strided_BV)
        return Selection(kept=kept_BV & valid_BV)

    @classmethod
    def published(cls, num_layers: int) -> Published:
        """No paper: PyramidDrop's default schedule, so that the baseline has the same budget."""
        options = {"num_layers": num_layers, "num_stages": 4, "lam": 0.5}
        return Published("pyramid", options, positions="original")


def _bayer(row: Tensor, column: Tensor) -> Tensor:
    """Entry of the infinite Bayer matrix, as an integer below 4**_BITS."""
    spread = _spread(row.device)
    return 2 * spread[row ^ column] + spread[row]


@cache
def _spread(device: torch.device) -> Tensor:
    """Of each number below 2**_BITS its bits, in turned order, at every second place."""
    import torch

    number = torch.arange(2**_BITS)
    bits = [(number >> bit & 1) * 4 ** (_BITS - 1 - bit) for bit in range(_BITS)]
    return torch.stack(bits).sum(0).to(device)


def _stride(rank: Tensor, quota: Tensor, size: Tensor) -> Tensor:
    """Tokens that an even stride has kept before the token of this rank."""
    return (rank * quota + size // 2) // size
