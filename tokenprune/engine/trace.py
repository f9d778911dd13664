"""What a pruned run did: which tokens survived each cut, and how many each layer processed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class TracedStage:
    """One cut of the latest call that had visual tokens.

    Attributes:
        layer: The cut happened before this layer.
        kept: Per row, int64 ascending: surviving tokens, numbered within the sample's own visual
            tokens over its whole conversation.
        scores: Per row, float32: scores of the tokens alive before the cut; None for strategies
            that select jointly.
    """

    layer: int
    kept: list[Tensor]
    scores: list[Tensor] | None


@dataclass(eq=False)
class Trace:
    """What a run did.

    Attributes:
        stages: One entry per cut of the latest call that had visual tokens.
        lengths: int64 (num_layers, B): real tokens, without pads, that each layer processed.
        visual_lengths: int64 (num_layers, B): visual tokens among them.
    """

    stages: list[TracedStage] = field(default_factory=list)
    lengths: Tensor = field(default_factory=lambda: torch.empty(0, 0, dtype=torch.int64))
    visual_lengths: Tensor = field(default_factory=lambda: torch.empty(0, 0, dtype=torch.int64))
    _find_places: Callable[[], list[Tensor]] = field(default=list, repr=False)

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_find_places": partial(list, self.places)}

    @property
    def places(self) -> list[Tensor]:
        """Per row, int64 (V, 4): image, grid, row, column of the call's visual tokens, or -1."""
        return self._find_places()
