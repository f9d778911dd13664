"""MMTok: Dong et al., 2025, arXiv 2508.18264.

Tokens that cover the question and the picture: of each tile that token is picked, again and again,
which adds most to how well both are covered. A word is covered by each visual token as a softmax of
cosines over the tile says, sharp (temperature .02), between the decoder's embeddings; so is each
patch by the others (temperature .2), between the vision tower's states in the last layer but one.
Words count 1 together, patches `weight`. Released for Qwen2.5-VL, words have the temperature .01,
states are what the merger is given, and all images are one pool (`text_temperature=.01, layer=-1`;
pools stay apart here).

Departures: for LLaVA the released code leaves out stop words and the benchmark's own phrase; here
the whole text after the row's last image asks, or all of it if none follows. It gives every tile
the same budget; here tiles share the budget by how many tokens they have, and newlines stay only
when all else does.

Shape suffixes: B batch rows, V visual tokens alive, S tokens of text, U tiles of all rows, L tokens
of one.
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
    TokenView,
    VisionStates,
    Words,
    check_number,
    register,
)

if TYPE_CHECKING:
    from torch import Tensor


@register("mmtok")
@dataclass(frozen=True)
class MMTok(PruningStrategy):
    """Keeps what covers the question's words and the other tokens best.

    Args:
        layer: Layer of the vision tower.
        text_temperature: Of the softmax by which words are covered.
        vision_temperature: Of that by which patches are.
        weight: What covering all patches counts, beside all words.
    """

    keeps_exactly: ClassVar[bool] = True

    layer: int = -2
    text_temperature: float = 0.02
    vision_temperature: float = 0.2
    weight: float = 0.5

    def __post_init__(self) -> None:
        check_number("MMTok.text_temperature", self.text_temperature, above=0, paper=".02")
        check_number("MMTok.vision_temperature", self.vision_temperature, above=0, paper=".2")
        check_number("MMTok.weight", self.weight, least=0, paper=".5")

    def needs(self) -> tuple[Need, ...]:
        return (Projected(), VisionStates(self.layer), Text(), Words())

    def select(self, view: TokenView, keep: Tensor) -> Selection:
        import torch

        from tokenprune.strategies._coverage import cover, directions
        from tokenprune.strategies._tiles import Tiles, choose_by_tile
        from tokenprune.tensors import first_alike

        text, (most, _) = view.text, view.tile_shape
        asks_BS = torch.where(text.follows.any(1, keepdim=True), text.follows, text.valid)
        words_BSD = directions(text.embeddings.float()) * asks_BS[..., None]
        projected, states = directions(view.projected.float()), view.vision_states(self.layer)
        like_BVS, states = projected @ words_BSD.mT, directions(states)
        asks_US1 = asks_BS.repeat_interleave(most, 0)[..., None]
        part_US1 = asks_US1 / asks_US1.sum(1, keepdim=True).clamp_min(1)

        def pick(tiles: Tiles, target_U: Tensor, rounds: int) -> Tensor:
            exists_UL = tiles.exists
            own_ULC, both_ULC = (
                tiles.of(own) * exists_UL[..., None]
                for own in (states, torch.cat([states, projected], 2) * 0.5**0.5)
            )
            count_U11 = exists_UL.sum(1).clamp_min(1)[:, None, None]
            words_USL = tiles.of(like_BVS).mT / self.text_temperature
            patches_ULL = own_ULC @ own_ULC.mT / self.vision_temperature
            covers = (
                _softmax(words_USL, exists_UL) * part_US1,
                _softmax(patches_ULL, exists_UL) * exists_UL[..., None] * (self.weight / count_U11),
            )
            alike_UL = first_alike(both_ULC, both_ULC @ both_ULC.mT)
            return cover(torch.cat(covers, 1), None, alike_UL, exists_UL, target_U, rounds)

        return choose_by_tile(view, keep, pick)

    @classmethod
    def published(cls, num_layers: int) -> Published:
        # 64 of 576 tokens, before the decoder.
        return Published("one_shot", {"layer": 0, "keep": 0.1111}, positions="renumbered")


def _softmax(logits_URL: Tensor, exists_UL: Tensor) -> Tensor:
    """Over the tokens of a tile that exist; 0 where there are none."""
    import torch

    return logits_URL.masked_fill(~exists_UL[:, None], -torch.inf).softmax(2).nan_to_num(0)
