"""HiPrune: Liu et al., 2025, arXiv 2508.00553.

Three kinds of tokens of each tile stay. Anchors are what all patches attend to most in a middle
layer of the vision tower; buffers are their neighbours above, below, left and right, and both have
a tenth of the budget; the rest goes to what all patches attend to most in the last layer but one.
Attention is averaged over heads. It looks at no text.

For Qwen2.5-VL the released code asks block 15 and the last (`middle=15, layer=-1`). Departures:
the released code averages the class token's row as well, one of 577; neighbours are found by their
number, so that those of a patch at the edge are in the next row, and a tile's grid is taken as 24
wide; every tile gets the same budget. Here neighbours are those in the tile's grid, none where it
is unknown, tiles share the budget by how many tokens they have, and newlines stay only when all
else does.

Shape suffixes: B batch rows, V visual tokens alive.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from tokenprune.strategy import (
    Need,
    PruningStrategy,
    Published,
    Selection,
    TokenView,
    VisionRows,
    check_fraction,
    register,
)

if TYPE_CHECKING:
    from torch import Tensor

_SIDE = 2**14  # no grid has as many rows or columns


@register("hiprune")
@dataclass(frozen=True)
class HiPrune(PruningStrategy):
    """Keeps what all patches attend to in a middle layer, its neighbours, and in a late one.

    Args:
        layer: Late layer of the vision tower.
        middle: The one whose best are anchors.
        queries: Who asks there: `"all"` patches, or the `"class"` token.
        anchors: Part of the budget that goes to anchors and their four neighbours.
    """

    keeps_exactly: ClassVar[bool] = True

    layer: int = -2
    middle: int = 8
    queries: str = "all"
    anchors: float = 0.1

    def __post_init__(self) -> None:
        check_fraction(
            "HiPrune.anchors", self.anchors, "part of the budget anchors and neighbours get"
        )

    def needs(self) -> tuple[Need, ...]:
        return (VisionRows(self.middle, self.queries), VisionRows(self.layer, self.queries))

    def select(self, view: TokenView, keep: Tensor) -> Selection:
        import torch

        from tokenprune.tensors import rank_in_units, share_out

        middle_BV, late_BV = (
            view.vision_rows(layer, self.queries).mean(1) for layer in (self.middle, self.layer)
        )
        valid_BV = view.valid
        unit_BV, quota_BU = share_out(keep, view.tiles, valid_BV)
        quota_BV = quota_BU.gather(1, unit_BV)
        number_BV = (quota_BV * (self.anchors / 5)).round().long()
        in_tile_BV = valid_BV & (unit_BV < valid_BV.shape[1])
        is_anchor_BV = in_tile_BV & (rank_in_units(middle_BV, unit_BV, valid_BV) < number_BV)
        is_buffer_BV = _beside(is_anchor_BV, view.places, unit_BV, in_tile_BV)
        # No attention is above 1.
        lifted_BV = late_BV + torch.where(is_anchor_BV, 4.0, 2.0 * is_buffer_BV)
        return Selection(kept=(rank_in_units(lifted_BV, unit_BV, valid_BV) < quota_BV) & valid_BV)

    @classmethod
    def published(cls, num_layers: int) -> Published:
        # 192, 128 or 64 of LLaVA-1.5's 576 tokens, with 4, 3 and 1 anchors, before the decoder.
        return Published("one_shot", {"layer": 0, "keep": 0.3333}, positions="renumbered")


def _beside(marked_BV: Tensor, places: Tensor, unit_BV: Tensor, inside_BV: Tensor) -> Tensor:
    """Which tokens are above, below, left or right of a marked one of their tile, bool (B, V)."""
    from tokenprune.tensors import find

    row_BV, column_BV = places[..., 2], places[..., 3]
    inside_BV = inside_BV & (row_BV >= 0) & (column_BV >= 0)
    cell_BV = ((unit_BV + 1) * _SIDE + row_BV) * _SIDE + column_BV
    keys_BV, beside_BV = cell_BV.where(inside_BV, -1), marked_BV & False
    for step in (-_SIDE, -1, 1, _SIDE):
        seat_BV, there_BV = find(keys_BV, (cell_BV + step).where(inside_BV, -2))
        beside_BV = beside_BV | (there_BV & marked_BV.gather(1, seat_BV))
    return beside_BV
