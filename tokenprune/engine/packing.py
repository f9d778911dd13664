"""Rows that hold several sequences end to end: where each token stands, apart and together.

The layers run packed rows as they come. What is decided (who asks, budgets, a strategy's choice,
labels) is decided on tables with a row a sequence, padded on the left; here is where their tokens
stand in the rows of the layers, and the way back.

Shape suffixes: B batch rows, T columns of the call, G sequences, n tokens of the longest of them,
N positions of a row at a level.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Bools = npt.NDArray[np.bool_]
Ints = npt.NDArray[np.int64]
#: Trainers that set use_cache do so in the config of the whole model alone.
CACHE_HINT = (
    "Pass use_cache=False, or set model.config.get_text_config().use_cache = False where a trainer "
    "calls the model"
)


@dataclass(frozen=True, eq=False)
class Packing:
    """The sequences of a call, row by row.

    Attributes:
        shape: Rows B and columns T of the call.
        row: int64 (G,), the row of each.
        start: int64 (G,), column of its first token.
        length: int64 (G,), its tokens, which follow one another.
        by_positions: Whether positions keep them apart, and no mask.
    """

    shape: tuple[int, int]
    row: Ints
    start: Ints
    length: Ints
    by_positions: bool

    @property
    def padded(self) -> bool:
        """Whether the layers' rows have pads, now or after a cut."""
        return self.shape[0] > 1 or int(self.length.sum()) < self.shape[1]

    @cached_property
    def real(self) -> Bools:
        """Which entries of the tables exist, bool (G, n)."""
        return _exist(self.length)

    @cached_property
    def seats(self) -> Ints:
        """Places of the tokens in the flattened call, int64 (G, n); pads have their sequence's."""
        return _seats(self.row * self.shape[1] + self.start, self.length)

    def apart(self, table: npt.NDArray[Any], pad: int) -> npt.NDArray[Any]:
        """Entries (B|1, T) of the call, by sequence, (G, n); pads hold `pad`."""
        flat = np.broadcast_to(table, self.shape).reshape(-1)
        return np.where(self.real, flat[self.seats], np.array(pad, table.dtype))

    def layout(self, num_left: Sequence[int] | None, device: torch.device) -> Layout:
        """Where tokens stand at a level, on the device by one upload.

        Args:
            num_left: Tokens of each sequence, which have moved together; None before any is gone.
            device: The layers'.
        """
        length, begin, width = self.length, self.start, self.shape[1]
        if num_left is not None:
            length = np.array(num_left, dtype=np.int64)
            before = length.cumsum() - length
            begin = before - before[np.searchsorted(self.row, self.row)]
            width = int(np.bincount(self.row, length).max())
        seats, exist = _seats(self.row * width + begin, length), _exist(length)
        places = np.full((self.shape[0], width), -1, dtype=np.int64)
        places.ravel()[seats[exist]] = np.flatnonzero(exist)
        columns = self.start + self.length - self.seats.shape[1]
        ends = np.concatenate([[0], length.cumsum()])
        parts = (seats.clip(max=places.size - 1), places, columns[:, None], ends)
        flat = torch.from_numpy(np.concatenate([part.ravel() for part in parts]))
        flat = flat.to(device, non_blocking=True)
        tables = torch.split(flat, [part.size for part in parts])
        made = [table.view(part.shape) for table, part in zip(tables, parts, strict=True)]
        return Layout(
            seats=made[0],
            places=made[1].clamp_min(0),
            real=made[1] >= 0 if (places < 0).any() else None,
            first=made[2],
            ends=made[3].to(torch.int32),
            longest=int(length.max()),
            num_real=[int((row >= 0).sum()) for row in places],
        )


@dataclass(frozen=True, eq=False)
class Layout:
    """Where the tokens of packed rows stand at a level.

    Attributes:
        seats: int64 (G, n), their places in the flattened rows, (B * N); pads have any.
        places: int64 (B, N), their places in the flattened tables, (G * n); pads have any.
        real: Bool (B, N), or None if no row has pads.
        first: int64 (G, 1), what column of the call column 0 of each table is.
        ends: int32 (G + 1,), where sequences end in a lone row, and 0.
        longest: Tokens of the longest.
        num_real: Tokens of each row.
    """

    seats: Tensor
    places: Tensor
    real: Tensor | None
    first: Tensor
    ends: Tensor
    longest: int
    num_real: list[int]


def packed(what: str, hint: str = "Pass sequences as rows of a batch, with padding.") -> ValueError:
    """The error for rows that hold several sequences and cannot be told apart, or run."""
    return ValueError(
        f"prune: expected one sequence a row, or several kept apart, got {what}. {hint}"
    )


def check_cache(packing: Packing | None, cache: Any) -> None:
    """Refuses to cache rows of several sequences: generation goes on from one a row."""
    if packing is not None and cache is not None:
        raise packed(
            "several in a row, and a cache",
            f"{CACHE_HINT}; or pass sequences as rows of a batch, with padding.",
        )


def regroup(values: Tensor, places: Tensor, num_rows: int, batch: int = 0, dim: int = 1) -> Tensor:
    """Tokens of rows as tokens of other rows.

    Args:
        values: Rows, or one for all of them, along dimension `batch`, their tokens along `dim`.
        places: int64, places of the new rows' tokens in the old rows, flattened.
        num_rows: Of the old.
        batch: Dimension of the rows.
        dim: Dimension of the tokens.
    """
    values = values.movedim((batch, dim), (0, 1))
    flat = values.expand(num_rows, *values.shape[1:]).flatten(0, 1)
    taken = flat.index_select(0, places.flatten()).view(*places.shape, *values.shape[2:])
    return taken.movedim((0, 1), (batch, dim))


def _exist(length: Ints) -> Bools:
    """Which entries of tables padded on the left exist, bool (G, n)."""
    exist: Bools = np.arange(length.max()) >= (length.max() - length)[:, None]
    return exist


def _seats(begin: Ints, length: Ints) -> Ints:
    """Places of tokens that begin there and follow one another, int64 (G, n)."""
    order = np.arange(length.max()) - (length.max() - length)[:, None]
    seats: Ints = begin[:, None] + order.clip(min=0)
    return seats
