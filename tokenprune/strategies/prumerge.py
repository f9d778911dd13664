"""PruMerge: Shang et al., 2024, arXiv 2403.15388 (LLaVA-PruMerge).

Attention of CLIP's last layer, all channels as one head, ranks the patches of each tile. The first
survivors each get the sum of their nearest others, by keys, weighted by that attention; a last one
stands for all that are dropped. As released, how many survive follows the image: as many as there
are outliers among the scores, more than 1.5 times their middle half's width above it, a quarter at
most (5.5 % on average), and with `spread` those at even distances besides, about three for each
outlier (PruMerge+, 25 % on average). The schedule is then an upper bound, and a cut that may keep
all tokens keeps them. `count="schedule"` keeps as many as the schedule says, of which `spread` is
the part at even distances.

Departures: outliers are counted in a row, its images together, where the released code takes a
batch; where there are none, a stride is as long as the tile; parts are whole numbers divided;
survivors stand in the image's order, not in that of their scores, and the last in the seat of the
best that is dropped; LLaVA-NeXT's newlines stay only when all else does. As released, what the
projector is given is mixed; `space="decoder"` mixes what it gives, at any cut and with any
projector.

Shape suffixes: B batch rows, V visual tokens alive, U tiles, K survivors.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, NamedTuple

from tokenprune.strategy import (
    SPACES,
    BeforeProjector,
    Need,
    PruningStrategy,
    Published,
    Selection,
    TokenView,
    VisionRows,
    VisionStates,
    check_choice,
    check_fraction,
    register,
)

if TYPE_CHECKING:
    from torch import Tensor


COUNTS = ("outliers", "schedule")


class _Split(NamedTuple):
    """How the survivors of a tile are chosen.

    Attributes:
        quota: int64 (B, V), how many each token's tile keeps, the one that stands for the rest too.
        first: int64 (B, V), how many of them have the highest scores.
        even: Bool (B, V), which of the others stand at even distances.
    """

    quota: Tensor
    first: Tensor
    even: Tensor


@register("prumerge")
@dataclass(frozen=True)
class PruMerge(PruningStrategy):
    """Keeps what the class token attends to, mixed with what is like it, and a sum of the rest.

    Args:
        layer: Layer of the vision tower.
        neighbours: How many tokens each survivor is mixed from.
        spread: Part of the budget that goes to tokens at even distances; with outliers counted,
            whether there are any.
        space: Where survivors are mixed, before the projector (`"vision"`) or in the `"decoder"`.
        count: Who says how many survive, the image's `"outliers"` or the `"schedule"`.
    """

    keeps_exactly: ClassVar[bool] = False

    layer: int = -1
    neighbours: int = 32
    spread: float = 0.0
    space: str = "vision"
    count: str = "outliers"

    def __post_init__(self) -> None:
        if self.neighbours < 0:
            raise ValueError(
                f"PruMerge.neighbours: expected a number of tokens, got {self.neighbours!r}. "
                "Say how many each survivor is mixed from."
            )
        check_fraction(
            "PruMerge.spread", self.spread, "part of the budget goes to tokens at even distances"
        )

        check_choice("PruMerge.space", self.space, SPACES)
        check_choice("PruMerge.count", self.count, COUNTS)
        object.__setattr__(self, "keeps_exactly", self.count == "schedule")

    def needs(self) -> tuple[Need, ...]:
        tower = (VisionRows(self.layer, "class", "one"), VisionStates(self.layer, "keys"))
        return (*tower, BeforeProjector()) if self.space == "vision" else tower

    def select(self, view: TokenView, keep: Tensor) -> Selection:
        import torch

        from tokenprune.tensors import ascending, rank_in_units, share_out, sizes_of_units, take

        attention_BV = view.vision_rows(self.layer, "class", "one")[:, 0]
        keys = torch.nn.functional.normalize(view.vision_states(self.layer, "keys"), dim=-1)
        valid_BV, width = view.valid, keys.shape[1]
        unit_BV, quota_BU = share_out(keep, view.tiles, valid_BV)
        size_BV = sizes_of_units(unit_BV).gather(1, unit_BV)
        rank_BV = rank_in_units(attention_BV, unit_BV, valid_BV)
        split = self._by_schedule(rank_BV, unit_BV, valid_BV, quota_BU.gather(1, unit_BV))
        if self.count == "outliers":
            split = self._by_outliers(view, keep, rank_BV, unit_BV, split)
        quota_BV, first_BV, even_BV = split
        # Tiles that lose nothing, and newlines, stay as they are.
        whole_BV = (quota_BV >= size_BV) | (unit_BV == width)
        if self.spread > 0:  # what was chosen is lifted above all others but the first
            lifted_BV = attention_BV + torch.where(rank_BV < first_BV, 4.0, 2.0 * even_BV)
            rank_BV = rank_in_units(lifted_BV, unit_BV, valid_BV)
        kept_BV = (rank_BV < quota_BV) & valid_BV
        rest_BV = (rank_BV >= quota_BV - 1) & ~whole_BV & valid_BV
        index_BK = ascending(kept_BV, view.max_keep)
        same_BKV = unit_BV.gather(1, index_BK)[..., None] == unit_BV[:, None]
        same_BKV = same_BKV & valid_BV[:, None]
        itself_BKV = index_BK[..., None] == torch.arange(width, device=keep.device)
        alike = take(keys, index_BK) @ keys.transpose(1, 2)
        alike = alike.masked_fill(~same_BKV | itself_BKV, -torch.inf)
        nearest = alike.argsort(dim=2, descending=True, stable=True)[..., : self.neighbours]
        near_BKV = torch.zeros_like(same_BKV).scatter(2, nearest, True) & same_BKV & ~itself_BKV
        near_BKV = near_BKV & ~whole_BV.gather(1, index_BK)[..., None]
        stands_BK1 = rest_BV.gather(1, index_BK)[..., None]
        mixed_BKV = torch.where(stands_BK1, rest_BV[:, None] & same_BKV, near_BKV)
        weights = attention_BV[:, None] * mixed_BKV + (itself_BKV & ~stands_BK1)
        return Selection(kept=kept_BV, weights=weights, space=self.space)

    def _by_schedule(
        self, rank_BV: Tensor, unit_BV: Tensor, valid_BV: Tensor, quota_BV: Tensor
    ) -> _Split:
        """Of each tile's budget, less one, a part comes first and a part is at even distances."""
        import torch

        from tokenprune.tensors import rank_in_units, sizes_of_units

        even_BV = ((quota_BV - 1).clamp_min(0) * self.spread).long()
        first_BV = (quota_BV - 1).clamp_min(0) - even_BV
        if self.spread == 0:
            return _Split(quota_BV, first_BV, torch.zeros_like(valid_BV))
        # Of the others of a tile, in the image's order, those at which an even stride steps on.
        other_BV = (rank_BV >= first_BV) & valid_BV
        count_BV = (sizes_of_units(unit_BV).gather(1, unit_BV) - first_BV).clamp_min(1)
        order_BV = rank_in_units(other_BV.float() * 0, unit_BV, other_BV)
        steps_BV = ((order_BV + 1) * even_BV + count_BV // 2) // count_BV
        before_BV = (order_BV * even_BV + count_BV // 2) // count_BV
        return _Split(quota_BV, first_BV, other_BV & (steps_BV > before_BV))

    def _by_outliers(
        self, view: TokenView, keep: Tensor, rank_BV: Tensor, unit_BV: Tensor, most: _Split
    ) -> _Split:
        """As many as there are outliers among a row's scores; at most what the schedule says."""
        import torch

        from tokenprune.tensors import count_in_unit, rank_in_units, sizes_of_units

        attention_BV = view.vision_rows(self.layer, "class", "one")[:, 0]
        has_BV = (view.tiles >= 0) & view.valid
        number_B1 = has_BV.sum(1, keepdim=True)
        sorted_BV = attention_BV.masked_fill(~has_BV, torch.inf).sort(1).values
        low_B1, high_B1 = (_quantile(sorted_BV, number_B1, part) for part in (0.25, 0.75))
        far_BV = has_BV & (attention_BV > high_B1 + 1.5 * (high_B1 - low_B1))
        outliers_B1 = far_BV.sum(1, keepdim=True)
        size_BV = sizes_of_units(unit_BV).gather(1, unit_BV)
        few_BV = size_BV * outliers_B1 // number_B1.clamp_min(1)
        even_BV = torch.zeros_like(has_BV)
        if self.spread > 0:
            stride_BV = torch.where(
                outliers_B1 > 0, number_B1 // outliers_B1.clamp_min(1) // 3, size_BV
            ).clamp_min(1)
            order_BV = rank_in_units(has_BV.float() * 0, unit_BV, has_BV)
            even_BV = has_BV & (rank_BV >= few_BV) & (order_BV < size_BV - 1)
            even_BV &= order_BV % stride_BV == 0
        quota_BV = few_BV + count_in_unit(even_BV, unit_BV) + 1
        quota_BV = quota_BV.masked_fill(~has_BV, 0)  # newlines
        # What the schedule does not allow is done by its rule; what may keep all keeps all.
        bound_BV = (keep >= view.num_original)[:, None] | (quota_BV > most.quota)
        found = _Split(quota_BV, few_BV, even_BV)
        return _Split(*(torch.where(bound_BV, *pair) for pair in zip(most, found, strict=True)))

    @classmethod
    def published(cls, num_layers: int) -> Published:
        # Before the decoder: outliers are a quarter of LLaVA-1.5's 576 tokens at most, and one.
        return Published("one_shot", {"layer": 0, "keep": 0.2518}, positions="renumbered")


def _quantile(sorted_BV: Tensor, number_B1: Tensor, part: float) -> Tensor:
    """The quantile of each row's first numbers, (B, 1), linear between two."""
    place_B1 = part * (number_B1 - 1).clamp_min(0).to(sorted_BV.dtype)
    below_B1 = place_B1.long()
    above_B1 = (below_B1 + 1).clamp_max(sorted_BV.shape[1] - 1)
    low_B1, high_B1 = sorted_BV.gather(1, below_B1), sorted_BV.gather(1, above_B1)
    # Above the last there is nothing, of which nothing is taken.
    share_B1 = (place_B1 - below_B1).masked_fill(number_B1 <= 1, 0)
    return low_B1.lerp(high_B1.where(share_B1 > 0, low_B1), share_B1)
