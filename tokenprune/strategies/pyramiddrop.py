"""PyramidDrop: Xing et al., 2024, arXiv 2410.17247 (CVPR 2025), §3.2 and eq. 2.

The released code differs from the paper: it scores with the first layer of the next stage, where
the paper names the last layer of the stage (`source="previous"`), and rounds the original count
down, where the paper rounds the running count up. The defaults are the released code. Departure: it
scores by other query rows in training mode than in evaluation; here labels decide.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from tokenprune.strategy import AttentionStrategy, Published, TokenView, register

if TYPE_CHECKING:
    from torch import Tensor


@register("pyramiddrop")
@dataclass(frozen=True)
class PyramidDrop(AttentionStrategy):
    """Keeps what the last instruction token attends to in the layer about to run."""

    queries: str = "last"
    source: str = "next"

    def score(self, view: TokenView) -> Tensor:
        return view.attend(self.queries, self.source).mean(1)  # over heads

    @classmethod
    def published(cls, num_layers: int) -> Published:
        # The released 13B scripts keep the 7B cuts: 40 layers fall into stages of 8, 8, 8 and 16.
        where = {"layers": (8, 16, 24)} if num_layers == 40 else {"num_stages": 4}
        options = {"num_layers": num_layers, "lam": 0.5, **where}
        # The released code counts positions anew at each cut.
        return Published("pyramid", options, positions="renumbered")
