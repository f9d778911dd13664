"""A layer's other arguments, for the tokens that are left: mask, rotary embeddings, positions.

Shape suffixes: B batch rows, N positions at a level.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import TensorWeakRef

from tokenprune.engine import masks
from tokenprune.engine.levels import Level
from tokenprune.engine.passes import Pass
from tokenprune.tensors import causal, hide_pads, known_keys, take, to_device

#: Arguments that are replaced here by name.
_OWN_ARGUMENTS = ("attention_mask", "position_embeddings", "position_ids", "hidden_states")


def replace_side_tensors(
    run: Pass,
    number: int,
    module: nn.Module,
    hidden: Tensor,
    named: dict[str, Any],
) -> None:
    """Puts the layer's other arguments in place of those of tokens that are gone."""
    level = run.at(number, hidden.device)
    cut = run.levels[number].columns is not run.levels[0].columns
    if cut or (run.record is not None and run.record.differs(number)):
        named["attention_mask"] = _once(
            level,
            "attention_mask",
            named.get("attention_mask"),
            lambda mask: _mask(run, number, mask, hidden),
        )
    if not cut and level.moved is None:
        return
    index = level.columns - run.offset
    if named.get("position_embeddings") is not None:
        named["position_embeddings"] = _once(
            level,
            "position_embeddings",
            named["position_embeddings"],
            lambda pair: _embeddings(run, level, hidden, pair, index),
        )
    if named.get("position_ids") is not None:
        given = level.positions if level.moved is None else level.moved
        # Gaps would look like several packed sequences to the flash kernel's wrapper.
        gaps = run.settings.anatomy.attention.startswith("flash")
        named["position_ids"] = None if gaps and "position_embeddings" in named else given
    if cut:
        length = run.levels[0].columns.shape[1]
        for name, dim in _token_arguments(run, module, named, length).items():
            value = to_device(named[name], hidden.device)
            named[name] = _once(level, name, value, partial(take, index_BN=index, dim=dim))


def _token_arguments(
    run: Pass, module: nn.Module, named: Mapping[str, Any], length: int
) -> dict[str, int]:
    """The layer's arguments with an entry per token, and in which dimension."""
    known = run.settings.anatomy.adapter.token_arguments
    kind: Any = type(module)
    for name in _parameters(kind):  # others pass through unread
        value = named.get(name)
        if name in _OWN_ARGUMENTS or name in known or not isinstance(value, Tensor):
            continue
        if length > 1 and length in value.shape:
            raise ValueError(
                f"prune: expected layer arguments that are known, got {name!r} of shape "
                f"{tuple(value.shape)} in {type(run.settings.anatomy.config).__name__}. Say in "
                "which dimension its tokens are: Adapter(token_arguments={...})."
            )
    return {name: dim for name, dim in known.items() if isinstance(named.get(name), Tensor)}


@cache
def _parameters(kind: Any) -> tuple[str, ...]:
    return tuple(inspect.signature(kind.forward).parameters)


def _once(level: Level, name: str, original: Any, make: Callable[[Any], Any]) -> Any:
    """A side tensor is made once per level, for every layer that was handed the same one."""
    first = original[0] if isinstance(original, tuple) else original
    known = level.side.get((name, id(first)))
    if known is not None and known[0]() is first:
        return known[1]
    # Weakly: rotary embeddings are what a pass is found by when it is recomputed, and what it must
    # not keep alive. Whether the original lives is asked because identities are used again.
    alive = TensorWeakRef(first) if isinstance(first, Tensor) else lambda: first
    made = make(original)
    level.side[name, id(first)] = (alive, made)
    return made


