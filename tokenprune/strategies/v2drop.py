"""V2Drop: Chen et al., 2025, arXiv 2509.01552 (CVPR 2026).

What a layer hardly moves it hardly works on: tokens are ranked by how far the layer before the cut
has moved their hidden states, the length of the difference of what enters the two layers, as in the
released code. It reads no attention and no text. Where the paper keeps none at the last cut, the
released code keeps one token: here `keep` is .0017, one of LLaVA-1.5's 576; of fewer than 295 none
stays, of LLaVA-NeXT's 2 880 five.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from tokenprune.strategy import Change, Need, Published, ScoreStrategy, TokenView, register

if TYPE_CHECKING:
    from torch import Tensor


@register("v2drop")
@dataclass(frozen=True)
class V2Drop(ScoreStrategy):
    """Keeps what the layer before the cut has changed the most."""

    def needs(self) -> tuple[Need, ...]:
        return (Change(),)

    def score(self, view: TokenView) -> Tensor:
        length_BV: Tensor = view.change.norm(dim=-1)
        return length_BV

    @classmethod
    def published(cls, num_layers: int) -> Published:
        # Half of what is there at layers 3 and 17 of LLaVA-1.5's 32, and one of 576 from 22 on.
        stages = ((3, 0.5), (17, 0.25), (22, 0.0017))
        options = {"stages": stages, "of_layers": 32, "rounding": "nearest"}
        return Published("explicit", {**options, "num_layers": num_layers}, positions="original")
