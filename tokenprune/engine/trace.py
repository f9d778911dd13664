"""What a pruned run did: which tokens survived each cut, and how many each layer processed.

A run notes what it has anyway; lists and tensors for people are made when somebody looks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
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
        weights: Per row, float (K, V): how each survivor was mixed from the tokens alive before
            the cut; None where survivors stay as they were.
    """

    layer: int
    kept: list[Tensor]
    scores: list[Tensor] | None
    weights: list[Tensor] | None = None

    @property
    def into(self) -> list[Tensor] | None:
        """Which survivor took each token in; None where survivors stay as they were.

        Per row, int64 (V,) of the tokens alive before the cut: the number in `kept` of the survivor
        in which it has the largest share; -1 for one that is in none. A survivor is in itself.
        """
        if self.weights is None:
            return None
        found = []
        for weights in self.weights:
            shares = weights.abs()
            if not len(shares):
                found.append(torch.full((shares.shape[1],), -1))
                continue
            most = shares.max(0)
            found.append(most.indices.masked_fill(most.values == 0, -1))
        return found


class Trace:
    """What a run did; where rows pack several sequences, a row here is a sequence.

    Attributes:
        stages: One entry per cut of the latest call that had visual tokens.
        lengths: int64 (num_layers, B): real tokens, without pads, that each layer processed.
        visual_lengths: int64 (num_layers, B): visual tokens among them.
        places: Per row, int64 (V, 4): image, grid, row, column of the call's visual tokens, or -1.
        framing: How an image's grids lie on it, as an adapter says it; None if that is not known.
        newlines: Numbers of the grids of an image whose last column are tokens of no patch.
    """

    def __init__(
        self,
        stages: Sequence[TracedStage] = (),
        framing: str | None = None,
        newlines: tuple[int, ...] = (),
    ) -> None:
        self.framing = framing
        self.newlines = newlines
        self._stages: list[TracedStage] | Callable[[], list[TracedStage]] = list(stages)
        self._lengths: list[list[int]] = []
        self._visual_lengths: list[list[int]] = []
        self._places: list[Tensor] | Callable[[], list[Tensor]] = []

    def renew(
        self,
        stages: Callable[[], list[TracedStage]],
        lengths: list[list[int]],
        visual_lengths: list[list[int]],
        places: Callable[[], list[Tensor]],
    ) -> None:
        """Notes a call: what makes its stages and places, and tokens by layer and row."""
        self._stages, self._places = stages, places
        self._lengths, self._visual_lengths = lengths, visual_lengths

    @property
    def stages(self) -> list[TracedStage]:
        stages = self._stages
        if callable(stages):
            stages = self._stages = stages()
        return stages

    @property
    def lengths(self) -> Tensor:
        return _table(self._lengths)

    @property
    def visual_lengths(self) -> Tensor:
        return _table(self._visual_lengths)

    @property
    def places(self) -> list[Tensor]:
        places = self._places
        if callable(places):
            places = self._places = places()
        return places

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_stages": self.stages, "_places": self.places}


def _table(rows: list[list[int]]) -> Tensor:
    return torch.tensor(rows) if rows else torch.empty(0, 0, dtype=torch.int64)
