"""MMTok: Dong et al., 2025, arXiv 2508.18264.

Tokens that cover the question and the picture: of each tile that token is picked, again and again,
which adds most to how well both are covered. A word is covered by each visual token as a softmax of
cosines over the tile says, sharp (temperature .02), between the decoder's embeddings; so is each
patch by the others (temperature .2), between the vision tower's states in the last layer but one.
Words count 1 together, patches `weight`. For Qwen2.5-VL the released temperature of words is .01.

Departures: the released code leaves out stop words and the benchmark's own phrase; here the whole
text after the row's last image asks, or all of it if none follows. It gives every tile the same
budget; here tiles share the budget by how many tokens they have, and newlines stay only when all
else does.

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
        for name in ("text_temperature", "vision_temperature"):
            if not getattr(self, name) > 0:
                raise ValueError(
                    f"MMTok.{name}: expected a number above 0, got {getattr(self, name)!r}. "
                    "The paper has .02 and .2."
                )
        if not self.weight >= 0:
            raise ValueError(
                f"MMTok.weight: expected a number from 0 on, got {self.weight!r}. The paper has .5."
            )

    def needs(self) -> tuple[Need, ...]:
        return (Projected(), VisionStates(self.layer), Text(), Words())

    def select(self, view: TokenView, keep: Tensor) -> Selection:
        import torch

        from tokenprune.strategies._coverage import cover, directions
        from tokenprune.strategies._tiles import Tiles, choose_by_tile

        text, (most, _) = view.text, view.tile_shape
        asks_BS = torch.where(text.follows.any(1, keepdim=True), text.follows, text.valid)
        words_BSD = directions(text.embeddings.float()) * asks_BS[..., None]
        like_BVS = directions(view.projected.float()) @ words_BSD.mT
        states = directions(view.vision_states(self.layer))
        asks_US1 = asks_BS.repeat_interleave(most, 0)[..., None]
        part_US1 = asks_US1 / asks_US1.sum(1, keepdim=True).clamp_min(1)

        def pick(tiles: Tiles, target_U: Tensor, rounds: int) -> Tensor:
            own_ULC = tiles.of(states)
            words_USL = tiles.of(like_BVS).mT / self.text_temperature
            patches_ULL = own_ULC @ own_ULC.mT / self.vision_temperature
            count_U11 = tiles.exists.sum(1).clamp_min(1)[:, None, None]
            part_UL1 = tiles.exists[..., None] * (self.weight / count_U11)
            covers = (
                _softmax(logits, tiles.exists) * part
                for logits, part in ((words_USL, part_US1), (patches_ULL, part_UL1))
            )
            return cover(torch.cat(tuple(covers), 1), None, tiles.exists, target_U, rounds)

        return choose_by_tile(view, keep, pick)

    @classmethod
    def published(cls, num_layers: int) -> Published:
        # 64 of 576 tokens, before the decoder.
        return Published("one_shot", {"layer": 0, "keep": 0.1111}, positions="renumbered")


def _softmax(logits_URL: Tensor, exists_UL: Tensor) -> Tensor:
    """Over the tokens of a tile that exist; 0 where there are none."""
    import torch

    return logits_URL.masked_fill(~exists_UL[:, None], -torch.inf).softmax(2).nan_to_num(0)
