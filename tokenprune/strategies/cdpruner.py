"""CDPruner: Zhang et al., 2025, arXiv 2506.10967 (NeurIPS 2025).

Tokens that are unlike each other and like the question: of the kernel relevance_i cos_ij
relevance_j, greedily the token that adds most to the determinant of those picked (Chen et al.,
2018, arXiv 1709.05135).

Departures. Relevance is the mean cosine to the question's own embeddings in the decoder; the
released code asks CLIP's text tower, which few models have, and turns the sign, because CLIP's
patches answer to a text by being unlike it. All tokens of a row are one pool, where the released
code picks crop by crop and scales relevance over all of them. The question is the text after the
last image, or all of it if there is none. With more tokens asked than the embeddings have
dimensions the released code divides by nothing: here a token that is no more than 1e-5 its own
counts as explained, adds nothing, and is picked when no other is left, the lower index first.
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
    Text,
    TextView,
    TokenView,
    register,
)

if TYPE_CHECKING:
    from torch import Tensor

_EXPLAINED = 1e-5  # float32 knows the residual of a unit vector to about 1e-6
_LEAST = 1e-6  # as in the released code: relevance of the least relevant token


@register("cdpruner")
@dataclass(frozen=True)
class CDPruner(PruningStrategy):
    """Keeps tokens that are unlike each other and like the question, by their embeddings."""

    keeps_exactly: ClassVar[bool] = True

    def needs(self) -> tuple[Need, ...]:
        return (Projected(), Text())

    def select(self, view: TokenView, keep: Tensor) -> Selection:
        import torch

        from tokenprune.tensors import mark, take

        valid_BV = view.valid
        unit_BVD = _unit(view.projected)
        weight_BV = _relevance(unit_BVD, view.text, valid_BV) ** 2
        likeness_BVV = unit_BVD @ unit_BVD.mT
        # Of each token what the picked ones do not explain: its gain, but for its relevance.
        own_BV = unit_BVD.any(-1).float()
        shut_BV = ~valid_BV
        picks: list[Tensor] = []
        factors = likeness_BVV.new_zeros(len(valid_BV), view.max_keep, valid_BV.shape[1])
        for number in range(view.max_keep):
            gain_BV = (weight_BV * own_BV).masked_fill(shut_BV, -torch.inf)
            pick_B1 = gain_BV.argmax(1, keepdim=True)  # the first of equal ones
            picks.append(pick_B1)
            shut_BV = shut_BV.scatter(1, pick_B1, True)
            before_BPV = factors[:, :number]
            known_B1P = take(before_BPV, pick_B1, dim=2).mT
            row_BV = (take(likeness_BVV, pick_B1) - known_B1P @ before_BPV)[:, 0]
            left_B1 = own_BV.gather(1, pick_B1)
            factor_BV = torch.where(left_B1 > 0, row_BV / left_B1.clamp_min(_EXPLAINED).sqrt(), 0)
            factors[:, number] = factor_BV
            own_BV = own_BV - factor_BV**2
            own_BV = own_BV.masked_fill(own_BV < _EXPLAINED, 0)
        return Selection(kept=mark(picks, keep, valid_BV))

    @classmethod
    def published(cls, num_layers: int) -> Published:
        # 64 of 576 tokens, before the decoder: what is left is a shorter prompt.
        return Published("one_shot", {"layer": 0, "keep": 0.1111}, positions="renumbered")


def _unit(embeddings: Tensor) -> Tensor:
    """Float32, of length 1; what is no number is 0."""
    import torch

    numbers = torch.nan_to_num(embeddings.float(), posinf=0, neginf=0)
    return torch.nn.functional.normalize(numbers, dim=-1)


def _relevance(unit_BVD: Tensor, text: TextView, valid_BV: Tensor) -> Tensor:
    """Mean cosine to the question's tokens, scaled to [0, 1] over the row, (B, V)."""
    import torch

    asks_BS = torch.where(text.follows.any(1, keepdim=True), text.follows, text.valid)
    words_BSD = _unit(text.embeddings) * asks_BS[..., None]
    mean_BD1 = (words_BSD.sum(1) / asks_BS.sum(1, keepdim=True).clamp_min(1))[..., None]
    cosine_BV = (unit_BVD @ mean_BD1)[..., 0]
    low_B1 = cosine_BV.masked_fill(~valid_BV, torch.inf).amin(1, keepdim=True)
    high_B1 = cosine_BV.masked_fill(~valid_BV, -torch.inf).amax(1, keepdim=True)
    return (cosine_BV - low_B1 + _LEAST) / (high_B1 - low_B1).clamp_min(_LEAST)
