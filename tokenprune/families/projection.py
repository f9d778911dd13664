"""Queries and keys of a decoder layer, without running its attention.

Two ways to the same tensors. `ordinary` repeats what LLaMA's layer does, for the asked rows alone.
`captured` runs the layer's own code up to its attention kernel, for all rows, whatever it does on
the way (norms in other places, partial rotation, latent projections). The first time that a layer
is asked, both are run and compared, and again when calls get much longer; in between it is the
cheaper one, if it is right.

Shape suffixes: B batch rows, T sequence positions, Q query rows, H query heads, G key heads,
E head dimension.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from tokenprune.tensors import take

_CAPTURE = "tokenprune_capture"
#: Numbers of which as many take no longer than launching what computes them.
_SHORT = 2**22
#: Rows of a layer's input: int64 (B, Q), or a slice that is the same for all batch rows.
Positions = Tensor | slice


@dataclass(frozen=True)
class QueriesAndKeys:
    """What attention weights are made of.

    Attributes:
        queries: (B, H, Q, E) of the asked rows, rotated.
        keys: (B, G, T, E) of all tokens of the call, rotated.
        scaling: Factor on the logits.
        softcap: Logits are squeezed into (-softcap, softcap) by a tanh, if given.
    """

    queries: Tensor
    keys: Tensor
    scaling: float
    softcap: float | None = None


class Captured(Exception):
    """Carries queries, keys, the factor on the logits, a soft cap and sinks out of an attention."""


def _capture(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any = None, **options: Any
) -> Any:
    raise Captured(query, key, options.get("scaling"), options.get("softcap"), options.get("s_aux"))


AttentionInterface.register(_CAPTURE, _capture)

#: Whether the ordinary way is right for a layer, and for how many tokens that has been seen.
_is_ordinary: WeakKeyDictionary[nn.Module, tuple[bool, int]] = WeakKeyDictionary()


def project(
    layer: nn.Module, hidden: Tensor, rows: Positions, named: Mapping[str, Any]
) -> QueriesAndKeys:
    """Queries of the asked rows and keys of all, as the layer's own attention makes them.

    Args:
        layer: A decoder layer.
        hidden: (B, T, D), what enters it.
        rows: Asked rows.
        named: The layer's other arguments.

    Raises:
        ValueError: If the layer's attention cannot be listened to.
    """
    is_ordinary, seen = _is_ordinary.get(layer, (True, 0))
    # Some scale queries by position, which only long prompts show.
    if is_ordinary and hidden.shape[1] > 2 * seen:
        whole = captured(layer, hidden, slice(None), named)
        own = getattr(layer.self_attn, "config", None)
        is_ordinary = (
            not scales_by_position(layer.self_attn)
            and getattr(own, "clip_qkv", None) is None  # which a short prompt may not show
            # One row and several are rotated in ways of their own.
            and _agrees(layer, hidden, slice(-1, None), named, whole)
            and _agrees(layer, hidden, slice(-2, None), named, whole)
        )
        _is_ordinary[layer] = is_ordinary, hidden.shape[1]
        if not is_ordinary:
            return replace(whole, queries=pick(whole.queries, rows, dim=2))
    way = ordinary if is_ordinary else captured
    return way(layer, hidden, rows, named)


def ordinary(
    layer: nn.Module, hidden: Tensor, rows: Positions, named: Mapping[str, Any]
) -> QueriesAndKeys:
    """As in LLaMA: norm, linear maps, a norm per head where there is one, rotation.

    Modules are called, never their weights read: sharded and offloaded weights are whole only so.
    """
    attention: Any = layer.self_attn
    normed = layer.input_layernorm(hidden)  # type: ignore[operator]
    width = attention.head_dim

    def heads(projected: Tensor, norm: str) -> Tensor:  # (B, T, H * E) -> (B, H, T, E)
        split = projected.view(*projected.shape[:-1], -1, width)
        if getattr(attention, norm, None) is not None:
            split = getattr(attention, norm)(split)
        return split.transpose(1, 2)

    queries = heads(attention.q_proj(pick(normed, rows)), "q_norm")
    keys = heads(attention.k_proj(normed), "k_norm")
    if named.get("position_embeddings") is not None:
        queries, keys = _rotated(attention, queries, keys, rows, named["position_embeddings"])
    return QueriesAndKeys(queries, keys, getattr(attention, "scaling", width**-0.5))


def _rotated(
    attention: nn.Module, queries: Tensor, keys: Tensor, rows: Positions, pair: Any
) -> tuple[Tensor, Tensor]:
    """Queries and keys, rotated by the function of the layer's own module.

    Args:
        attention: The attention module.
        queries: (B, H, Q, E) of the asked rows.
        keys: (B, G, T, E).
        rows: Asked rows.
        pair: Cosines and sines, (B|1, T, E).
    """
    rotate = sys.modules[type(attention).__module__].apply_rotary_pos_emb
    if queries.shape[2] == 1 and queries.numel() * keys.shape[2] <= _SHORT:
        # With the keys at once, to all positions, of which one is its own: half the launches.
        turned, keys = rotate(queries.expand(-1, -1, keys.shape[2], -1), keys, *pair)
        return pick(turned, rows, dim=2), keys
    # It rotates two tensors: the one that is not needed has no head.
    queries, _ = rotate(queries, queries[:, :0], *(pick(table, rows) for table in pair))
    keys, _ = rotate(keys, keys[:, :0], *pair)
    return queries, keys


def captured(
    layer: nn.Module, hidden: Tensor, rows: Positions, named: Mapping[str, Any]
) -> QueriesAndKeys:
    """What the layer hands to its attention kernel, which is not run; nothing is cached."""
    attention: Any = getattr(layer, "self_attn", None)
    config = getattr(attention, "config", None)
    if attention is None or config is None:
        raise _deaf(layer)
    # Shallow copies: the model itself, which other threads may be running, stays as it is.
    own_layer = _shallow(layer)
    own_layer._modules = {**layer._modules, "self_attn": listening(attention)}
    arguments = {**named, "past_key_values": None, "use_cache": False}
    try:
        type(layer).forward(own_layer, hidden, **arguments)
    except Captured as heard:
        queries, keys, scaling, softcap, sinks = heard.args
    else:
        raise _deaf(layer)
    if sinks is not None:
        raise ValueError(
            f"prune: expected attention without sinks, got {type(attention).__name__}. "
            "Choose a strategy that reads no attention."
        )
    scaling = keys.shape[-1] ** -0.5 if scaling is None else scaling
    return QueriesAndKeys(pick(queries, rows, dim=2), keys, scaling, softcap)


def listening(attention: Any) -> Any:
    """A shallow copy of an attention module, which raises `Captured` where its kernel would run."""
    own = _shallow(attention)
    own.config = copy.copy(attention.config)
    # Not by its setter, which reaches into configs that the copy shares.
    own.config._attn_implementation_internal = _CAPTURE
    return own


def pick(values: Tensor, rows: Positions, dim: int = 1) -> Tensor:
    """The asked rows along a dimension."""
    if isinstance(rows, slice):
        return values[(slice(None),) * dim + (rows,)]
    return take(values, rows, dim=dim)


def scales_by_position(attention: Any) -> bool:
    """Whether an attention module scales its queries by where they stand (Llama 4, Ministral 3)."""
    config = getattr(attention, "config", None)
    rope = getattr(config, "rope_parameters", None) or {}
    return "llama_4_scaling_beta" in rope or bool(getattr(config, "attn_temperature_tuning", 0))


def _shallow(module: nn.Module) -> Any:
    """A shallow copy, made past the class's own `__new__`: FSDP2's makes a module from nothing."""
    own = object.__new__(type(module))
    own.__dict__ = dict(module.__dict__)
    return own


def _agrees(
    layer: nn.Module,
    hidden: Tensor,
    rows: Positions,
    named: Mapping[str, Any],
    whole: QueriesAndKeys,
) -> bool:
    try:
        ours = ordinary(layer, hidden, rows, named)
    except (AttributeError, TypeError, ValueError, RuntimeError):
        return False
    if whole.softcap is not None or ours.scaling != whole.scaling:
        return False
    tolerance = 1e-4 if hidden.dtype == torch.float32 else 2e-2
    return all(
        a.shape == b.shape and torch.allclose(a, b, rtol=tolerance, atol=tolerance)
        for a, b in ((ours.queries, pick(whole.queries, rows, dim=2)), (ours.keys, whole.keys))
    )


def _deaf(layer: nn.Module) -> ValueError:
    return ValueError(
        f"prune: expected an attention module that calls transformers' AttentionInterface, got "
        f"{type(getattr(layer, 'self_attn', layer)).__name__}. Choose a strategy that reads no "
        "attention, or give the family a `project` of its own with register_adapter."
    )
