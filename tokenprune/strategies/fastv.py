"""FastV: Chen et al., 2024, arXiv 2403.06764 (ECCV 2024), §4.1.

The paper averages the attention received from all tokens (`queries="all"`); the released code reads
the last token only, and is the default. Departure: the released code picks once per batch, from its
first sample; here every row chooses for itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from tokenprune.strategy import AttentionStrategy, Published, TokenView, register

if TYPE_CHECKING:
    from torch import Tensor


@register("fastv")
@dataclass(frozen=True)
class FastV(AttentionStrategy):
    """Keeps what the last token attended to in the layer before the cut."""

    queries: str = "last"
    source: str = "previous"

    def score(self, view: TokenView) -> Tensor:
        return view.attend(self.queries, self.source).mean(1)  # over heads

    @classmethod
    def published(cls, num_layers: int) -> Published:
        # The released code leaves the survivors their positions.
        return Published("one_shot", {"layer": 2, "keep": 0.5}, positions="original")
