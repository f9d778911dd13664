"""Uniform: the baseline that looks at no content at all.

With a known grid, tokens fall in the order of a Bayer matrix (Bayer, 1973): a quarter of a grid is
every second row and column, a half its checkerboard, and every later cut is as even. Without a
grid, an even stride over the sequence.

Shape suffixes: V visual tokens alive of one row, U grids of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, ClassVar

from tokenprune.strategy import PruningStrategy, Published, Selection, TokenView, register

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    Ints = NDArray[np.int64]

_BITS = 10  # grids up to 1024 x 1024


@register("uniform")
@dataclass(frozen=True)
class Uniform(PruningStrategy):
    """Keeps an even stride over each image's grid; images share the budget by size."""

    keeps_exactly: ClassVar[bool] = True
    blind: ClassVar[bool] = True

    def select(self, view: TokenView, keep: Tensor) -> Selection:
        import torch

        places, kept = view.places.numpy(), view.valid.numpy().copy()
        for own, alive, budget in zip(places, kept, keep.tolist(), strict=True):
            alive[alive] = _spread(own[alive], budget)
        return Selection(kept=torch.from_numpy(kept))

    @classmethod
    def published(cls, num_layers: int) -> Published:
        """No paper: PyramidDrop's default schedule, so that the baseline has the same budget."""
        options = {"num_layers": num_layers, "num_stages": 4, "lam": 0.5}
        return Published("pyramid", options, positions="original")


def _spread(places: Ints, budget: int) -> NDArray[np.bool_]:
    """Marks `budget` of a row's tokens, by their places (V, 4): bool (V,)."""
    import numpy as np

    in_grid_V, order_V = places[:, 2] >= 0, np.arange(len(places))
    grid = np.where(in_grid_V[:, None], places[:, :2], -1)
    unit_V = np.cumsum((grid != np.roll(grid, 1, axis=0)).any(1) & (order_V > 0))
    sizes_U = np.bincount(unit_V)
    quota_V, size_V = _shares(budget, sizes_U)[unit_V], sizes_U[unit_V]
    # In a grid the emptiest spot comes first; in a sequence the order is its own.
    by_rank = np.lexsort((np.where(in_grid_V, _bayer(places[:, 2], places[:, 3]), order_V), unit_V))
    rank_V = np.empty_like(by_rank)
    rank_V[by_rank] = order_V - (np.cumsum(sizes_U) - sizes_U)[unit_V]
    strided_V = _stride(rank_V + 1, quota_V, size_V) > _stride(rank_V, quota_V, size_V)
    marked: NDArray[np.bool_] = np.where(in_grid_V, rank_V < quota_V, strided_V)
    return marked


def _shares(budget: int, sizes_U: Ints) -> Ints:
    """Splits a budget over grids by size, the largest remainders first (ties: lower grid)."""
    import numpy as np

    total = int(sizes_U.sum())
    budget = min(budget, total)
    quotas_U, rest_U = np.divmod(budget * sizes_U, max(1, total))
    quotas_U[np.argsort(-rest_U, kind="stable")[: budget - quotas_U.sum()]] += 1
    return quotas_U


def _bayer(row: Ints, column: Ints) -> Ints:
    """Entry of the infinite Bayer matrix, as an integer below 4**_BITS."""
    bits = _turned_bits()
    entry: Ints = 2 * bits[row ^ column] + bits[row]
    return entry


@cache
def _turned_bits() -> Ints:
    """Of each number below 2**_BITS its bits, in turned order, at every second place."""
    import numpy as np

    number = np.arange(2**_BITS)
    turned = [(number >> bit & 1) * 4 ** (_BITS - 1 - bit) for bit in range(_BITS)]
    spread: Ints = np.stack(turned).sum(0)
    return spread


def _stride(rank: Ints, quota: Ints, size: Ints) -> Ints:
    """Tokens that an even stride has kept before the token of this rank."""
    kept: Ints = (rank * quota + size // 2) // size
    return kept
