"""Pool: the baseline that averages neighbours, whatever they hold.

A path goes through each image's grid in bands of rows, down and up the bands' columns, and is cut
into as many runs as tokens may stay: a quarter of a grid of even size is 2 x 2 average pooling.
Without a grid, runs of the sequence. Images and grids share the budget by size, as in `uniform`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from tokenprune.strategy import PruningStrategy, Published, Selection, TokenView, register

if TYPE_CHECKING:
    from torch import Tensor

_SIDE = 2**14  # no grid has as many rows or columns


@register("pool")
@dataclass(frozen=True)
class Pool(PruningStrategy):
    """Keeps the means of groups of neighbouring tokens, each in the seat of its first."""

    keeps_exactly: ClassVar[bool] = True

    def select(self, view: TokenView, keep: Tensor) -> Selection:
        import torch

        from tokenprune.tensors import grid_units, mixture, split_budget

        places, valid_BV = view.places, view.valid
        width = valid_BV.shape[1]
        unit_BV, sizes_BU = grid_units(places, valid_BV)
        quotas_BU = split_budget(keep, sizes_BU)
        size_BV = sizes_BU.gather(1, unit_BV).clamp_min(1)
        quota_BV = quotas_BU.gather(1, unit_BV)
        start_BV = (sizes_BU.cumsum(1) - sizes_BU).gather(1, unit_BV)
        rank_BV = _rank(_path(places, unit_BV, quota_BV)) - start_BV
        # Of n tokens on a path of q groups, the p-th is in group floor(p * q / n).
        first_BV = (quotas_BU.cumsum(1) - quotas_BU).gather(1, unit_BV)
        joins_BV = (quota_BV > 0) & valid_BV
        group_BV = torch.where(joins_BV, first_BV + rank_BV * quota_BV // size_BV, width)
        number_V = torch.arange(width, device=keep.device).expand_as(unit_BV)
        none_BG = torch.full_like(sizes_BU, width)
        seat_BV = none_BG.scatter_reduce(1, group_BV, number_V, "amin").gather(1, group_BV)
        count_BV = torch.zeros_like(sizes_BU, dtype=torch.float32)
        count_BV = count_BV.scatter_add(1, group_BV, joins_BV.float())
        count_BV = count_BV.gather(1, group_BV).clamp_min(1)
        kept_BV = joins_BV & (seat_BV == number_V)
        row_BV = (kept_BV.cumsum(1) - 1).gather(1, seat_BV.clamp_max(width - 1))
        weights = mixture(row_BV, joins_BV / count_BV, view.max_keep)
        return Selection(kept=kept_BV, weights=weights)

    @classmethod
    def published(cls, num_layers: int) -> Published:
        """No paper: PyramidDrop's default schedule, so that the baseline has the same budget."""
        options = {"num_layers": num_layers, "num_stages": 4, "lam": 0.5}
        return Published("pyramid", options, positions="original")


def _path(places: Tensor, unit_BV: Tensor, quota_BV: Tensor) -> Tensor:
    """Numbers by which a grid's tokens are ordered along its path, int64 (B, V).

    Bands are about as high as groups are wide: sqrt(quota * rows / columns) of them.
    """
    import torch

    row_BV, column_BV = places[..., 2].clamp_min(0), places[..., 3].clamp_min(0)
    none_BU = torch.zeros_like(unit_BV[:, :1]).expand(-1, unit_BV.shape[1] + 1)
    rows_BV, columns_BV = (
        none_BU.scatter_reduce(1, unit_BV, along_BV + 1, "amax").gather(1, unit_BV)
        for along_BV in (row_BV, column_BV)
    )
    bands_BV = ((quota_BV * rows_BV).float() / columns_BV).sqrt().round().long().clamp_min(1)
    band_BV = row_BV * bands_BV // rows_BV
    there_BV = torch.where(band_BV % 2 == 0, column_BV, _SIDE - 1 - column_BV)
    return ((unit_BV * _SIDE + band_BV) * _SIDE + there_BV) * _SIDE + row_BV


def _rank(order_BV: Tensor) -> Tensor:
    """Where each entry stands if its row is sorted; equal ones stay in their order."""
    return order_BV.argsort(dim=1, stable=True).argsort(dim=1)
