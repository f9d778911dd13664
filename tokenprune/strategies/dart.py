"""DART: Wen et al., 2025, arXiv 2502.11494 (EMNLP 2025).

Pivots are the visual tokens, and the text tokens after the image, with the largest L1 norm of the
key in the layer before the cut. Each pivot in turn keeps, of the visual tokens left, the share that
is least like it, by the cosine of hidden states after the model's last norm. As in the released
code the share is rounded down, so up to seven tokens fewer than asked are kept; `exact_budget=True`
hands the rest to the first pivots. A row with fewer tokens than pivots, or no text after its last
image (the released code fails there), has fewer pivots, and each keeps more.

Departures: the budget counts the image pivots (the released 128 are 132 here), and pivots take
turns by norm, first those of the image, then those of the text. The released code goes through a
Python set of their indices, in an order that depends on the numbers alone: 2 to 10 of its 132
tokens are others. The L1 norm of a rotated key depends on its position: in a batch that is padded
on the left a row chooses as it does alone only with `position_ids`, which `generate` gives.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from tokenprune.strategy import (
    DecoderKeys,
    Need,
    Normed,
    PruningStrategy,
    Published,
    Selection,
    Text,
    TokenView,
    register,
)

if TYPE_CHECKING:
    from torch import Tensor


@register("dart")
@dataclass(frozen=True)
class DART(PruningStrategy):
    """Keeps the tokens least like a few pivots, whose keys are the largest.

    Args:
        image_pivots: Visual tokens among the pivots; they are kept.
        text_pivots: Text tokens among them.
        exact_budget: Whether what equal shares leave over is kept as well.
    """

    keeps_exactly: ClassVar[bool] = False

    image_pivots: int = 4
    text_pivots: int = 4
    exact_budget: bool = False

    def __post_init__(self) -> None:
        for name in ("image_pivots", "text_pivots"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(
                    f"DART.{name}: expected an integer >= 1, got {value!r}. The paper has 4."
                )
        object.__setattr__(self, "keeps_exactly", self.exact_budget)

    def needs(self) -> tuple[Need, ...]:
        return (DecoderKeys("previous"), Normed(), Text())

    def select(self, view: TokenView, keep: Tensor) -> Selection:
        import torch

        from tokenprune.tensors import take, top_k

        valid_BV, keys, states = view.valid, view.keys("previous"), view.normed
        own_BP, is_own_BP = _largest(keys.visual, valid_BV, self.image_pivots)
        is_own_BP &= torch.arange(own_BP.shape[1], device=keep.device) < keep[:, None]
        text_BQ, is_text_BQ = _largest(keys.text, view.text.follows, self.text_pivots)
        pivots_BRD = torch.cat([take(states.visual, own_BP), take(states.text, text_BQ)], 1)
        exists_BR = torch.cat([is_own_BP, is_text_BQ], 1)

        unit = torch.nn.functional.normalize
        likeness_BRV = unit(pivots_BRD.float(), dim=-1) @ unit(states.visual.float(), dim=-1).mT
        kept_BV = torch.zeros_like(valid_BV).scatter(1, own_BP, is_own_BP)
        number_B = exists_BR.sum(1).clamp_min(1)
        rest_B = keep - is_own_BP.sum(1)
        share_BR = (rest_B // number_B)[:, None].expand(exists_BR.shape)
        if self.exact_budget:
            turn_BR = exists_BR.cumsum(1) - 1
            share_BR = share_BR + (turn_BR < (rest_B % number_B)[:, None])
        for pivot in range(exists_BR.shape[1]):
            share_B = share_BR[:, pivot] * exists_BR[:, pivot]
            kept_BV = kept_BV | top_k(-likeness_BRV[:, pivot], valid_BV & ~kept_BV, share_B)
        whole_B1 = (keep >= valid_BV.sum(1))[:, None]
        return Selection(kept=torch.where(whole_B1, valid_BV, kept_BV))

    @classmethod
    def published(cls, num_layers: int) -> Published:
        # The scripts' 128 tokens: 16 for each of 8 pivots, and the 4 of the image.
        return Published("one_shot", {"layer": 2, "keep": 0.2292}, positions="original")


def _largest(keys_BNGE: Tensor, exists_BN: Tensor, number: int) -> tuple[Tensor, Tensor]:
    """Tokens with the largest keys, the largest first, and which of them exist: (B, number)."""
    import torch

    norm_BN = torch.nan_to_num(keys_BNGE.float().abs().flatten(2).sum(-1), nan=0)
    norm_BN = norm_BN.masked_fill(~exists_BN, -1)
    order_BN = norm_BN.argsort(dim=1, descending=True, stable=True)[:, :number]
    return order_BN, exists_BN.gather(1, order_BN)
