"""What a strategy sees: the view of a cut, and attention for the rows that it asks for.

Shape suffixes: B batch rows, V visual tokens alive, Q query rows, K keys, H heads, D hidden size.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from tokenprune.engine.passes import Pass
from tokenprune.engine.side import replace_side_tensors, visible
from tokenprune.strategy import AttentionRows, TokenView
from tokenprune.tensors import ascending, attention_rows, hide_pads, take, to_device

#: Bytes of float32 attention weights that one chunk of query rows may take.
CHUNK_BYTES = 2**27


def make_view(
    run: Pass,
    number: int,
    module: nn.Module,
    hidden: Tensor,
    named: dict[str, Any],
    seats_BV: Tensor,
    valid_BV: Tensor,
) -> TokenView:
    """What the strategy sees at cut `number`, before the layer `module`."""
    layer, device = run.settings.cuts[number - 1], hidden.device
    level = run.at(number - 1, device)
    assert level.positions is not None
    assert run.budgets_SB is not None

    def rows(request: AttentionRows) -> Tensor:
        if request not in run.settings.requests:
            raise ValueError(
                f"{type(run.settings.strategy).__name__}: expected attention declared in "
                f"attention_rows(), {list(run.settings.requests)}, got {request}. Declare it there."
            )
        if (layer, request) not in run.rows:
            assert request.source == "next", "rows of the previous layer are computed in it"
            mask, before_cut = named.get("attention_mask"), dict(named)
            replace_side_tensors(run, number - 1, module, hidden, before_cut)
            run.rows[layer, request] = attend(
                run, number - 1, module, hidden, before_cut, mask, request, layer
            )
        return cast(Tensor, to_device(run.rows[layer, request], device))

    def find_places() -> Tensor:
        table = nn.utils.rnn.pad_sequence(run.places(), batch_first=True, padding_value=-1)
        own_BV = take(level.coordinate, seats_BV)
        if run.record is not None:
            own_BV = own_BV - torch.tensor(run.record.num_visual, device=device)[:, None]
        return take(table.to(device), own_BV.masked_fill(~valid_BV, 0))

    return TokenView(
        layer=layer,
        num_layers=len(run.settings.anatomy.layers),
        valid=valid_BV,
        num_original=run.at(0, device).alive,
        positions=take(level.positions, seats_BV) - _start(run, device),
        _hidden=lambda: take(hidden, seats_BV).detach(),
        _places=find_places,
        _attend=rows,
        _random=lambda seed: _random(run, level.num_visual, seed, layer).to(device),
    )


def _start(run: Pass, device: torch.device) -> Tensor | int:
    """Position of each row's first token, int64 (B, 1): pads may have been counted before it."""
    level = run.at(0, device)
    if run.record is not None or level.real is None or level.positions is None:
        return 0
    return level.positions.masked_fill(~level.real, level.positions.max()).amin(1, keepdim=True)


@torch.no_grad()
def attend(
    run: Pass,
    number: int,
    module: nn.Module,
    hidden: Tensor,
    named: Mapping[str, Any],
    mask: Any,
    request: AttentionRows,
    layer: int,
) -> Tensor:
    """Attention (B, H, V) of a layer to the visual tokens, mean over the asked query rows.

    Args:
        run: The pass.
        number: Level of the tokens.
        module: The layer.
        hidden: (B, N, D), what enters it.
        named: Its other arguments, for these tokens.
        mask: The mask that it was given, for the whole conversation.
        request: Which rows.
        layer: The layer's number.
    """
    level = run.at(number, hidden.device)
    num_rows, length = level.columns.shape
    if request.queries == "all":
        weights = level.queries.new_ones(1).expand(num_rows, length)
        weights = weights if level.real is None else weights * level.real
        weights = weights / weights.sum(1, keepdim=True).clamp_min(1)
        rows_BQ = torch.arange(length, device=hidden.device).expand(num_rows, -1)
    else:
        weights = level.queries
        rows_BQ = ascending(weights > 0, max(1, run.max_queries), left=False)
    weights_BQ = take(weights, rows_BQ)
    named = {name: to_device(value, hidden.device) for name, value in named.items()}
    with _without_dropout(module):
        projected = run.settings.anatomy.adapter.project(module, hidden, rows_BQ, named)
    keys = projected.keys
    holding = run.settings.level_of[layer]  # at a cut, the layer's cache is one level further
    before, _ = run.held(holding)
    if before:
        held = run.cache.layers[layer].keys
        held = held[:, :, :before] if held.dim() == 4 else held
        if held.shape[1:] != (keys.shape[1], before, keys.shape[3]):
            raise ValueError(
                "prune: expected a cache of keys as they are attended to, for attention in a "
                f"later turn, got {type(run.cache.layers[layer]).__name__} with entries of "
                f"shape {tuple(held.shape)}. Choose another cache, or a strategy that reads no "
                "attention."
            )
        keys = torch.cat([held.to(keys.dtype), keys], 2)
    total: Tensor | None = None
    num_heads = projected.queries.shape[1]
    chunk = max(1, CHUNK_BYTES // (4 * num_rows * num_heads * keys.shape[2]))
    for start in range(0, rows_BQ.shape[1], chunk):
        part_BQ = rows_BQ[:, start : start + chunk]
        allowed, known = visible(run, number, holding, mask, part_BQ)
        if known is not None:
            allowed = hide_pads(allowed, known, None)
        rows = attention_rows(
            projected.queries[:, :, start : start + chunk],
            keys,
            allowed,
            projected.scaling,
            projected.softcap,
        )
        part = torch.einsum("bhqk,bq->bhk", rows, weights_BQ[:, start : start + chunk])
        total = part if total is None else total + part
    assert total is not None
    return take(total, level.seats()[0] + before, dim=2)


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


def _random(run: Pass, num_alive: list[int], seed: int, layer: int) -> Tensor:
    """Numbers (B, V) fixed by seed, layer and the row's unpadded ids, or its token counts."""
    level = run.levels[0]
    ids = None if run.ids is None else run.ids.cpu()
    real = None if level.real is None else level.real.cpu()
    numbers = torch.zeros(len(num_alive), max(num_alive))
    for row, count in enumerate(num_alive):
        if ids is None:
            own = [level.num_real[row], level.num_visual[row]]
        else:
            own = (ids[row] if real is None else ids[row][real[row]]).tolist()
        digest = hashlib.blake2b(repr((seed, layer, own)).encode(), digest_size=8).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)
        numbers[row, :count] = torch.rand(count, generator=generator)
    return numbers
