"""What a strategy sees at a cut.

Shape suffixes: B batch rows, V visual tokens alive.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tokenprune.engine.passes import Pass
from tokenprune.engine.rows import Rows
from tokenprune.families.anatomy import device_of, final_norm
from tokenprune.strategy import (
    DecoderKeys,
    DecoderRows,
    Entered,
    Need,
    Normed,
    Projected,
    Text,
    TextView,
    TokensAndText,
    TokenView,
)
from tokenprune.tensors import take, to_device


def make_view(
    run: Pass, number: int, hidden: Tensor, heard: Mapping[DecoderRows | DecoderKeys, Any]
) -> TokenView:
    """What the strategy sees at cut `number`.

    Args:
        run: The pass.
        number: The cut's.
        hidden: (B, N, D), what enters the layer after the cut.
        heard: What layers answered to each request that the strategy declared: attention
            (B, H, V), or keys of visual tokens and of text.
    """
    device, layer = hidden.device, run.settings.cuts[number - 1]
    level, plan = run.at(number - 1, device), run.plan_on(device)
    visual_BV = level.visual
    assert visual_BV is not None

    strategy = run.settings.strategies[number - 1]

    def signal(need: Need) -> Any:
        if need not in strategy.needs():
            raise ValueError(
                f"{type(strategy).__name__}: expected what is declared in needs(), "
                f"{list(strategy.needs())}, got {need}. Declare it there."
            )
        if isinstance(need, DecoderRows):
            return heard[need]
        if isinstance(need, DecoderKeys):
            return TokensAndText(*heard[need])
        if isinstance(need, Normed):
            return _normed(run, number, hidden)
        makers = {Projected(): _projected, Entered(): _entered, Text(): _text}
        return makers[need](run, number, device)

    def places() -> Tensor:
        table = nn.utils.rnn.pad_sequence(run.places(), batch_first=True, padding_value=-1)
        number_BV = level.numbers(run.at(0, device))()
        return take(table.to(device), number_BV.clamp_max(table.shape[1] - 1))

    return TokenView(
        layer=layer,
        num_layers=len(run.settings.anatomy.layers),
        num_original=plan.counts[0],
        max_keep=max(map(min, level.num_visual, run.budgets[number - 1])),
        ragged=level.ragged,
        _valid=lambda: level.valid(plan),
        _positions=lambda: _positions(run, visual_BV),
        _hidden=lambda: take(hidden, level.seats()).detach(),
        _places=places,
        _signal=signal,
        _random=lambda seed: random(run.rows, level.num_visual, seed, layer).to(device),
    )


def _entered(run: Pass, number: int, device: torch.device) -> Tensor:
    """What entered the decoder, of the visual tokens of the call, (B, U, D)."""
    first = run.at(0, device).visual
    assert run.embeddings is not None
    assert first is not None
    return take(to_device(run.embeddings, device), first)


def _projected(run: Pass, number: int, device: torch.device) -> Tensor:
    """What entered the decoder, of the visual tokens alive before a cut, (B, V, D)."""
    return _alive(run, number, _entered(run, number, device))


def _normed(run: Pass, number: int, hidden: Tensor) -> TokensAndText:
    """What enters the layer after a cut, as the model's last norm would leave it."""
    device = hidden.device
    level, plan = run.at(number - 1, device), run.plan_on(device)
    norm = final_norm(run.settings.anatomy.decoder)
    assert norm is not None
    assert plan.prompt is not None
    text_BS = level.find(plan.prompt).clamp(0, level.length - 1)
    place = device_of(norm, hidden)

    def normed(seats: Tensor) -> Tensor:
        made: Tensor = norm(take(hidden, seats).detach().to(place))
        return made.to(device)

    return TokensAndText(normed(level.seats()), normed(text_BS))


def _alive(run: Pass, number: int, values: Tensor) -> Tensor:
    """What is known of a call's visual tokens (B, V, ...), of those alive before a cut."""
    for earlier in range(1, number):
        values = run.at(earlier, values.device).follow(values)
    return values


def _text(run: Pass, number: int, device: torch.device) -> TextView:
    """The prompt's text as it entered the decoder."""
    plan = run.plan_on(device)
    assert run.embeddings is not None
    assert plan.prompt is not None
    assert plan.num_prompt is not None
    assert plan.num_follow is not None
    order_S = torch.arange(plan.prompt.shape[1], device=device)
    valid_BS = order_S < plan.num_prompt
    return TextView(
        embeddings=take(to_device(run.embeddings, device), plan.prompt),
        valid=valid_BS,
        follows=valid_BS & (order_S >= plan.num_prompt - plan.num_follow),
        positions=_positions(run, plan.prompt),
    )


def _positions(run: Pass, columns: Tensor) -> Tensor:
    """Positions of some columns (B, N), counted from the row's first token."""
    assert run.positions is not None
    known = to_device(run.positions, columns.device)
    return take(known, columns) - _start(run, known)


def _start(run: Pass, positions_BT: Tensor) -> Tensor | int:
    """Position of each row's first token, int64 (B, 1): pads may have been counted before it."""
    real_BT = run.at(0, positions_BT.device).real
    if run.record is not None or real_BT is None:
        return 0
    return positions_BT.masked_fill(~real_BT, positions_BT.max()).amin(1, keepdim=True)


def random(rows: Rows, num_alive: list[int], seed: int, layer: int) -> Tensor:
    """Numbers (B, V) fixed by seed, layer and the row's unpadded ids, or its token counts."""
    drawn = []
    for row, count in enumerate(num_alive):
        if rows.ids is None:
            own = [rows.num_real[row], rows.num_visual[row]]
        else:
            own = rows.ids[row][rows.real[row]].tolist()
        digest = hashlib.blake2b(repr((seed, layer, own)).encode(), digest_size=8).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)
        drawn.append(torch.rand(count, generator=generator).numpy())
    table = np.zeros((len(num_alive), max(num_alive)), dtype=np.float32)
    for row, own_numbers in enumerate(drawn):
        table[row, : len(own_numbers)] = own_numbers
    return torch.from_numpy(table)
