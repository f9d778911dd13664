"""PruMerge+: Shang et al., 2024, arXiv 2403.15388 (LLaVA-PruMerge), with tokens at even distances.

PruMerge with tokens at even distances beside the outliers, or for half of a schedule's budget; the
rest of `prumerge.py` holds.
"""

from __future__ import annotations

from dataclasses import dataclass

from tokenprune.strategies.prumerge import PruMerge
from tokenprune.strategy import Published, register


@register("prumerge_plus")
@dataclass(frozen=True)
class PruMergePlus(PruMerge):
    """Keeps what the class token attends to and tokens at even distances, mixed as in PruMerge."""

    spread: float = 0.5

    @classmethod
    def published(cls, num_layers: int) -> Published:
        # Before the decoder: 144 of LLaVA-1.5's 576 tokens on average, all but one at most. Rounded
        # down: a cut that may keep all tokens is none.
        options = {"layer": 0, "keep": 0.9983, "rounding": "floor"}
        return Published("one_shot", options, positions="renumbered")
