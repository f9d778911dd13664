"""What a layer says to a strategy: attention it pays the visual tokens, its keys, what enters it.

Shape suffixes: B batch rows, V visual tokens alive, N positions at a level, Q query rows, K keys,
H heads.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn

from tokenprune.engine.passes import Asked, Pass
from tokenprune.engine.side import allowed_keys, known_keys
from tokenprune.families.anatomy import has_device
from tokenprune.families.projection import Positions, QueriesAndKeys
from tokenprune.strategy import Change, DecoderKeys, DecoderRows
from tokenprune.tensors import attention_rows, hide_pads, single_precision, take, to_device

#: Bytes of float32 attention weights that one chunk of query rows may take.
CHUNK_BYTES = 2**27


def hear(
    run: Pass, number: int, asked: Asked, request: DecoderRows | DecoderKeys | Change
) -> Tensor | tuple[Tensor, Tensor]:
    """What a strategy asks of a layer: attention, keys of visual tokens and text, what enters."""
    if isinstance(request, DecoderRows):
        return attend(run, number, asked, request)
    if isinstance(request, Change):
        return take(asked.hidden, run.at(number, asked.hidden.device).seats()).detach()
    return keys(run, number, asked)


def keys(run: Pass, number: int, asked: Asked) -> tuple[Tensor, Tensor]:
    """Keys of a layer, (B, V, G, E) of the visual tokens and (B, S, G, E) of the prompt's text.

    Args:
        run: The pass.
        number: Level of the tokens.
        asked: The layer.
    """
    device = asked.hidden.device
    plan, level = run.plan_on(device), run.at(number, device)
    own = _project(run, asked, slice(-1, None)).keys.transpose(1, 2)  # (B, T, G, E)
    assert plan.prompt is not None
    text_BS = level.find(plan.prompt).clamp(0, level.length - 1)
    return take(own, level.seats()), take(own, text_BS)


def attend(run: Pass, number: int, asked: Asked, request: DecoderRows) -> Tensor:
    """Attention (B, H, V) of a layer to the visual tokens, mean over the asked query rows.

    Text rows stay apart, (B, H, S, V).

    Args:
        run: The pass.
        number: Level of the tokens.
        asked: The layer.
        request: Which rows.
    """
    device = asked.hidden.device
    level = run.at(number, device)
    rows, weights_BQ = _rows(run, number, request, device)
    projected = _project(run, asked, rows)
    keys = projected.keys
    holding = run.settings.level_of[asked.layer]  # at a cut, the cache is one level further
    before = run.held(holding)
    if before:
        keys = torch.cat([_held_keys(run, asked.layer, before, keys), keys], 2)
    seats_BV = level.seats()
    seats_BV = seats_BV + before if before else seats_BV
    apart = request.queries == "text"
    parts: list[Tensor] = []
    with single_precision(device):
        if weights_BQ is None and _sees_all(run, number, holding, asked):
            part = attention_rows(projected.queries, keys, None, projected.scaling,
                                  projected.softcap)[:, :, 0]  # fmt: skip
            return take(part, seats_BV, dim=2)
        rows_BQ = rows if isinstance(rows, Tensor) else _last(level.length, run, device)
        allowed_of = allowed_keys(run, level, holding, asked.mask, device)
        known = known_keys(run, level, holding, asked.mask, device)
        total: Tensor | None = None
        num_rows, num_heads = projected.queries.shape[:2]
        chunk = max(1, CHUNK_BYTES // (4 * num_rows * num_heads * keys.shape[2]))
        for start in range(0, rows_BQ.shape[1], chunk):
            allowed = allowed_of(rows_BQ[:, start : start + chunk])
            if known is not None:
                allowed = hide_pads(allowed, known, None)
            attention = attention_rows(
                projected.queries[:, :, start : start + chunk],
                keys,
                allowed,
                projected.scaling,
                projected.softcap,
            )
            if weights_BQ is None:
                total = attention[:, :, 0]
                continue
            weights = weights_BQ[:, start : start + chunk]
            if apart:
                parts.append(take(attention, seats_BV, dim=3) * weights[:, None, :, None])
                continue
            part = torch.einsum("bhqk,bq->bhk", attention, weights)
            total = part if total is None else total + part
        if apart:
            return torch.cat(parts, 2)
        assert total is not None
        return take(total, seats_BV, dim=2)


def _project(run: Pass, asked: Asked, rows: Positions) -> QueriesAndKeys:
    """Queries of the asked rows and keys of all, as the layer makes them."""
    named, device = asked.named, asked.hidden.device
    if has_device(asked.module):
        named = {name: to_device(value, device) for name, value in named.items()}
    with _without_dropout(asked.module) if asked.module.training else nullcontext():
        return run.settings.anatomy.adapter.project(asked.module, asked.hidden, rows, named)


def _rows(
    run: Pass, number: int, request: DecoderRows, device: torch.device
) -> tuple[Positions, Tensor | None]:
    """Positions that ask, at a level, and their weights (B, Q); None where one asks in each row.

    Of text rows, which stay apart, the weights say which exist.
    """
    level, plan = run.at(number, device), run.plan_on(device)
    num_rows = len(level.num_real)
    if request.queries == "all":
        asking = level.length - run.rows.guesses
        every_BQ = torch.arange(asking, device=device).expand(num_rows, -1)
        if level.real is None:
            return every_BQ, torch.full_like(every_BQ, 1 / asking, dtype=torch.float32)
        weights = level.real[:, :asking].float()
        return every_BQ, weights / weights.sum(1, keepdim=True).clamp_min(1)
    if request.queries == "text":
        assert plan.prompt is not None
        assert plan.num_prompt is not None
        exists_BS = torch.arange(plan.prompt.shape[1], device=device) < plan.num_prompt
        return level.find(plan.prompt).clamp(0, level.length - 1), exists_BS.float()
    if run.rows.asks_at_its_end:
        return slice(-1, None), None
    if max(run.rows.num_asking) == 0:
        return slice(-1, None), torch.zeros(num_rows, 1, dtype=torch.float32, device=device)
    asking_BQ = plan.asking
    exists_BQ = torch.arange(asking_BQ.shape[1], device=device) < plan.num_asking
    weights = exists_BQ.float() / plan.num_asking.clamp_min(1)
    rows_BQ = level.find(asking_BQ)
    if not run.rows.visual_asks or level.columns is None:
        return rows_BQ, weights
    # A row that asks may be a visual token, and go: the others count on, or else the last token
    # before guesses.
    rows_BQ = rows_BQ.clamp_max(level.length - 1)
    weights = weights * (take(level.columns, rows_BQ) == asking_BQ)
    total_B1 = weights.sum(1, keepdim=True)
    gone_B1 = (total_B1 == 0) & (plan.num_asking > 0)
    first_BQ = torch.arange(asking_BQ.shape[1], device=device) == 0
    last_B1 = (_last(level.length, run, device, number) - run.rows.guesses).clamp_min(0)
    rows_BQ = torch.where(gone_B1 & first_BQ, last_B1, rows_BQ)
    weights = torch.where(gone_B1, first_BQ.float(), weights / total_B1.clamp_min(1e-9))
    return rows_BQ, weights


def _last(length: int, run: Pass, device: torch.device, number: int | None = None) -> Tensor:
    """Position of the last token of each row at a level, int64 (B, 1); 0 in a row of pads."""
    level = None if number is None else run.at(number, device)
    if level is None or level.real is None or level.pads_left:
        return torch.full((len(run.rows.num_real), 1), length - 1, device=device)
    return (level.real.sum(1, keepdim=True) - 1).clamp_min(0)


def _sees_all(run: Pass, number: int, holding: int, asked: Asked) -> bool:
    """Whether the last position of each row attends to all keys, as far as the host can tell."""
    level = run.levels[number]
    mask = asked.mask
    record = run.record
    over_columns = isinstance(mask, Tensor) and mask.dim() == 2
    given = mask is not None and not (over_columns and record is None)
    padded = level.real is not None or (
        record is not None and (record.real is not None or record.held[holding].ragged)
    )
    return not given and not padded


def _held_keys(run: Pass, layer: int, before: int, keys: Tensor) -> Tensor:
    """Keys that a layer's cache holds from before the pass, (B, G, before, E)."""
    held: Tensor = run.cache.layers[layer].keys
    held = held[:, :, :before] if held.dim() == 4 else held
    if held.shape[1:] != (keys.shape[1], before, keys.shape[3]):
        raise ValueError(
            "prune: expected a cache of keys as they are attended to, for attention in a "
            f"later turn, got {type(run.cache.layers[layer]).__name__} with entries of "
            f"shape {tuple(held.shape)}. Choose another cache, or a strategy that reads no "
            "attention."
        )
    return held.to(keys.dtype)


@contextmanager
def _without_dropout(module: nn.Module) -> Iterator[None]:
    """A choice is no place for chance, and draws nothing from the global generator."""
    dropouts = [m for m in module.modules() if isinstance(m, nn.Dropout) and m.training]
    for dropout in dropouts:
        dropout.training = False
    try:
        yield
    finally:
        for dropout in dropouts:
            dropout.training = True
