"""HoloV: Zou et al., 2025, arXiv 2510.02912 (NeurIPS 2025), as released.

The budget of a tile is spread over 16 stretches of its tokens, in the image's order, by how much
CLIP's class token attends to each on average in the last layer but one; within a stretch what it
attends to most stays. A share is rounded down, and what is left over goes to the stretches with
the largest, one token each. A stretch that gets more than it has loses the surplus, so that fewer
tokens may stay than asked (`exact_budget=True`: the best of the tile make it up).

The released score of a stretch adds .09 times the variance of its tokens' likeness, after scaling
it so that its mean over the stretch is that of the attention: the sum's mean is 1.09 times the
mean attention, and no share depends on likeness. It is left out. Departures: the released code
fills up with zeros what a surplus has lost; it takes all of an image, tiles and all, as one pool,
without newlines. Here tiles share the budget by how many tokens they have, and newlines stay only
when all else does. Towers without a class token take `queries="all"`, which is not the paper's.

Shape suffixes: B batch rows, V visual tokens alive, U tiles, P stretches, C stretches of a row.
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
    register,
)

if TYPE_CHECKING:
    from torch import Tensor


@register("holov")
@dataclass(frozen=True)
class HoloV(PruningStrategy):
    """Keeps what the class token attends to, more in stretches that it attends to more.

    Args:
        layer: Layer of the vision tower.
        queries: Who asks there: `"class"`, or `"all"` for towers without a class token.
        parts: Stretches of a tile.
        exact_budget: Whether what a stretch cannot use is kept elsewhere.
    """

    keeps_exactly: ClassVar[bool] = False

    layer: int = -2
    queries: str = "class"
    parts: int = 16
    exact_budget: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.parts, bool) or not isinstance(self.parts, int) or self.parts < 1:
            raise ValueError(
                f"HoloV.parts: expected an integer >= 1, got {self.parts!r}. The paper has 16."
            )
        object.__setattr__(self, "keeps_exactly", self.exact_budget)

    def needs(self) -> tuple[Need, ...]:
        return (VisionRows(self.layer, self.queries),)

    def select(self, view: TokenView, keep: Tensor) -> Selection:
        import torch

        from tokenprune.tensors import rank_in_units, share_out, sizes_of_units

        attention_BV = (
            view.vision_rows(self.layer, self.queries).mean(1).nan_to_num(0)
        )  # over heads
        valid_BV, parts = view.valid, self.parts
        last = valid_BV.shape[1]
        unit_BV, quota_BU = share_out(keep, view.tiles, valid_BV)
        sizes_BU = sizes_of_units(unit_BV)
        size_BV, quota_BV = sizes_BU.gather(1, unit_BV), quota_BU.gather(1, unit_BV)
        # Of n tokens the first n mod 16 stretches have one more than the others.
        order_BV = rank_in_units(attention_BV * 0, unit_BV, valid_BV)
        longer_BV, short_BV = size_BV % parts, size_BV // parts
        ahead_BV = longer_BV * (short_BV + 1)
        after_BV = longer_BV + (order_BV - ahead_BV) // short_BV.clamp_min(1)
        number_BV = torch.where(order_BV < ahead_BV, order_BV // (short_BV + 1), after_BV)
        # What each gets.
        most, _ = view.tile_shape
        inside_BV = valid_BV & (unit_BV < last)
        cell_BV = (unit_BV * parts + number_BV).where(inside_BV, most * parts)
        # In double precision: a GPU adds in any order.
        none_BC = attention_BV.new_zeros(len(keep), most * parts + 1).double()
        count_BC = none_BC.scatter_add(1, cell_BV, inside_BV.double())
        mean_BC = none_BC.scatter_add(1, cell_BV, attention_BV.double()) / count_BC.clamp_min(1)
        count_BUP, mean_BUP = (
            values[:, :-1].reshape(len(keep), most, parts) for values in (count_BC, mean_BC)
        )
        gets_BUP = _spread(quota_BU[:, :most], mean_BUP, count_BUP > 0)
        gets_BV = torch.nn.functional.pad(gets_BUP.flatten(1), (0, 1)).gather(1, cell_BV)
        # The best of each stretch, which are numbered on from tile to tile.
        start_BV = (sizes_BU.cumsum(1) - sizes_BU).gather(1, unit_BV)
        part_BV = (start_BV + number_BV).where(inside_BV, last)
        is_best_BV = inside_BV & (rank_in_units(attention_BV, part_BV, valid_BV) < gets_BV)
        rank_BV = rank_in_units(attention_BV + 2.0 * is_best_BV, unit_BV, valid_BV)
        kept_BV = (rank_BV < quota_BV) & valid_BV
        if not self.exact_budget:
            kept_BV = kept_BV & (is_best_BV | (quota_BV >= size_BV) | ~inside_BV)
        return Selection(kept=kept_BV)

    @classmethod
    def published(cls, num_layers: int) -> Published:
        # 64 of LLaVA-1.5's 576 tokens are written into the released code.
        return Published("one_shot", {"layer": 0, "keep": 0.1111}, positions="renumbered")


def _spread(quota_BU: Tensor, mean_BUP: Tensor, exists_BUP: Tensor) -> Tensor:
    """Tokens that each stretch gets of its tile's budget, int64 (B, U, P)."""
    share_BUP = mean_BUP / mean_BUP.sum(2, keepdim=True).clamp_min(1e-9)
    gets_BUP = (share_BUP * quota_BU[..., None]).floor().long()
    left_BU1 = (quota_BU - gets_BUP.sum(2))[..., None]
    order_BUP = mean_BUP.masked_fill(~exists_BUP, -1).argsort(dim=2, descending=True, stable=True)
    return gets_BUP + ((order_BUP.argsort(dim=2) < left_BU1) & exists_BUP)
