"""A layer's other arguments, for the tokens that are left: mask, rotary embeddings, positions.

Shape suffixes: B batch rows, N positions at a level, Q query rows, K keys.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import TensorWeakRef

from tokenprune.engine import masks
from tokenprune.engine.caches import is_fixed
from tokenprune.engine.levels import Level
from tokenprune.engine.packing import check_cache, packed
from tokenprune.engine.passes import Asked, Pass, Rotation
from tokenprune.engine.record import Record
from tokenprune.tensors import causal, hide_pads, take, to_device

_ROTARY = "position_embeddings"
#: Arguments that are replaced here by name, and those that are no tensors.
_KNOWN = {
    *("attention_mask", "position_embeddings", "position_ids", "hidden_states"),
    *("past_key_values", "use_cache", "output_attentions", "output_router_logits"),
}
#: What tells the flash kernels' wrapper where sequences end.
_ENDS = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")


def note_positions(run: Pass, named: Mapping[str, Any], device: torch.device, layer: int) -> None:
    """Notes the model's positions, as the first hooked layer shows them."""
    given = named.get("position_ids")
    num_rows, length = run.rows.shape
    if given is None:
        given = torch.arange(length, device=device)[None] + _before(run, layer)
    given = given[0] if given.dim() > 2 else given
    given = given.expand(num_rows, -1)
    # A view would keep alive the tensor by which a recomputed layer finds its pass.
    run.positions = run.apart(given if "position_embeddings" in named else given.clone(), 0)


def _before(run: Pass, layer: int) -> Any:
    """Tokens of the conversation before a pass, when it comes to a layer; a fixed cache counts."""
    if run.record is None or not is_fixed(run.cache):
        return run.offset
    gone = run.record.num_columns - run.record.length(run.settings.level_of[layer])
    return run.cache.layers[layer].get_seq_length() + gone


def check_packed(run: Pass, named: Mapping[str, Any]) -> None:
    """Refuses rows of several sequences that layers cache, or do not keep apart.

    Positions say so to the decoder, if it hands them on to its layers; those then get a mask that
    is made of them, or read them themselves (flash).
    """
    packing = run.rows.packing
    if packing is None:
        return
    check_cache(packing, named.get("past_key_values"))
    shown = named.get("position_ids") is not None or not packing.by_positions
    if run.attention.startswith("flash"):
        apart = packing.by_positions
    else:
        apart = named.get("attention_mask") is not None
    if not (shown and apart):
        raise packed(
            f"several that {type(run.settings.anatomy.decoder).__name__} does not keep apart",
            "Pass position_ids that start anew (before them, where they have several axes, those "
            "of the text) and no attention_mask; or sequences as rows of a batch, with padding.",
        )


def renumber(run: Pass, number: int, device: torch.device) -> None:
    """Counts the positions of a level anew, if its layers do not use the model's."""
    level, shift = run.levels[number], None
    if not run.settings.renumbers or level.moved is not None:
        return
    device = level.device or device  # one that was made ahead may be used first on another
    if run.record is not None:
        shift = to_device(run.record.shifts(number), device)
    if shift is None and level.columns is None:
        return
    if run.rows.in_order and level.real is None:
        level.moved = run.plan_on(device).order[: level.length].expand(len(level.num_real), -1)
        gone = run.rows.shape[1] - level.length
        level.shift = torch.full((len(level.num_real), 1), gone, device=device)
        level.device = device
    else:
        assert run.positions is not None
        positions, first = to_device(run.positions, device), run.at(0, device)
        level.renumber(first, positions, shift, start=run.record is None)
    # Copies made before, on the devices of other layers, know nothing of it.
    run.copies = {key: copy for key, copy in run.copies.items() if key[0] != number}


def follow(
    run: Pass, number: int, module: nn.Module, hidden: Tensor, named: Mapping[str, Any]
) -> dict[str, Any]:
    """A layer's other arguments, with those of the tokens that are left in place of all tokens'.

    Args:
        run: The pass.
        number: Level of the layer.
        module: The layer.
        hidden: (B, N, D), what enters it.
        named: What it was handed.
    """
    # By what layers that get the same are known: those that say where they run stand alone.
    given = type(module), vars(module).get("_hf_hook"), *named, *named.values()
    return dict(_once(run, number, given, _own, run, number, module, hidden, named))


