"""VScan: Zhang et al., 2025, arXiv 2505.22654: the stage before the decoder, and both composed.

Half of the budget is local: in each window of the image's grid what the class token attends to in a
shallow layer of the tower. The rest is global: of what is left, what it attends to in the last but
one. Every other token joins the kept one of its tile that it is most like, by what enters the
decoder, and they are averaged. Halfway through the decoder PyramidDrop's choice follows
(`tp.published("vscan", ...)` and `strategy=vscan` run both).

Departures. As in the released code every window gets the same, rounded down, so fewer tokens than
asked may stay; `exact_budget=True` makes it up globally. Tokens without a place in a grid belong to
no window. Tiles of an image are one pool; tokens join within their tile.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from tokenprune.strategy import (
    Need,
    Projected,
    PruningStrategy,
    Published,
    Selection,
    TokenView,
    VisionRows,
    register,
)

if TYPE_CHECKING:
    from torch import Tensor

_SIDE = 2**14  # no grid has as many rows or columns


@register("vscan")
@dataclass(frozen=True)
class VScan(PruningStrategy):
    """Keeps what the class token attends to, near and far, and averages the rest into it.

    Args:
        shallow: Layer of the vision tower that is asked in each window.
        layer: The one that is asked about the whole image.
        window: Rows and columns of a window.
        queries: Who asks: `"class"`, or `"all"` for towers without a class token.
        exact_budget: Whether what equal windows leave over is kept as well.
    """

    keeps_exactly: ClassVar[bool] = False

    shallow: int = 5
    layer: int = -2
    window: int = 6
    queries: str = "class"
    exact_budget: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.window, bool) or not isinstance(self.window, int) or self.window < 1:
            raise ValueError(
                f"VScan.window: expected an integer >= 1, got {self.window!r}. The paper has 6."
            )
        object.__setattr__(self, "keeps_exactly", self.exact_budget)

    def needs(self) -> tuple[Need, ...]:
        shallow, deep = (VisionRows(layer, self.queries) for layer in (self.shallow, self.layer))
        return (shallow, deep, Projected())

    def select(self, view: TokenView, keep: Tensor) -> Selection:
        import torch

        from tokenprune.tensors import join_nearest, mixture, rank_in_units, top_k

        near_BV = view.vision_rows(self.shallow, self.queries).mean(1)  # over heads
        far_BV = view.vision_rows(self.layer, self.queries).mean(1)
        valid_BV, width = view.valid, near_BV.shape[1]
        keep = torch.minimum(keep, valid_BV.sum(1))
        window_BV, number_B = self._windows(view.places, valid_BV & view.has_patches)
        local_B = keep // 2
        share_B1 = (local_B // number_B.clamp_min(1))[:, None]
        rank_BV = rank_in_units(near_BV, window_BV, valid_BV)
        local_BV = valid_BV & (window_BV < width) & (rank_BV < share_B1)
        rest_B = keep - (local_BV.sum(1) if self.exact_budget else local_B)
        low = far_BV.masked_fill(~view.has_patches, -1)  # newlines stay only when all else does
        kept_BV = local_BV | top_k(low, valid_BV & ~local_BV, rest_B)
        kept_BV = torch.where((keep == valid_BV.sum(1))[:, None], valid_BV, kept_BV)

        unit = torch.nn.functional.normalize(view.projected.float(), dim=-1)
        tile_BV, joins_BV = view.tiles, valid_BV & view.has_patches & ~kept_BV
        fits_BVV = kept_BV[:, None] & (tile_BV[:, :, None] == tile_BV[:, None])
        joins_BV = joins_BV & fits_BVV.any(2)
        alike_BVV = (unit @ unit.mT).masked_fill(~fits_BVV, -torch.inf)
        seat_BV, row_BV = join_nearest(kept_BV, alike_BVV)
        in_BV = (kept_BV | joins_BV).float()
        count_BV = torch.zeros_like(in_BV).scatter_add(1, seat_BV, in_BV)
        share_BV = in_BV / count_BV.gather(1, seat_BV).clamp_min(1)
        return Selection(kept=kept_BV, weights=mixture(row_BV, share_BV, view.max_keep))

    def _windows(self, places: Tensor, has_place_BV: Tensor) -> tuple[Tensor, Tensor]:
        """Window of each token, int64 (B, V), V for none; and how many windows each row has."""
        import torch

        image_BV, grid_BV, row_BV, column_BV = places.unbind(-1)
        known_BV = has_place_BV & (row_BV >= 0)
        across = row_BV // self.window * _SIDE + column_BV // self.window
        # A grid of an image is at most a base and a mosaic.
        key_BV = ((image_BV * 2 + grid_BV) * _SIDE * _SIDE + across).masked_fill(~known_BV, -1)
        sorted_BV, order_BV = key_BV.sort(dim=1, stable=True)
        new_BV = torch.ones_like(known_BV)
        new_BV[:, 1:] = sorted_BV[:, 1:] != sorted_BV[:, :-1]
        new_BV = new_BV & (sorted_BV >= 0)
        number_BV = torch.zeros_like(key_BV).scatter(1, order_BV, new_BV.long().cumsum(1) - 1)
        return number_BV.masked_fill(~known_BV, key_BV.shape[1]), new_BV.sum(1)

    @classmethod
    def published(cls, num_layers: int) -> Published:
        # An average of 192 of LLaVA-1.5's 576 tokens; of 128: 192 and 64, of 64: 96 and 32.
        options = {"stages": ((0, 0.5), (16, 0.1667)), "of_layers": 32, "rounding": "nearest"}
        return Published(
            "explicit",
            {**options, "num_layers": num_layers},
            positions="renumbered",
            strategies=(("vscan", {}), ("pyramiddrop", {})),
        )
