"""FasterVLM: Zhang et al., 2024, arXiv 2412.01818, §3.2.

The class token's attention in the last but one layer of CLIP, mean over heads, ranks the patches of
each tile by itself. Departures: the released code gives every tile the same budget, and LLaVA-NeXT
no unpadding and no newlines; here tiles share the budget by how many tokens they have, and newlines
stay only when all else does. Towers without a class token take `queries="all"`, which is not the
paper's; in Qwen2.5-VL's, `layer=-2` attends within windows, each of which then gets the same in
all, and `layer=-1` over the whole image.
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


@register("fastervlm")
@dataclass(frozen=True)
class FasterVLM(PruningStrategy):
    """Keeps what the vision tower's class token attends to, in each tile by itself."""

    keeps_exactly: ClassVar[bool] = True

    layer: int = -2
    queries: str = "class"

    def needs(self) -> tuple[Need, ...]:
        return (VisionRows(self.layer, self.queries),)

    def select(self, view: TokenView, keep: Tensor) -> Selection:
        from tokenprune.tensors import rank_in_units, share_out

        attention_BV = view.vision_rows(self.layer, self.queries).mean(1)  # over heads
        unit_BV, quota_BU = share_out(keep, view.tiles, view.valid)
        rank_BV = rank_in_units(attention_BV, unit_BV, view.valid)
        return Selection(kept=(rank_BV < quota_BU.gather(1, unit_BV)) & view.valid)

    @classmethod
    def published(cls, num_layers: int) -> Published:
        # Of LLaVA-1.5's 576 tokens the paper keeps 144, 58 or 29, before the decoder.
        return Published("one_shot", {"layer": 0, "keep": 0.25}, positions="renumbered")
