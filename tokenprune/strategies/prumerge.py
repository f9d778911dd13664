"""PruMerge: Shang et al., 2024, arXiv 2403.15388 (LLaVA-PruMerge).

Attention of CLIP's last layer, all channels as one head, ranks the patches of each tile. The first
survivors each get the sum of their nearest others, by keys, weighted by that attention; a last one
stands for all that are dropped. `spread` is the part of the budget that goes to tokens at even
distances: a half makes it PruMerge+. Departures: the paper's number of survivors is that of the
outliers among the scores (5.5 % on average, 25 % for PruMerge+), here the schedule's; survivors
stand in the image's order, not in that of their scores, and the last in the seat of the best that
is dropped; LLaVA-NeXT's newlines stay only when all else does. As released, what the projector is
given is mixed; `space="decoder"` mixes what it gives, at any cut and with any projector.

Shape suffixes: B batch rows, V visual tokens alive, K survivors.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

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


@register("prumerge")
@dataclass(frozen=True)
class PruMerge(PruningStrategy):
    """Keeps what the class token attends to, mixed with what is like it, and a sum of the rest."""

    keeps_exactly: ClassVar[bool] = True

    layer: int = -1
    neighbours: int = 32
    spread: float = 0.0
    space: str = "vision"

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

    def needs(self) -> tuple[Need, ...]:
        tower = (VisionRows(self.layer, "class", "one"), VisionStates(self.layer, "keys"))
        return (*tower, BeforeProjector()) if self.space == "vision" else tower

    def select(self, view: TokenView, keep: Tensor) -> Selection:
        import torch

        from tokenprune.tensors import ascending, share_out, sizes_of_units, take

        attention_BV = view.vision_rows(self.layer, "class", "one")[:, 0]
        keys = torch.nn.functional.normalize(view.vision_states(self.layer, "keys"), dim=-1)
        valid_BV, width = view.valid, keys.shape[1]
        unit_BV, quota_BU = share_out(keep, view.tiles, valid_BV)
        size_BV = sizes_of_units(unit_BV).gather(1, unit_BV)
        quota_BV = quota_BU.gather(1, unit_BV)
        # Tiles that lose nothing, and newlines, stay as they are.
        whole_BV = (quota_BV >= size_BV) | (unit_BV == width)
        rank_BV = self._rank(attention_BV, unit_BV, valid_BV, quota_BV)
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

    def _rank(
        self, attention_BV: Tensor, unit_BV: Tensor, valid_BV: Tensor, quota_BV: Tensor
    ) -> Tensor:
        """Places of tokens in their tile: first by attention, then those at even distances."""
        import torch

        from tokenprune.tensors import rank_in_units, sizes_of_units

        rank_BV = rank_in_units(attention_BV, unit_BV, valid_BV)
        if self.spread == 0:
            return rank_BV
        even_BV = ((quota_BV - 1).clamp_min(0) * self.spread).long()
        first_BV = (quota_BV - 1).clamp_min(0) - even_BV
        # Of the others of a tile, in the image's order, those at which an even stride steps on.
        other_BV = (rank_BV >= first_BV) & valid_BV
        count_BV = (sizes_of_units(unit_BV).gather(1, unit_BV) - first_BV).clamp_min(1)
        order_BV = rank_in_units(other_BV.float() * 0, unit_BV, other_BV)
        steps_BV = ((order_BV + 1) * even_BV + count_BV // 2) // count_BV
        chosen_BV = other_BV & (steps_BV > (order_BV * even_BV + count_BV // 2) // count_BV)
        # By attention, with what was chosen lifted above all others but the first.
        lifted_BV = attention_BV + torch.where(rank_BV < first_BV, 4.0, 2.0 * chosen_BV)
        return rank_in_units(lifted_BV, unit_BV, valid_BV)

    @classmethod
    def published(cls, num_layers: int) -> Published:
        # The paper's average of 32 tokens of LLaVA-1.5's 576, before the decoder.
        return Published("one_shot", {"layer": 0, "keep": 0.0556}, positions="renumbered")