def _own(
    run: Pass, number: int, module: nn.Module, hidden: Tensor, named: Mapping[str, Any]
) -> dict[str, Any]:
    """What a layer of a level gets for what it was handed."""
    if run.settings.renumbers:
        renumber(run, number, hidden.device)
    level, made = run.laid(number, hidden.device), dict(named)
    cut = level.columns is not None
    if cut or (run.record is not None and run.record.differs(number)):
        mask = named.get("attention_mask")
        given = "attention_mask", mask
        made["attention_mask"] = _once(run, level, given, _mask, run, number, mask, hidden)
    if not cut and level.moved is None:
        return made
    pair, positions = named.get(_ROTARY), named.get("position_ids")
    if pair is not None:
        first = pair[0] if isinstance(pair, tuple) else pair
        given = _ROTARY, first
        made[_ROTARY] = _once(run, level, given, _embeddings, run, level, hidden, pair)
    if positions is not None:
        # Gaps would look like several packed sequences to the flash kernel's wrapper.
        gaps = run.attention.startswith("flash") and pair is not None
        given = "position_ids", positions
        made["position_ids"] = (
            None if gaps else _once(run, level, given, _positions, run, level, positions)
        )
    if cut and run.attention.startswith("flash"):
        made |= _ends(run, number, named, hidden.device)
    if cut:
        made |= _others(run, level, module, named)
    return made


def _once(
    run: Pass, where: Any, given: tuple[Any, ...], make: Callable[..., Any], *args: Any
) -> Any:
    """What is made once per level, for every layer that is handed the very same things.

    It lives as long as the layers run. A layer that is computed anew makes its own: by what it is
    handed its pass is found, which must not keep it alive.
    """
    for old, made in run.made.get(where, ()):
        if len(old) == len(given) and all(map(operator.is_, old, given)):
            return made
    made = make(*args)
    if run.open:
        run.made.setdefault(where, []).append((given, made))
    return made


def _others(run: Pass, level: Level, module: nn.Module, named: Mapping[str, Any]) -> dict[str, Any]:
    """Those of a layer's other arguments that have an entry per token, of the tokens left."""
    known, length = run.settings.anatomy.adapter.token_arguments, run.rows.shape[1]
    kind: Any = type(module)
    for name in _parameters(kind):  # others pass through unread
        value = named.get(name)
        if isinstance(value, Tensor) and name not in known and length > 1 and length in value.shape:
            raise ValueError(
                f"prune: expected layer arguments that are known, got {name!r} of shape "
                f"{tuple(value.shape)} in {type(run.settings.anatomy.config).__name__}. Say in "
                "which dimension its tokens are: Adapter(token_arguments={...})."
            )
    assert level.columns is not None
    made = {}
    for name, dim in known.items():
        value = named.get(name)
        if isinstance(value, Tensor):
            value = to_device(value, level.columns.device)
            index = partial(take, dim=dim)
            made[name] = _once(run, level, (name, value), index, value, level.columns)
    return made


