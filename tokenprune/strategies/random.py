"""Random: the baseline that a method must beat to have chosen anything.

Published ports draw from the global generator; here a draw is fixed by (seed, layer, the row's
tokens), so a row keeps the same tokens alone and in a batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from tokenprune.strategy import (
    Need,
    Published,
    RandomNumbers,
    ScoreStrategy,
    TokenView,
    register,
)

if TYPE_CHECKING:
    from torch import Tensor


@register("random")
@dataclass(frozen=True)
class Random(ScoreStrategy):
    """Keeps a random subset, drawn anew at every cut from those alive."""

    blind: ClassVar[bool] = True

    seed: int = 0

    def needs(self) -> tuple[Need, ...]:
        return (RandomNumbers(self.seed),)

    def score(self, view: TokenView) -> Tensor:
        return view.random(self.seed)

    @classmethod
    def published(cls, num_layers: int) -> Published:
        """No paper: PyramidDrop's default schedule, so that the baseline has the same budget."""
        options = {"num_layers": num_layers, "num_stages": 4, "lam": 0.5}
        return Published("pyramid", options, positions="original")
