"""PriorTR: Chen et al., 2026, arXiv 2606.24156.

What the question adds to where the model looks anyway. The first text token after the image has
seen the image and nothing of the question: its attention is the prior Q. That of the question's
tokens is P, their mean (`queries="text"`, as released for LLaVA-1.5, the prior's own row included)
or the last one's (`queries="last"`, for LLaVA-NeXT). Both are means over heads and sum to 1 over
the visual tokens; a token is worth its part of the divergence between them, P ln(P / Q).

Departures: the released code drops the same tokens from the cache of the layers before the cut,
where here they stay; text between images does not ask. Of several images the prior is the first
token after the last; what closes an image (InternVL) counts as that. A question that stands before
the image is in the prior, too; where one token alone follows, it is both, and the first tokens
stay.

Shape suffixes: B batch rows, V visual tokens alive, S tokens of the prompt's text.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from tokenprune.strategy import (
    DecoderRows,
    Need,
    Published,
    ScoreStrategy,
    Text,
    TokenView,
    Words,
    check_choice,
    register,
)

if TYPE_CHECKING:
    from torch import Tensor

QUERIES = ("text", "last")
_LEAST = 1e-10


@register("priortr")
@dataclass(frozen=True)
class PriorTR(ScoreStrategy):
    """Keeps what the question attends to more than the first token after the image.

    Args:
        queries: Who asks: the mean of the `"text"` after the last image, or its `"last"` token.
        source: Layer that answers: `"previous"`, before the cut, or `"next"`, about to run.
    """

    queries: str = "text"
    source: str = "previous"

    def __post_init__(self) -> None:
        check_choice("PriorTR.queries", self.queries, QUERIES)
        DecoderRows("text", self.source)  # refuses a bad one here, not at the first cut

    def needs(self) -> tuple[Need, ...]:
        return (DecoderRows("text", self.source), Text(), Words(follow=True))

    def score(self, view: TokenView) -> Tensor:
        paid_BSV = view.attend("text", self.source).mean(1)  # over heads
        if view.ragged:
            paid_BSV = paid_BSV * view.valid[:, None]
        asks_BS = view.text.follows
        number_BS = asks_BS.cumsum(1) * asks_BS
        count_B1 = asks_BS.sum(1, keepdim=True)
        task_BS = asks_BS if self.queries == "text" else number_BS == count_B1
        task_BV, prior_BV = (
            _distribution(paid_BSV, rows_BS & asks_BS) for rows_BS in (task_BS, number_BS == 1)
        )
        return task_BV * ((task_BV + _LEAST) / (prior_BV + _LEAST)).log()

    @classmethod
    def published(cls, num_layers: int) -> Published:
        # 64 of 576 tokens from layer 3 on, by what layer 2 attends to.
        return Published("one_shot", {"layer": 3, "keep": 0.1111}, positions="original")


def _distribution(paid_BSV: Tensor, rows_BS: Tensor) -> Tensor:
    """The mean of some rows, scaled so that it sums to 1, (B, V)."""
    weights_BS = rows_BS.float() / rows_BS.sum(1, keepdim=True).clamp_min(1)
    mean_BV = (weights_BS[:, None] @ paid_BSV)[:, 0]
    return mean_BV / (mean_BV.sum(1, keepdim=True) + _LEAST)
