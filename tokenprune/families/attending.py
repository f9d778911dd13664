"""The forms of a vision tower's attention: what its weights are made of.

Where a projection's output is all there is to it, that is taken as the layer made it; elsewhere the
attention's own code is run once more, up to its kernel, with whatever norms and rotations it has.

Shape suffixes: N sequences that attend to themselves (tiles, frames, windows), L positions of one,
P patches, H heads, G key heads, E head dimension, C channels.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from tokenprune.families.projection import Captured, listening


@dataclass(frozen=True, eq=False)
class Attending:
    """What a tower's attention weights are made of.

    Attributes:
        queries: (N, H, L, E).
        keys: (N, G, L, E).
        scaling: Factor on the logits.
        valid: Bool (N, L), which positions are no padding; None for all.
    """

    queries: Tensor
    keys: Tensor
    scaling: float
    valid: Tensor | None = None

    def as_one_head(self) -> Attending:
        """The same with all heads side by side as one."""
        times = self.queries.shape[1] // self.keys.shape[1]
        queries, keys = (
            heads.transpose(1, 2).flatten(2)[:, None]
            for heads in (self.queries, self.keys.repeat_interleave(times, 1))
        )
        return replace(self, queries=queries, keys=keys, scaling=keys.shape[-1] ** -0.5)


#: (attention, its arguments, what its projections gave as queries and as keys, if they were heard)
#: -> what its weights are made of, as it has just run. Of a packed sequence, N is 1.
Form = Callable[[Any, Mapping[str, Any], "Tensor | None", "Tensor | None"], Attending]


def separate(
    attention: Any, named: Mapping[str, Any], queries: Tensor | None, keys: Tensor | None
) -> Attending:
    """Of projections (N, L, C), with nothing in between."""

    def heads(values: Tensor) -> Tensor:  # (N, L, H * E) -> (N, H, L, E)
        return values.view(*values.shape[:2], attention.num_heads, -1).transpose(1, 2)

    assert queries is not None
    assert keys is not None
    return Attending(heads(queries), heads(keys), attention.scale)


def fused(
    attention: Any, named: Mapping[str, Any], queries: Tensor | None, keys: Tensor | None
) -> Attending:
    """Of one projection (P, 3 * C) of a packed sequence, rotated."""
    assert keys is not None
    split = keys.view(len(keys), 3, attention.num_heads, -1)  # (P, 3, H, E)
    rotate = sys.modules[type(attention).__module__].apply_rotary_pos_emb_vision
    rotated = rotate(split[:, 0], split[:, 1], *named["position_embeddings"])
    own_queries, own_keys = (values.transpose(0, 1)[None] for values in rotated)
    return Attending(own_queries, own_keys, attention.scaling)


def captured(
    attention: Any, named: Mapping[str, Any], queries: Tensor | None, keys: Tensor | None
) -> Attending:
    """What the attention hands to its kernel, which is not run.

    Raises:
        ValueError: If it hands nothing to transformers' AttentionInterface.
    """
    given = dict(named)
    if "cu_seqlens" in inspect.signature(type(attention).forward).parameters:
        # As one run: it would hand them over one by one.
        given["cu_seqlens"] = torch.tensor([0, named["hidden_states"].shape[-2]])
    try:
        type(attention).forward(listening(attention), **given)
    except Captured as heard:
        own_queries, own_keys, scaling, _, _ = heard.args
    else:
        raise ValueError(
            "prune: expected a vision tower that calls transformers' AttentionInterface, got "
            f"{type(attention).__name__}. Choose a strategy that does not read the tower."
        )
    scaling = own_keys.shape[-1] ** -0.5 if scaling is None else scaling
    return Attending(own_queries, own_keys, scaling)


def in_runs(attending: Attending, lengths: Tensor) -> Attending:
    """Of one packed sequence (1, H, P, E): each of its runs as a sequence, filled up with padding.

    Args:
        attending: Of the whole.
        lengths: int64 (N,), of the runs, on the host.
    """
    device = attending.keys.device
    starts = lengths.cumsum(0) - lengths
    order_L = torch.arange(int(lengths.max()))
    last = attending.keys.shape[2] - 1
    index_NL = (starts[:, None] + order_L).clamp_max(last).to(device)

    def runs(values: Tensor) -> Tensor:  # (1, H, P, E) -> (N, H, L, E)
        return values[0][:, index_NL].transpose(0, 1)

    valid = None
    if bool((lengths != lengths[0]).any()):
        valid = (order_L < lengths[:, None]).to(device)
    return Attending(runs(attending.queries), runs(attending.keys), attending.scaling, valid)


def of_fused(attention: Any, what: str, projected: Tensor) -> Tensor:
    """Queries or keys, (..., C), of one projection that gives them side by side, and values.

    Args:
        attention: The module.
        what: `"queries"` or `"keys"`.
        projected: What the projection gave.
    """
    width = projected.shape[-1]
    own = getattr(attention, "q_dim", width // 3)
    start, stop = (0, own) if what == "queries" else (own, own + (width - own) // 2)
    return projected[..., start:stop]
