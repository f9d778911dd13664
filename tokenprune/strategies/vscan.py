"""VScan: Zhang et al., 2025, arXiv 2505.22654: the stage before the decoder, and both composed.

Half of a tile's budget is local: in each window of its grid what the class token attends to in a
shallow layer of the tower. The rest is global: of what is left, what it attends to in the last but
one. As in the released code, which runs this in the tower, each tile of an image is chosen from by
itself, and each frame of a video. Every other token joins the kept one of its tile that it is most
like, by what enters the decoder, and they are averaged. Halfway through the decoder PyramidDrop's
choice follows (`tp.published("vscan", ...)` and `strategy=vscan` run both).

As in the released code for LLaVA every window gets the same, rounded down, so fewer tokens than
asked may stay; `exact_budget=True` makes it up globally. `limits="ceil"` is the released rule for
Qwen2.5-VL: a window has at most its share, rounded up, and within that the best of the image stay
(there `queries="all", shallow=7, layer=-1, window=4`, whole-image layers of its tower). Rows and
columns that fill no window belong to the last.

Departures. The released code gives every tile the same budget; here tiles share a row's budget by
how many tokens they have, and newlines stay only when all else does. Where LLaVA-NeXT cuts the
padding off a tile, windows begin where its tokens do. A tile whose grid is unknown has no windows:
its whole budget is global.
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
    check_choice,
    register,
)

if TYPE_CHECKING:
    from torch import Tensor

LIMITS = ("floor", "ceil")
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
        limits: A window's share of the local half, `"floor"` or `"ceil"`: see above.
    """

    keeps_exactly: ClassVar[bool] = False

    shallow: int = 5
    layer: int = -2
    window: int = 6
    queries: str = "class"
    exact_budget: bool = False
    limits: str = "floor"

    def __post_init__(self) -> None:
        check_choice("VScan.limits", self.limits, LIMITS)
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

        from tokenprune.tensors import (
            count_in_unit,
            join_nearest,
            mixture,
            rank_in_units,
            share_out,
        )

        near_BV = view.vision_rows(self.shallow, self.queries).mean(1)  # over heads
        far_BV = view.vision_rows(self.layer, self.queries).mean(1)
        valid_BV, width = view.valid, near_BV.shape[1]
        keep = torch.minimum(keep, valid_BV.sum(1))
        # Of each token its tile's: number, budget, windows, what is kept in windows.
        tile_BV, quota_BU = share_out(keep, view.tiles, valid_BV)
        budget_BV = quota_BU.gather(1, tile_BV)
        window_BV, first_BV = self._windows(view.places, tile_BV)
        number_BV = count_in_unit(first_BV, tile_BV)
        half_BV = torch.where(number_BV > 0, budget_BV // 2, 0)
        number_BV = number_BV.clamp_min(1)
        up_BV = number_BV - 1 if self.limits == "ceil" else 0
        rank_BV = rank_in_units(near_BV, window_BV, valid_BV)
        local_BV = (window_BV < width) & (rank_BV < (half_BV + up_BV) // number_BV)
        if self.limits == "ceil":
            best_BV = near_BV.masked_fill(~local_BV, -1)
            local_BV = local_BV & (rank_in_units(best_BV, tile_BV, valid_BV) < half_BV)
        rest_BV = budget_BV - (count_in_unit(local_BV, tile_BV) if self.exact_budget else half_BV)
        left_BV = valid_BV & ~local_BV
        kept_BV = local_BV | (left_BV & (rank_in_units(far_BV, tile_BV, left_BV) < rest_BV))
        kept_BV = torch.where(budget_BV == count_in_unit(valid_BV, tile_BV), valid_BV, kept_BV)

        unit = torch.nn.functional.normalize(view.projected.float(), dim=-1)
        joins_BV = (tile_BV < width) & ~kept_BV
        fits_BVV = kept_BV[:, None] & (tile_BV[:, :, None] == tile_BV[:, None])
        joins_BV = joins_BV & fits_BVV.any(2)
        alike_BVV = (unit @ unit.mT).masked_fill(~fits_BVV, -torch.inf)
        seat_BV, row_BV = join_nearest(kept_BV, alike_BVV)
        in_BV = (kept_BV | joins_BV).float()
        count_BV = torch.zeros_like(in_BV).scatter_add(1, seat_BV, in_BV)
        share_BV = in_BV / count_BV.gather(1, seat_BV).clamp_min(1)
        return Selection(kept=kept_BV, weights=mixture(row_BV, share_BV, view.max_keep))

    def _windows(self, places: Tensor, tile_BV: Tensor) -> tuple[Tensor, Tensor]:
        """Window of each token, int64 (B, V), V for none; and whether it is its window's first.

        Args:
            places: int64 (B, V, 4), as in the view.
            tile_BV: int64, the tile of each token, V for none.
        """
        import torch

        known_BV = (tile_BV < tile_BV.shape[1]) & (places[..., 2] >= 0)
        parts = []
        for place_BV in places[..., 2:].unbind(-1):  # rows, columns
            ends_BU = torch.nn.functional.pad(place_BV, (0, 1))
            first_BV, last_BV = (
                ends_BU.scatter_reduce(1, tile_BV, place_BV, how, include_self=False).gather(
                    1, tile_BV
                )
                for how in ("amin", "amax")
            )
            full_BV = ((last_BV - first_BV + 1) // self.window - 1).clamp_min(0)
            parts.append(torch.minimum((place_BV - first_BV) // self.window, full_BV))
        key_BV = (tile_BV * _SIDE + parts[0]) * _SIDE + parts[1]
        key_BV = key_BV.masked_fill(~known_BV, -1)
        sorted_BV, order_BV = key_BV.sort(dim=1, stable=True)
        new_BV = torch.ones_like(known_BV)
        new_BV[:, 1:] = sorted_BV[:, 1:] != sorted_BV[:, :-1]
        new_BV = new_BV & (sorted_BV >= 0)
        number_BV = torch.zeros_like(key_BV).scatter(1, order_BV, new_BV.long().cumsum(1) - 1)
        first_BV = torch.zeros_like(new_BV).scatter(1, order_BV, new_BV)
        return number_BV.masked_fill(~known_BV, key_BV.shape[1]), first_BV

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