def _ends(run: Pass, number: int, named: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """Where sequences end in a lone row, as the flash kernels' wrapper takes it."""
    if run.rows.packing is None:  # of one sequence it needs none
        return {name: None for name in _ENDS if named.get(name) is not None}
    layout = run.layout(number, device)
    values = (layout.ends, layout.ends, layout.longest, layout.longest)
    return dict(zip(_ENDS, values, strict=True))


def asked_apart(run: Pass, number: int, asked: Asked) -> Asked:
    """A layer that is asked; of packed rows as if it ran on each sequence by itself."""
    if run.rows.packing is None:
        return asked
    device, named = asked.hidden.device, dict(asked.named)

    def apart(value: Tensor, batch: int, dim: int) -> Tensor:
        return run.apart(to_device(value, device), number, batch=batch, dim=dim)

    for name, dims in (("position_embeddings", 3), ("position_ids", 2)):  # axes may stand before
        if (value := named.get(name)) is not None:
            parts = value if isinstance(value, tuple) else (value,)
            axes = [max(0, part.dim() - dims) for part in parts]
            own = tuple(apart(*pair, pair[1] + 1) for pair in zip(parts, axes, strict=True))
            named[name] = own if isinstance(value, tuple) else own[0]
    for name, dim in run.settings.anatomy.adapter.token_arguments.items():
        if isinstance(named.get(name), Tensor):
            named[name] = apart(named[name], 0, dim)
    mask = masks.dense(asked.mask, run.rows.shape[0])
    if mask is not None:
        mask = run.apart(to_device(mask, device), 0, dim=2)
        mask = take(mask, run.layout(0, device).seats % run.rows.shape[1], dim=3)
    hidden = apart(asked.hidden, 0, 1)
    return replace(asked, hidden=hidden, named=named | {"attention_mask": None}, mask=mask)


def _positions(run: Pass, level: Level, given: Tensor) -> Tensor:
    """Position ids of a level, int64 (B, N)."""
    if level.moved is not None:
        return level.moved
    assert level.columns is not None
    given = to_device(given[0] if given.dim() > 2 else given, level.columns.device)
    return take(given, level.columns)


@cache
def _parameters(kind: Any) -> tuple[str, ...]:
    """Names of a layer's arguments that may be tensors with an entry per token."""
    named = inspect.signature(kind.forward).parameters.values()
    return tuple(p.name for p in named if p.kind is not p.VAR_KEYWORD and p.name not in _KNOWN)


# ------------------------------------------------------------------------------------------- masks


def known_keys(
    run: Pass, level: Level, holding: int, mask: Any, device: torch.device
) -> Tensor | None:
    """Which keys are real, bool (B, K): those held from before, then the level's; None if all.

    Args:
        run: The pass.
        level: That of the rows that ask.
        holding: Level of the layer's cache.
        mask: What the layer was given. One over columns (flash) may hide what nobody has noted:
            of a token alone it is not asked whether it is a pad.
        device: The layer's.
    """
    held = None if run.record is None else run.record.known(holding, device)
    shown = None
    if run.record is not None and isinstance(mask, Tensor) and mask.dim() == 2:
        shown = take(to_device(mask, device).bool(), _key_columns(run, level, holding, device))
    if level.real is None and held is None:
        return shown
    num_rows, before = len(level.num_real), run.held(holding)
    parts = [
        torch.ones(num_rows, size, dtype=torch.bool, device=device) if part is None else part
        for part, size in ((held, before), (level.real, level.length))
    ]
    known = torch.cat(parts, 1)
    return known if shown is None else known & shown


def _columns(level: Level, device: torch.device) -> Tensor:
    """Columns of a level's tokens in the call, int64 (B, N)."""
    if level.columns is not None:
        return level.columns
    return torch.arange(level.length, device=device).expand(len(level.num_real), -1)


def _key_columns(run: Pass, level: Level, holding: int, device: torch.device) -> Tensor:
    """Columns of a layer's keys in the conversation, int64 (B, K)."""
    columns = _columns(level, device)
    if run.record is None:
        return columns
    return torch.cat([run.record.columns(holding, device), columns + run.offset], 1)


def allowed_keys(
    run: Pass, level: Level, holding: int, mask: Any, device: torch.device
) -> Callable[[Tensor], Tensor]:
    """Which keys rows of a level may attend to, as far as the layer's own mask tells.

    Args:
        run: The pass.
        level: That of the rows.
        holding: Level of the layer's cache.
        mask: What the layer was given, for the whole conversation.
        device: The layer's.

    Returns:
        Of rows, int64 (B, Q), positions at the level: bool or additive (B, 1, Q, K), over what
        the cache holds and then the level's tokens.
    """
    num_rows, before = len(level.num_real), run.held(holding)
    given = to_device(masks.dense(mask, num_rows), device)
    if given is None:
        num_keys = before + level.length
        return lambda rows_BQ: causal(rows_BQ, num_keys, before).expand(num_rows, -1, -1, -1)
    columns = _columns(level, device)
    keys = _key_columns(run, level, holding, device)

    def allowed(rows_BQ: Tensor) -> Tensor:
        return take(take(given, take(columns, rows_BQ), dim=2), keys, dim=3)

    return allowed


def _mask(run: Pass, number: int, mask: Any, hidden: Tensor) -> Any:
    """The attention mask of a level, in the form that the attention implementation reads."""
    device, attention = hidden.device, run.attention
    level, fixed = run.laid(number, device), is_fixed(run.cache)
    if fixed and run.record is not None and level.length == 1 and not attention.startswith("flash"):
        return _mask_of_step(run, run.record, level, number, mask, hidden)
    before = run.held(number)
    known = known_keys(run, level, number, mask, device)
    if attention.startswith("flash"):
        if fixed and known is None:  # a mask's length says how much of the cache is filled
            filled = before + level.length
            known = torch.ones(len(level.num_real), filled, dtype=torch.bool, device=device)
        return known  # None keeps the fast kernel
    given = mask is not None and not (isinstance(mask, Tensor) and mask.dim() == 2)
    # Without a mask, the kernel lets one token see all keys, and several see those before them.
    implied = not fixed if level.length == 1 else before == 0
    if attention == "sdpa" and known is None and not given and implied:
        return None  # keeps the fast kernel
    num_rows = len(level.num_real)
    every_BQ = torch.arange(level.length, device=device).expand(num_rows, -1)
    allowed = allowed_keys(run, level, number, mask, device)(every_BQ)
    if known is not None:
        allowed = hide_pads(allowed, known, level.real)
    size = 0
    if fixed:  # it shows entries not yet filled
        whole = isinstance(mask, Tensor) and mask.dim() == 4
        size = mask.shape[-1] if whole else run.cache.layers[0].max_cache_len
    return masks.form(allowed, attention, hidden.dtype, size)


def _mask_of_step(
    run: Pass, record: Record, level: Level, number: int, mask: Any, hidden: Tensor
) -> Any:
    """The mask of one token more over a cache of fixed size: nothing in it is a number of the host.

    So that a compiled step is the same at every one.
    """
    device, held = hidden.device, record.held[number]
    columns_BK, known = to_device(held.slots, device), to_device(held.exists, device)
    assert columns_BK is not None
    own = run.cache.layers[run.settings.level_of.index(number)]
    given = to_device(masks.dense(mask, len(columns_BK)), device)
    size = own.max_cache_len if given is None else given.shape[3]
    # Before any of the level's layers adds to it. Some may have fewer entries than others.
    order = torch.arange(columns_BK.shape[1], device=device)
    filled = _once(run, level, ("filled",), lambda: order <= own.get_seq_length())
    columns_BK = columns_BK[:, :size]
    filled = filled[:size].expand_as(columns_BK)
    if known is not None:
        filled = filled & known[:, :size]
    if given is None:
        return masks.form(filled[:, None, None], run.attention, hidden.dtype, size)
    # Text that a mask is too short for, since layers hold less than the conversation, is open.
    shown = take(given, columns_BK.clamp_max(size - 1), dim=3)
    opened = (columns_BK >= size)[:, None, None]
    shown = shown | opened if shown.dtype == torch.bool else shown.masked_fill(opened, 0)
    return masks.form(hide_pads(shown, filled, None), run.attention, hidden.dtype, size)


# ----------------------------------------------------------------------------- rotary embeddings


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
        return module.forward(*[filled[n] for n in range(len(args))], **named)

    first = output[0] if isinstance(output, tuple) else output
    kind = getattr(module, "rope_type", None)  # of others' modules nothing is known
    by_longest = kind is None or any(name in str(kind) for name in ("dynamic", "longrope"))
    outlives = run.settings.anatomy.decoder.training  # by this tensor the pass is found then
    run.rotations.append(
        Rotation(TensorWeakRef(first) if outlives else lambda: first, again, by_longest)
    )


def _embeddings(run: Pass, level: Level, hidden: Tensor, pair: Any) -> Any:
    """Rotary embeddings of a level: gathered, or made for its own positions."""
    parts = pair if isinstance(pair, tuple) else (pair,)
    if level.moved is not None:
        return _rotated(run, level, hidden, pair, parts[0])
    assert level.columns is not None
    # Most have a batch first; several position axes may stand before it.
    taken = tuple(
        take(
            to_device(part, hidden.device),
            level.columns,
            batch=max(0, part.dim() - 3),
            dim=max(0, part.dim() - 3) + 1,
        )
        for part in parts
    )
    return taken if isinstance(pair, tuple) else taken[0]


def _rotated(run: Pass, level: Level, hidden: Tensor, pair: Any, first: Tensor) -> Any:
    """Rotary embeddings for a level's own positions."""
    known = next((known for known in run.rotations if known.made() is first), None)
    several = isinstance(pair, tuple)
    if known is None:
        raise ValueError(
            "prune: expected rotary embeddings that a module of the decoder makes, with "
            'positions="renumbered", got others. Use positions="original".'
        )
    assert level.moved is not None
    if run.rows.in_order and level.real is None and not known.by_longest:
        # The first of all positions: how these are turned, the model has made.
        parts = tuple(part[:, : level.length] for part in (pair if several else (pair,)))
        return parts if several else parts[0]
    if run.prunes or known.by_longest:
        return known.again(hidden, level.moved)
    # Nothing is cut: the positions of all levels are known, and are turned at once.
    moved = {id(level): level.moved}
    for number, other in enumerate(run.levels):
        shift = None if run.record is None else run.record.shifts(number)
        if shift is not None and shift.device == hidden.device:
            renumber(run, number, hidden.device)
            assert other.moved is not None
            moved[id(other)] = other.moved
    made = known.again(hidden, torch.cat([*moved.values()]))
    parts = made if isinstance(made, tuple) else (made,)
    num_rows = len(level.num_real)
    if any(part.shape[0] != num_rows * len(moved) for part in parts):
        return known.again(hidden, level.moved)
    by_level = zip(*(part.split(num_rows) for part in parts), strict=True)
    turned = dict(zip(moved, by_level, strict=True))
    for other in run.levels:
        if other is not level and id(other) in turned and run.open:
            own = turned[id(other)] if isinstance(made, tuple) else turned[id(other)][0]
            run.made.setdefault(other, []).append(((_ROTARY, first), own))
    return turned[id(level)] if isinstance(made, tuple) else turned[id(level)][0]
