"""VTW: Lin et al., 2024, arXiv 2405.05803 (AAAI 2025).

The premise: deep layers read the image through the text, which has taken it up by then. It depends
on the model: in some the attention to visual tokens rises with depth. The layer K is the schedule's
(`keep` 0 at K): 15 for LLaVA-1.5-7B. Elsewhere the paper takes the least K from 5 on at which the
divergence KL(withdrawn | whole) of the next token, mean over 20 samples, is at most .003 (.0005 for
LLaVA-1.5-13B, .0001 for LLaVA-NeXT-7B).

Which tokens are chosen is no question there, so all score alike. With another schedule the first
tokens of a row stay, which nobody has proposed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from tokenprune.strategy import Published, ScoreStrategy, TokenView, register

if TYPE_CHECKING:
    from torch import Tensor


@register("vtw")
@dataclass(frozen=True)
class VTW(ScoreStrategy):
    """Keeps no visual token from one layer on; by itself it prefers none to another."""

    blind: ClassVar[bool] = True

    def score(self, view: TokenView) -> Tensor:
        return view.valid.float() * 0

    @classmethod
    def published(cls, num_layers: int) -> Published:
        options = {"stages": ((15, 0.0),), "of_layers": 32, "rounding": "nearest"}
        return Published("explicit", {**options, "num_layers": num_layers}, positions="original")
