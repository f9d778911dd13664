"""What a strategy sees at a cut.

Shape suffixes: B batch rows, V visual tokens alive.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn

from tokenprune.engine.passes import Pass
from tokenprune.engine.rows import Rows
from tokenprune.strategy import AttentionRows, TokenView
from tokenprune.tensors import take, to_device


def make_view(
    run: Pass, number: int, hidden: Tensor, attended: Mapping[AttentionRows, Tensor]
) -> TokenView:
    """What the strategy sees at cut `number`.

    Args:
        run: The pass.
        number: The cut's.
        hidden: (B, N, D), what enters the layer after the cut.
        attended: Attention (B, H, V) for each request that the strategy declared.
    """
    device, layer = hidden.device, run.settings.cuts[number - 1]
    level, plan = run.at(number - 1, device), run.plan_on(device)
    visual_BV = level.visual
    assert visual_BV is not None

    def attention(request: AttentionRows) -> Tensor:
        if request not in attended:
            raise ValueError(
                f"{type(run.settings.strategy).__name__}: expected attention declared in "
                f"attention_rows(), {list(run.settings.requests)}, got {request}. Declare it there."
            )
        return attended[request]

    def positions() -> Tensor:
        assert run.positions is not None
        known = to_device(run.positions, device)
        return take(known, visual_BV) - _start(run, known)

    def places() -> Tensor:
        table = nn.utils.rnn.pad_sequence(run.places(), batch_first=True, padding_value=-1)
        number_BV = level.numbers(run.at(0, device))()
        return take(table.to(device), number_BV)

    return TokenView(
        layer=layer,
        num_layers=len(run.settings.anatomy.layers),
        num_original=plan.counts[0],
        ragged=level.ragged,
        _valid=lambda: level.valid(plan),
        _positions=positions,
        _hidden=lambda: take(hidden, level.seats()).detach(),
        _places=places,
        _attend=attention,
        _random=lambda seed: random(run.rows, level.num_visual, seed, layer).to(device),
    )


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
