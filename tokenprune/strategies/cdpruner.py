"""CDPruner: Zhang et al., 2025, arXiv 2506.10967 (NeurIPS 2025).

Tokens that are unlike each other and like the question: of the kernel relevance_i cos_ij
relevance_j, greedily the token that adds most to the determinant of those picked (Chen et al.,
2018, arXiv 1709.05135).

Relevance is the mean cosine to the question's own embeddings in the decoder, or, as released
(`relevance="clip"`), that to the question in the common space of the CLIP model whose vision tower
the model has, with the sign turned, because CLIP's patches answer to a text by being unlike it. The
user names that CLIP, and the model's own tokenizer, which gives the question's words back.

Departures. The first is the default, since few models have CLIP's tower. All tokens of a row, of
all its images, are one pool, where the released code picks T tokens of every crop by itself and
scales relevance over all of them: here an image that the question is about may get more. The
question is the text after the last image, what a chat template puts there included, or all of it if
there is none; a row that loses tokens and has no text at all is refused. Tokens that are no patch
(newlines) are as irrelevant to CLIP as can be. With more tokens asked than the embeddings have
dimensions the released code divides by nothing: here a token that is no more than 2e-4 its own
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
    Question,
    Selection,
    Text,
    TextView,
    TokenView,
    VisionStates,
    Words,
    check_choice,
    register,
)

if TYPE_CHECKING:
    from torch import Tensor

RELEVANCES = ("embeddings", "clip")
_EXPLAINED = 2e-4  # what float32 leaves of a vector that is a sum of those picked: about 2e-5
_LEAST = 1e-6  # as in the released code: relevance of the least relevant token


@register("cdpruner")
@dataclass(frozen=True)
class CDPruner(PruningStrategy):
    """Keeps tokens that are unlike each other and like the question, by their embeddings.

    Args:
        relevance: What is like the question: by the decoder's `"embeddings"`, or by `"clip"`.
        clip: Hub id or folder of the CLIP model whose vision tower the model has.
        tokenizer: Hub id or folder of the model's own tokenizer.
        layer: Layer of the tower whose output CLIP projects.
    """

    keeps_exactly: ClassVar[bool] = True

    relevance: str = "embeddings"
    clip: str | None = None
    tokenizer: str | None = None
    layer: int = -2

    def __post_init__(self) -> None:
        check_choice("CDPruner.relevance", self.relevance, RELEVANCES)
        if self.relevance == "clip" and not (self.clip and self.tokenizer):
            raise ValueError(
                'CDPruner.clip, tokenizer: expected hub ids or folders, with relevance="clip", got '
                f"{self.clip!r} and {self.tokenizer!r}. Name the CLIP model whose vision tower the "
                "model has, and the model's own tokenizer."
            )

    def needs(self) -> tuple[Need, ...]:
        if self.relevance == "clip":
            return (Projected(), Question(), Words(), VisionStates(self.layer, "hidden"))
        return (Projected(), Text(), Words())

    def select(self, view: TokenView, keep: Tensor) -> Selection:
        import torch

        from tokenprune.tensors import first_alike, mark, take

        valid_BV = view.valid
        unit_BVD = _unit(view.projected)
        likeness_BVV = unit_BVD @ unit_BVD.mT
        alike_BV = first_alike(unit_BVD, likeness_BVV)
        weight_BV = self._relevance(view, unit_BVD, alike_BV, valid_BV) ** 2
        # Of each token what the picked ones do not explain: its gain, but for its relevance.
        own_BV = unit_BVD.any(-1).float()
        shut_BV = ~valid_BV
        picks: list[Tensor] = []
        factors = likeness_BVV.new_zeros(len(valid_BV), view.max_keep, valid_BV.shape[1])
        for number in range(view.max_keep):
            gain_BV = (weight_BV * own_BV.gather(1, alike_BV)).masked_fill(shut_BV, -torch.inf)
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

    def _relevance(
        self, view: TokenView, unit_BVD: Tensor, alike_BV: Tensor, valid_BV: Tensor
    ) -> Tensor:
        """How like the question each token is, from nearly 0 to 1 in each row, (B, V)."""
        if self.relevance == "embeddings":
            return _scaled(_to_words(unit_BVD, view.text).gather(1, alike_BV), valid_BV)
        assert self.clip is not None
        assert self.tokenizer is not None
        from tokenprune.strategies._clip import likeness

        states_BVC = view.vision_states(self.layer, "hidden")
        like_BV = -likeness(states_BVC, view.question, self.clip, self.tokenizer)
        is_patch_BV = valid_BV & view.has_patches
        return _scaled(like_BV, is_patch_BV).where(is_patch_BV, _LEAST)

    @classmethod
    def published(cls, num_layers: int) -> Published:
        # 64 of 576 tokens, before the decoder: what is left is a shorter prompt.
        return Published("one_shot", {"layer": 0, "keep": 0.1111}, positions="renumbered")


def _unit(embeddings: Tensor) -> Tensor:
    """Float32, of length 1; what is no number is 0."""
    import torch

    numbers = torch.nan_to_num(embeddings.float(), posinf=0, neginf=0)
    return torch.nn.functional.normalize(numbers, dim=-1)


def _to_words(unit_BVD: Tensor, text: TextView) -> Tensor:
    """Mean cosine to the question's tokens, (B, V)."""
    import torch

    asks_BS = torch.where(text.follows.any(1, keepdim=True), text.follows, text.valid)
    words_BSD = _unit(text.embeddings) * asks_BS[..., None]
    mean_BD1 = (words_BSD.sum(1) / asks_BS.sum(1, keepdim=True).clamp_min(1))[..., None]
    return (unit_BVD @ mean_BD1)[..., 0]


def _scaled(like_BV: Tensor, valid_BV: Tensor) -> Tensor:
    """Scaled to [0, 1] over the row."""
    import torch

    low_B1 = like_BV.masked_fill(~valid_BV, torch.inf).amin(1, keepdim=True)
    high_B1 = like_BV.masked_fill(~valid_BV, -torch.inf).amax(1, keepdim=True)
    return (like_BV - low_B1 + _LEAST) / (high_B1 - low_B1).clamp_min(_LEAST)
