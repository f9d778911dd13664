"""Numbers by chance, fixed by a seed, a layer and a row's own tokens: drawn on the host.

Shape suffixes: B batch rows, V visual tokens alive.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from tokenprune.engine.rows import Rows
from tokenprune.engine.settings import Settings
from tokenprune.strategy import RandomNumbers

Floats = npt.NDArray[np.float32]


def draw(rows: Rows, num_alive: Sequence[int], seed: int, layer: int) -> Floats:
    """Numbers (B, V), by the row's unpadded ids, or its token counts where there are none."""
    table = np.zeros((len(num_alive), max(num_alive)), dtype=np.float32)
    for row, count in enumerate(num_alive):
        if rows.ids is None:
            own = [rows.num_real[row] - rows.guesses, rows.num_visual[row]]
        else:
            own = rows.ids[row][rows.real[row]].tolist()
            own = own[: len(own) - rows.guesses]
        digest = hashlib.blake2b(repr((seed, layer, own)).encode(), digest_size=8).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)
        table[row, :count] = torch.rand(count, generator=generator, dtype=torch.float32).numpy()
    return table


def foreseen(
    settings: Settings, rows: Rows, budgets: Sequence[list[int]]
) -> dict[tuple[int, RandomNumbers], Floats]:
    """What will be asked for on the device, by cut: as far as it is known how many are alive then.

    Args:
        settings: What `attach` was asked for.
        rows: The call's.
        budgets: Tokens that each cut leaves of each row.
    """
    found: dict[tuple[int, RandomNumbers], Floats] = {}
    alive = rows.num_visual
    for cut, budget in enumerate(budgets):
        strategy = settings.strategies[cut]
        for need in settings.declared[cut]:
            if isinstance(need, RandomNumbers) and not strategy.blind:
                found[cut, need] = draw(rows, alive, need.seed, settings.cuts[cut])
        if not strategy.keeps_exactly:
            break
        alive = [min(pair) for pair in zip(alive, budget, strict=True)]
    return found
