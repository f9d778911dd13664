"""VisionZip: Yang et al., 2024, arXiv 2412.04467 (CVPR 2025).

Dominant tokens are what CLIP's class token attends to in the last but one layer. Of the other
tokens of a tile, targets stand at even distances; each token that is left goes to the target whose
key is most like its own, mean over heads, and a target becomes the sum of itself and the mean of
what came to it. Departures: the released code keeps the class token as well, for which a patch more
is dominant here; targets follow the dominant tokens there, here all stand in the image's order;
tiles of LLaVA-NeXT share the budget by how many of their tokens are left when the padding is cut
off (released: every tile the same, and padding stays); its newlines, which the released code drops,
stay only when all else does. Keys are read before any rotary embedding (Qwen's tower has one). As
released, what the projector is given is mixed; `space="decoder"` mixes what it gives, at any cut
and with any projector.

Shape suffixes: B batch rows, V visual tokens alive, H heads of the tower.
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


@register("visionzip")
@dataclass(frozen=True)
class VisionZip(PruningStrategy):
    """Keeps what the class token attends to, and mixes the rest into tokens at even distances.

    Args:
        layer: Layer of the vision tower.
        queries: Who asks there: `"class"`, or `"all"` for towers without a class token.
        contextual: Part of the budget that goes to mixed tokens.
        space: Where they are mixed: `"vision"`, before the projector and the decoder, or
            `"decoder"`, in what enters a layer.
    """

    keeps_exactly: ClassVar[bool] = True

    layer: int = -2
    queries: str = "class"
    contextual: float = 10 / 64
    space: str = "vision"

    def __post_init__(self) -> None:
        check_fraction(
            "VisionZip.contextual", self.contextual, "part of the budget goes to mixed tokens"
        )

        check_choice("VisionZip.space", self.space, SPACES)

    def needs(self) -> tuple[Need, ...]:
        tower = (VisionRows(self.layer, self.queries), VisionStates(self.layer, "keys"))
        return (*tower, BeforeProjector()) if self.space == "vision" else tower

    def select(self, view: TokenView, keep: Tensor) -> Selection:
        import torch

        from tokenprune.tensors import (
            join_nearest,
            mixture,
            rank_in_units,
            share_out,
            sizes_of_units,
        )

        attention_BHV = view.vision_rows(self.layer, self.queries)
        valid_BV = view.valid
        unit_BV, quota_BU = share_out(keep, view.tiles, valid_BV)
        mixed_BU = (quota_BU * self.contextual).long()
        mixed_BU[:, -1] = 0  # of tokens without patches
        quota_BV, mixed_BV = quota_BU.gather(1, unit_BV), mixed_BU.gather(1, unit_BV)
        rank_BV = rank_in_units(attention_BHV.sum(1), unit_BV, valid_BV)
        dominant_BV = (rank_BV < quota_BV - mixed_BV) & valid_BV
        # Of the others, in the image's order, every so-manieth is a target.
        other_BV = valid_BV & ~dominant_BV & (mixed_BV > 0)
        order_BV = rank_in_units(torch.zeros_like(attention_BHV[:, 0]), unit_BV, other_BV)
        others_BV = sizes_of_units(unit_BV).gather(1, unit_BV) - quota_BV + mixed_BV
        apart_BV = (others_BV // mixed_BV.clamp_min(1)).clamp_min(1)
        target_BV = other_BV & (order_BV % apart_BV == 0) & (order_BV // apart_BV < mixed_BV)

        keys = view.vision_states(self.layer, "keys")
        keys = keys.view(*keys.shape[:2], attention_BHV.shape[1], -1).mean(2)  # over heads
        metric = torch.nn.functional.normalize(keys, dim=-1)
        fits_BVV = target_BV[:, None] & (unit_BV[:, :, None] == unit_BV[:, None])
        alike_BVV = (metric @ metric.mT).masked_fill(~fits_BVV, -torch.inf)
        kept_BV = dominant_BV | target_BV
        seat_BV, row_BV = join_nearest(kept_BV, alike_BVV)
        joins_BV = other_BV & ~target_BV
        count_BV = torch.zeros_like(seat_BV, dtype=torch.float32)
        count_BV = count_BV.scatter_add(1, seat_BV, joins_BV.float())
        share_BV = kept_BV + joins_BV / count_BV.gather(1, seat_BV).clamp_min(1)
        weights = mixture(row_BV, share_BV, view.max_keep)
        return Selection(kept=kept_BV, weights=weights, space=self.space)

    @classmethod
    def published(cls, num_layers: int) -> Published:
        # Of LLaVA-1.5's 576 tokens the paper keeps 192, 128 or 64, before the decoder.
        return Published("one_shot", {"layer": 0, "keep": 0.3333}, positions="renumbered")
