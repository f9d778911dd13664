"""Greedy maximum coverage: SCOPE and MMTok pick what covers best what is not covered yet.

Shape suffixes: B batch rows, V visual tokens alive, U tiles of all rows, L tokens of one, R what
is to be covered.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tokenprune.tensors import mark, take


def cover(
    covers_URL: Tensor,
    worth_UL: Tensor | None,
    alike_UL: Tensor,
    exists_UL: Tensor,
    target_U: Tensor,
    rounds: int,
) -> Tensor:
    """Picks the token that adds most, again and again; the first of equal ones.

    What a token adds is the sum over r of how much better than by those picked r is covered, times
    its worth.

    Args:
        covers_URL: How well a token covers each of R things, from 0 on; at most that counts less.
        worth_UL: From 0 on, or None where all are worth the same.
        alike_UL: int64, the first token that is equal to each, whose sum counts for all of them.
        exists_UL: Bool, which tokens there are.
        target_U: int64, how many to pick.
        rounds: The most of any tile, known without asking the device.

    Returns:
        Bool (U, L), which are picked.
    """
    reached_UR = covers_URL.new_zeros(covers_URL.shape[:2])
    open_UL, picks = exists_UL, []
    for _ in range(rounds):
        gain_UL = (covers_URL - reached_UR[..., None]).clamp_min(0).sum(1).gather(1, alike_UL)
        gain_UL = gain_UL if worth_UL is None else gain_UL * worth_UL
        pick_U1 = gain_UL.masked_fill(~open_UL, -torch.inf).argmax(1, keepdim=True)
        picks.append(pick_U1)
        open_UL = open_UL.scatter(1, pick_U1, False)
        reached_UR = torch.maximum(reached_UR, take(covers_URL, pick_U1, dim=2)[..., 0])
    return mark(picks, target_U, exists_UL)


def directions(values: Tensor) -> Tensor:
    """Float vectors of length 1; of what is no number, 0."""
    sound = values.isfinite().all(-1, keepdim=True)
    return torch.nn.functional.normalize(values.masked_fill(~sound, 0), dim=-1)
