"""VisPruner: Zhang et al., 2025, arXiv 2412.01818v2 (ICCV 2025), §3.

Half of a tile's budget goes to what CLIP's class token attends to in the last but one layer. The
others, sorted by that attention, are thinned out in rounds: at even places up to eight that are the
most like something at an odd place are dropped, until the other half of the budget is left. As in
the released code, a round leaves the even places in the order of their likeness, ahead of the odd
ones, and the next round counts places so. Departures: the released code fails on odd numbers of
tokens, gives every tile the same budget, and LLaVA-NeXT no unpadding and no newlines; here tiles
share the budget by how many tokens they have, and newlines stay only when all else does.

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
        if not 0 <= self.important <= 1:
            raise ValueError(
                f"VisPruner.important: expected a fraction in [0, 1], got {self.important!r}. "
                "Say which part of the budget attention gives."
            )

    def needs(self) -> tuple[Need, ...]:
        return (VisionRows(self.layer, self.queries), VisionStates(self.layer))

    def select(self, view: TokenView, keep: Tensor) -> Selection:
        import torch

        from tokenprune.tensors import share_out, top_of_units

        attention_BV = view.vision_rows(self.layer, self.queries).mean(1)  # over heads
        states = torch.nn.functional.normalize(view.vision_states(self.layer), dim=-1)
        unit_BV, quota_BU = share_out(keep, view.tiles, view.valid)
        first_BU = (quota_BU * self.important).long()
        first_BU[:, -1] = quota_BU[:, -1]
        kept_BV, order_BV = top_of_units(attention_BV, unit_BV, view.valid, first_BU)
        # One transfer: how many rounds there are depends on it.
        sizes_BU = torch.zeros_like(quota_BU).scatter_add(1, unit_BV, torch.ones_like(unit_BV))
        sizes, firsts, quotas = torch.stack([sizes_BU, first_BU, quota_BU]).tolist()
        rows, tokens, targets = [], [], []
        for row, own in enumerate(sizes):
            start = 0
            for size, first, quota in zip(own[:-1], firsts[row], quotas[row], strict=False):
                if quota > first:
                    rows.append(row)
                    tokens.append(order_BV[row, start + first : start + size])
                    targets.append(quota - first)
                start += size
        if not rows:
            return Selection(kept=kept_BV)
        index_UL = torch.nn.utils.rnn.pad_sequence(tokens, batch_first=True)
        row_U1 = torch.tensor(rows, device=keep.device)[:, None]
        own = states[row_U1, index_UL]  # (U, L, C)
        left = _thin(own @ own.transpose(1, 2), [len(part) for part in tokens], targets)
        found = left.nonzero(as_tuple=True)
        kept_BV = kept_BV.index_put(
            (row_U1.expand_as(index_UL)[found], index_UL[found]),
            torch.ones((), dtype=torch.bool, device=keep.device),
        )
        return Selection(kept=kept_BV)

    @classmethod
    def published(cls, num_layers: int) -> Published:
        # Of LLaVA-1.5's 576 tokens the paper keeps 128, 64 or 32, before the decoder.
        return Published("one_shot", {"layer": 0, "keep": 0.2222}, positions="renumbered")


def _thin(alike_ULL: Tensor, counts: list[int], targets: list[int]) -> Tensor:
    """Which tokens are left of each tile, bool (U, L).

    Args:
        alike_ULL: Likeness of any two.
        counts: How many of the L tokens each tile has.
        targets: How many are to be left.
    """
    import torch

    num_tiles, length, _ = alike_ULL.shape
    device = alike_ULL.device
    place_L = torch.arange(length, device=device)
    tile_U1 = torch.arange(num_tiles, device=device)[:, None]
    order_UL = place_L.expand(num_tiles, -1)
    count_U1 = torch.tensor(counts, device=device)[:, None]
    target_U1 = torch.tensor(targets, device=device)[:, None]
    for _ in range(max(map(_num_rounds, counts, targets))):
        even, odd = order_UL[:, ::2], order_UL[:, 1::2]
        num_even, num_odd = (count_U1 + 1) // 2, count_U1 // 2
        drop_U1 = (count_U1 - target_U1).clamp(0, _ROUND).minimum(num_even)
        alike = alike_ULL[tile_U1[..., None], even[..., None], odd[:, None]]  # (U, E, O)
        alike = alike.masked_fill((place_L[: odd.shape[1]] >= num_odd)[:, None], -torch.inf)
        nearest = torch.nn.functional.pad(alike, (0, 1), value=-torch.inf).amax(2)
        nearest = nearest.masked_fill(place_L[: even.shape[1]] >= num_even, -torch.inf)
        even = even.gather(1, nearest.argsort(dim=1, descending=True, stable=True))
        # The most alike fall away at the front.
        seat_even = place_L[: even.shape[1]] - drop_U1
        stays = (seat_even >= 0) & (place_L[: even.shape[1]] < num_even)
        seat_odd = place_L[: odd.shape[1]] + num_even - drop_U1
        seats = torch.cat(
            [
                seat_even.where(stays, length),
                seat_odd.where(place_L[: odd.shape[1]] < num_odd, length),
            ],
            1,
        )
        table = order_UL.new_zeros(num_tiles, length + 1)
        order_UL = table.scatter(1, seats, torch.cat([even, odd], 1))[:, :length]
        count_U1 = count_U1 - drop_U1
    left = torch.zeros(num_tiles, length + 1, dtype=torch.bool, device=device)
    return left.scatter(1, order_UL.where(place_L < count_U1, length), True)[:, :length]


def _num_rounds(count: int, target: int) -> int:
    """Rounds until a tile of `count` tokens has `target`."""
    rounds = 0
    while count > target:
        count -= min(_ROUND, count - target, (count + 1) // 2)
        rounds += 1
    return rounds
