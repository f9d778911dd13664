"""PruMerge+: Shang et al., 2024, arXiv 2403.15388 (LLaVA-PruMerge), with tokens at even distances.

PruMerge, half of whose budget goes to tokens at even distances; the rest of `prumerge.py` holds.
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
        # The paper's 144 of LLaVA-1.5's 576 tokens, before the decoder.
        return Published("one_shot", {"layer": 0, "keep": 0.25}, positions="renumbered")