def visible(
    run: Pass, number: int, holding: int, mask: Any, rows_BQ: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Which keys the asked rows of a level may attend to, as far as the layer's own mask tells.

    Args:
        run: The pass.
        number: Level of the rows.
        holding: Level of the layer's cache.
        mask: What the layer was given, for the whole conversation.
        rows_BQ: int64, positions at the level.

    Returns:
        Bool or additive (B, 1, Q, K), over what the cache holds and then the level's tokens; and
        which of these are no pads, bool (B, K), or None if all are.
    """
    device = rows_BQ.device
    level = run.at(number, device)
    before, held_real = run.held(holding)
    known = None
    if level.real is not None or held_real is not None:
        known = known_keys(level.columns, level.real, before, to_device(held_real, device))
    given = to_device(masks.dense(mask, len(rows_BQ)), device)
    if given is None or (run.is_fixed and run.record is not None):
        # A fixed cache's mask was made by `generate`, by the length of a layer that may be pruned.
        allowed = causal(rows_BQ, before + level.columns.shape[1], before, None)
        return allowed.expand(len(rows_BQ), -1, -1, -1), known
    columns = level.columns
    if run.record is not None:
        columns = torch.cat([run.record.columns(holding).to(device), columns], 1)
    rows = take(given, take(level.columns, rows_BQ) - run.offset, dim=2)
    return take(rows, columns, dim=3), known


def _mask(run: Pass, number: int, mask: Any, hidden: Tensor) -> Any:
    """The attention mask of a level, in the form that the attention implementation reads."""
    level, attention = run.at(number, hidden.device), run.settings.anatomy.attention
    num_rows, length = level.columns.shape
    before, held_real = run.held(number)
    padded = level.real is not None or held_real is not None
    if attention.startswith("flash"):
        if not padded:
            return None  # keeps the fast kernel
        return known_keys(level.columns, level.real, before, to_device(held_real, hidden.device))
    given = mask is not None and not (isinstance(mask, Tensor) and mask.dim() == 2)
    one_by_one = length == 1 and not run.is_fixed
    if attention == "sdpa" and not padded and not given and (before == 0 or one_by_one):
        return None  # keeps the fast kernel
    rows_BQ = torch.arange(length, device=hidden.device).expand(num_rows, -1)
    allowed, known = visible(run, number, number, mask, rows_BQ)
    if known is not None:
        allowed = hide_pads(allowed, known, level.real)
    size = 0
    if run.is_fixed:  # it shows entries not yet filled
        whole = isinstance(mask, Tensor) and mask.dim() == 4
        size = mask.shape[-1] if whole else run.cache.layers[0].max_cache_len
    return masks.form(allowed, attention, hidden.dtype, size)


def note_rotation(run: Pass, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
    """Notes how to get a rotary module's output for other positions."""
    names = [*range(len(args)), *kwargs]
    values = [*args, *kwargs.values()]
    tensors = {n: v.is_floating_point() for n, v in zip(names, values, strict=True)
               if isinstance(v, Tensor)}  # fmt: skip
    others = {n: v for n, v in zip(names, values, strict=True) if n not in tensors}

    def again(hidden: Tensor, positions: Tensor) -> Any:
        filled = others | {n: hidden if floats else positions for n, floats in tensors.items()}
        named = {str(n): v for n, v in filled.items() if not isinstance(n, int)}
        return module(*[filled[n] for n in range(len(args))], **named)

    first = output[0] if isinstance(output, tuple) else output
    run.rotations.append((TensorWeakRef(first), again))


def _embeddings(run: Pass, level: Level, hidden: Tensor, pair: Any, index: Tensor) -> Any:
    """Rotary embeddings of a level: gathered, or made for its own positions."""
    parts = pair if isinstance(pair, tuple) else (pair,)
    if level.moved is not None:
        for made, again in run.rotations:
            if made() is parts[0]:
                return again(hidden, level.moved)
        raise ValueError(
            "prune: expected rotary embeddings that a module of the decoder makes, with "
            'positions="renumbered", got others. Use positions="original".'
        )
    # Most have a batch first; several position axes may stand before it.
    taken = tuple(
        take(
            to_device(part, hidden.device),
            index,
            batch=max(0, part.dim() - 3),
            dim=max(0, part.dim() - 3) + 1,
        )
        for part in parts
    )
    return taken if isinstance(pair, tuple) else taken[0]
