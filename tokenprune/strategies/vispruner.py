"""VisPruner: Zhang et al., 2025, arXiv 2412.01818v2 (ICCV 2025), §3.

Half of a tile's budget goes to what CLIP's class token attends to in the last but one layer. The
others, sorted by that attention, are thinned out in rounds: at even places up to eight that are the
most like something at an odd place are dropped, until the other half of the budget is left. As in
the released code, a round leaves the even places in the order of their likeness, ahead of the odd
ones, and the next round counts places so. Departures: the released code fails on odd numbers of
tokens, gives every tile the same budget, and LLaVA-NeXT no unpadding and no newlines; here tiles
share the budget by how many tokens they have, and newlines stay only when all else does. Towers
without a class token take `queries="all"` (which layer: see `fastervlm`); of a token of several
patches, likeness is by their mean.

Shape suffixes: B batch rows, V visual tokens alive, U tiles, L tokens of one that are thinned out.
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
    VisionStates,
    check_fraction,
    register,
)

if TYPE_CHECKING:
    from torch import Tensor

_ROUND = 8


@register("vispruner")
@dataclass(frozen=True)
class VisPruner(PruningStrategy):
    """Keeps what the class token attends to, and of the rest what is least like the others."""

    keeps_exactly: ClassVar[bool] = True

    layer: int = -2
    queries: str = "class"
    important: float = 0.5

    def __post_init__(self) -> None:
        check_fraction("VisPruner.important", self.important, "part of the budget attention gives")

    def needs(self) -> tuple[Need, ...]:
        return (VisionRows(self.layer, self.queries), VisionStates(self.layer))

    def select(self, view: TokenView, keep: Tensor) -> Selection:
        import torch

        from tokenprune.strategies._tiles import lay_out
        from tokenprune.tensors import rank_in_units, share_out

        attention_BV = view.vision_rows(self.layer, self.queries).mean(1)  # over heads
        states = torch.nn.functional.normalize(view.vision_states(self.layer), dim=-1)
        unit_BV, quota_BU = share_out(keep, view.tiles, view.valid)
        first_BU = (quota_BU * self.important).long()
        first_BU[:, -1] = quota_BU[:, -1]
        first_BV = first_BU.gather(1, unit_BV)
        rank_BV = rank_in_units(attention_BV, unit_BV, view.valid)
        most, _ = view.tile_shape
        # The others of each tile, from the most to the least attended.
        is_rest = (rank_BV >= first_BV) & (unit_BV < most) & view.valid
        tiles = lay_out(view, unit_BV, rank_BV - first_BV, is_rest)
        rest_ULC = tiles.of(states)
        target_BU = (quota_BU - first_BU)[:, :most]
        left_UL = _thin(
            rest_ULC @ rest_ULC.transpose(1, 2), tiles.exists.sum(1), target_BU.reshape(-1)
        )
        kept_BV = (rank_BV < first_BV) | tiles.back(left_UL)
        return Selection(kept=kept_BV & view.valid)

    @classmethod
    def published(cls, num_layers: int) -> Published:
        # Of LLaVA-1.5's 576 tokens the paper keeps 128, 64 or 32, before the decoder.
        return Published("one_shot", {"layer": 0, "keep": 0.2222}, positions="renumbered")


def _thin(alike_ULL: Tensor, count_U: Tensor, target_U: Tensor) -> Tensor:
    """Which tokens are left of each tile, bool (U, L).

    Args:
        alike_ULL: Likeness of any two.
        count_U: int64, how many of the L tokens each tile has.
        target_U: int64, how many are to be left.
    """
    import torch

    num_tiles, length, _ = alike_ULL.shape
    place_L = torch.arange(length, device=alike_ULL.device)
    tile_U11 = torch.arange(num_tiles, device=alike_ULL.device)[:, None, None]
    count_U1, target_U1 = count_U[:, None], target_U[:, None]
    order_UL = place_L.expand(num_tiles, -1)
    for _ in range(_most_rounds(length)):
        even, odd = order_UL[:, ::2], order_UL[:, 1::2]
        is_even = place_L[: even.shape[1]] < (count_U1 + 1) // 2
        is_odd = place_L[: odd.shape[1]] < count_U1 // 2
        num_even = (count_U1 + 1) // 2
        drop_U1 = (count_U1 - target_U1).clamp(0, _ROUND).minimum(num_even)
        alike = alike_ULL[tile_U11, even[..., None], odd[:, None]]  # (U, E, O)
        alike = alike.masked_fill(~is_odd[:, None], -torch.inf)
        nearest = torch.nn.functional.pad(alike, (0, 1), value=-torch.inf).amax(2)
        nearest = nearest.masked_fill(~is_even, -torch.inf)
        even = even.gather(1, nearest.argsort(dim=1, descending=True, stable=True))
        # The most alike fall away at the front; what does not stay goes to a seat beyond the last.
        seat_even = place_L[: even.shape[1]] - drop_U1
        seat_even = seat_even.where((seat_even >= 0) & is_even, length)
        seat_odd = (place_L[: odd.shape[1]] + num_even - drop_U1).where(is_odd, length)
        table = order_UL.new_zeros(num_tiles, length + 1)
        table = table.scatter(1, torch.cat([seat_even, seat_odd], 1), torch.cat([even, odd], 1))
        order_UL, count_U1 = table[:, :length], count_U1 - drop_U1
    left = torch.zeros(num_tiles, length + 1, dtype=torch.bool, device=alike_ULL.device)
    return left.scatter(1, order_UL.where(place_L < count_U1, length), True)[:, :length]


def _most_rounds(count: int) -> int:
    """Rounds until nothing is left of a tile: how many there are must not depend on its values."""
    rounds = 0
    while count > 0:
        count -= min(_ROUND, (count + 1) // 2)
        rounds += 1
    return rounds
