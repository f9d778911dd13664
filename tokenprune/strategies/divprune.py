"""DivPrune: Alvar et al., 2025, arXiv 2503.02175 (CVPR 2025).

Greedy: first the token that is farthest from its nearest neighbour, then always the one that is
farthest from those picked; the distance is 1 - cosine of what enters the decoder. As in the
released code, which chooses once from all that stands for an image, tiles and newlines, the visual
tokens of a row are one pool, here those of all its images: alike ones are kept once, and the budget
is theirs together. Departures: distances are float32, where the released code has the model's
dtype, and a token is picked once. The released code may pick one again where tokens are duplicates,
and then keeps fewer (`exact_reference=True`; a row that may keep all keeps all).
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
    register,
)

if TYPE_CHECKING:
    from torch import Tensor


@register("divprune")
@dataclass(frozen=True)
class DivPrune(PruningStrategy):
    """Keeps tokens that are far from each other, by cosine, as they entered the decoder.

    Args:
        exact_reference: Whether a token may be picked again, as in the released code.
    """

    keeps_exactly: ClassVar[bool] = True

    exact_reference: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "keeps_exactly", not self.exact_reference)

    def needs(self) -> tuple[Need, ...]:
        return (Projected(),)

    def select(self, view: TokenView, keep: Tensor) -> Selection:
        import torch

        from tokenprune.tensors import first_alike, mark, take

        valid_BV, unit_BVD = (
            view.valid,
            torch.nn.functional.normalize(view.projected.float(), dim=-1),
        )
        sound_BV = valid_BV & unit_BVD.isfinite().all(-1)  # the others come last
        unit_BVD = unit_BVD.masked_fill(~sound_BV[..., None], 0)
        cosine_BVV = unit_BVD @ unit_BVD.mT
        alike_BV = first_alike(unit_BVD, cosine_BVV)
        distance_BVV = (1 - take(take(cosine_BVV, alike_BV), alike_BV, dim=2)).clamp_min(0)
        distance_BVV = distance_BVV.masked_fill(alike_BV[:, :, None] == alike_BV[:, None], 0)
        # The second smallest entry of a token's row: the smallest is its own.
        own_VV = torch.eye(valid_BV.shape[1], dtype=torch.bool, device=keep.device)
        others_BVV = distance_BVV.masked_fill(~sound_BV[:, None] | own_VV, torch.inf)
        # As far as a token can be: rows have no entries at -inf.
        low = torch.finfo(torch.float32).min
        far_BV = torch.where(sound_BV, torch.inf, low).masked_fill(~valid_BV, -torch.inf)
        reach_BV = torch.minimum(others_BVV.amin(-1), far_BV)
        picks = []
        for number in range(view.max_keep):
            pick_B1 = reach_BV.argmax(1, keepdim=True)  # the first of equal ones
            picks.append(pick_B1)
            reach_BV = far_BV if number == 0 else reach_BV
            reach_BV = torch.minimum(reach_BV, take(distance_BVV, pick_B1)[:, 0])
            if not self.exact_reference:
                reach_BV = reach_BV.scatter(1, pick_B1, -torch.inf)
        whole_B1 = (keep >= valid_BV.sum(1))[:, None]
        return Selection(kept=torch.where(whole_B1, valid_BV, mark(picks, keep, valid_BV)))

    @classmethod
    def published(cls, num_layers: int) -> Published:
        # 56 of 576 tokens, before the decoder: what is left is a shorter prompt.
        return Published("one_shot", {"layer": 0, "keep": 0.098}, positions="renumbered")
