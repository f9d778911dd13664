"""SCOPE: Deng et al., 2025, arXiv 2510.24214.

Salient tokens that cover the others: of each tile that token is picked, again and again, which adds
most to how well all of the tile are covered, times its saliency. A token is covered as well as its
likeness to the most alike of those picked, the cosine of the vision tower's states in the last
layer but one, from 0 on; saliency is what the class token pays it there, all heads together.
`features="projected"` compares what enters the decoder, as some re-implementations do. Departures:
the released code gives every tile the same budget, in the model's precision; here tiles share the
budget by how many tokens they have, in float32, and newlines stay only when all else does. Towers
without a class token take `queries="all"`, which is not the paper's.

Shape suffixes: B batch rows, V visual tokens alive, U tiles of all rows, L tokens of one.
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
    VisionRows,
    VisionStates,
    check_choice,
    check_number,
    register,
)

if TYPE_CHECKING:
    from torch import Tensor

FEATURES = ("tower", "projected")


@register("scope")
@dataclass(frozen=True)
class SCOPE(PruningStrategy):
    """Keeps what the class token attends to and what covers the other tokens, both at once.

    Args:
        layer: Layer of the vision tower.
        queries: Who asks there: `"class"`, or `"all"` for towers without a class token.
        features: What is compared: states of the `"tower"`, or what enters the decoder,
            `"projected"`.
        power: Exponent of the saliency; at 0 coverage alone counts.
    """

    keeps_exactly: ClassVar[bool] = True

    layer: int = -2
    queries: str = "class"
    features: str = "tower"
    power: float = 1.0

    def __post_init__(self) -> None:
        check_choice("SCOPE.features", self.features, FEATURES)
        check_number("SCOPE.power", self.power, least=0, paper="1")

    def needs(self) -> tuple[Need, ...]:
        compared = VisionStates(self.layer) if self.features == "tower" else Projected()
        return (VisionRows(self.layer, self.queries), compared)

    def select(self, view: TokenView, keep: Tensor) -> Selection:
        from tokenprune.strategies._coverage import cover, directions
        from tokenprune.strategies._tiles import Tiles, choose_by_tile
        from tokenprune.tensors import first_alike

        salient_BV = view.vision_rows(self.layer, self.queries).sum(1)  # over heads
        worth_BV = salient_BV.nan_to_num(0) ** self.power
        tower = self.features == "tower"
        states = directions(view.vision_states(self.layer) if tower else view.projected.float())

        def pick(tiles: Tiles, target_U: Tensor, rounds: int) -> Tensor:
            own_ULC = tiles.of(states) * tiles.exists[..., None]
            cosine_ULL = own_ULC @ own_ULC.mT
            alike_UL = first_alike(own_ULC, cosine_ULL)
            worth_UL = tiles.of(worth_BV)
            return cover(cosine_ULL, worth_UL, alike_UL, tiles.exists, target_U, rounds)

        return choose_by_tile(view, keep, pick)

    @classmethod
    def published(cls, num_layers: int) -> Published:
        # 64 of 576 tokens, before the decoder.
        return Published("one_shot", {"layer": 0, "keep": 0.1111}, positions="renumbered")
