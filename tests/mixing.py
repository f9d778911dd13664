"""A strategy that merges by weights that places decide, so that it can be worked out by hand."""

from __future__ import annotations

from dataclasses import dataclass

import torch

import tokenprune as tp


@dataclass(frozen=True)
class Mixing(tp.PruningStrategy):
    """Keeps an even choice of tokens, each mixed with weights that its place decides."""

    keeps_exactly = True

    def needs(self):
        return (tp.Projected(),)

    def select(self, view, keep):
        number = torch.where(view.valid, view.valid.cumsum(1) - 1, 0)
        count = view.valid.sum(1, keepdim=True).clamp_min(1)
        keep = torch.minimum(keep[:, None], count)
        kept = ((number + 1) * keep // count > number * keep // count) & view.valid
        most = int(kept.sum(1).max())
        place = torch.arange(kept.shape[1])
        weights = ((torch.arange(most)[:, None] * 7 + place * 3) % 5 - 1.0).expand(
            len(kept), -1, -1
        )
        whole = (keep >= count)[..., None]  # a row that loses nothing stays as it is
        weights = torch.where(whole, torch.eye(most, kept.shape[1]), weights / 4)
        assert view.projected.shape == view.hidden.shape
        return tp.Selection(kept, weights=weights)
