"""Tokens of a batch laid out tile by tile, for choices that compare the tokens of a tile.

Shape suffixes: B batch rows, V visual tokens alive, S seats, U tiles of all rows, L tokens of one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from tokenprune.strategy import Selection, TokenView
from tokenprune.tensors import rank_in_units, share_out, take


@dataclass(frozen=True, eq=False)
class Tiles:
    """A table with a line for each tile.

    Attributes:
        exists: Bool (U, L), which seats are taken.
    """

    exists: Tensor
    _seat_BV: Tensor
    _token_BS: Tensor

    def of(self, values: Tensor) -> Tensor:
        """Values of tokens (B, V, ...), by tile, (U, L, ...); anything at seats that are free."""
        return take(values, self._token_BS).reshape(*self.exists.shape, *values.shape[2:])

    def back(self, marked_UL: Tensor) -> Tensor:
        """Which tokens are marked, bool (B, V); none that is in no tile."""
        marked = torch.nn.functional.pad(marked_UL.reshape(len(self._seat_BV), -1), (0, 1))
        return marked.gather(1, self._seat_BV)


def lay_out(view: TokenView, unit_BV: Tensor, rank_BV: Tensor, inside_BV: Tensor) -> Tiles:
    """Seats tokens by their tile and rank.

    Args:
        view: What the strategy sees.
        unit_BV: int64, tile of each token.
        rank_BV: int64, its seat there.
        inside_BV: Bool, which tokens get one: of others tile and rank may be anything.
    """
    most, length = view.tile_shape
    rows, size = len(unit_BV), most * length
    seat_BV = (unit_BV * length + rank_BV).where(inside_BV, size)
    token_BV = torch.arange(unit_BV.shape[1], device=unit_BV.device).expand_as(unit_BV)
    # What has no seat goes to one beyond the last.
    token_BS = token_BV.new_zeros(rows, size + 1).scatter(1, seat_BV, token_BV)[:, :-1]
    taken_BS = inside_BV.new_zeros(rows, size + 1).scatter(1, seat_BV, inside_BV)[:, :-1]
    return Tiles(taken_BS.reshape(rows * most, length), seat_BV, token_BS)


def choose_by_tile(
    view: TokenView, keep: Tensor, pick: Callable[[Tiles, Tensor, int], Tensor]
) -> Selection:
    """Chooses from each tile by itself; tokens in none, newlines, get what tiles leave over.

    Args:
        view: What the strategy sees.
        keep: int64 (B,), budgets, which tiles share by how many tokens they have.
        pick: Marks, bool (U, L), so many of each tile's tokens, in their order, int64 (U,); the
            last is the most of any, known without asking the device.
    """
    valid_BV, (most, length) = view.valid, view.tile_shape
    unit_BV, quota_BU = share_out(keep, view.tiles, valid_BV)
    order_BV = rank_in_units(torch.zeros_like(unit_BV), unit_BV, valid_BV)
    is_patch_BV = valid_BV & (unit_BV < valid_BV.shape[1])
    tiles = lay_out(view, unit_BV, order_BV, is_patch_BV)
    marked_UL = pick(tiles, quota_BU[:, :most].reshape(-1), min(view.max_keep, length))
    newlines_BV = valid_BV & ~is_patch_BV & (order_BV < quota_BU[:, -1:])
    return Selection(kept=tiles.back(marked_UL) | newlines_BV)
