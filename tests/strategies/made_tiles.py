"""Views of made-up tiles: what strategies that read the vision tower are shown, without a model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

import tokenprune as tp
from tokenprune.strategy import HasPatches, Need, Tiles, TileShape

#: Of one row: tiles by their tokens' numbers, and tokens without patches.
Row = tuple[list[list[int]], list[int]]


def row_of(sizes: list[int], newlines: int, order: list[int]) -> Row:
    """Tokens of a row, dealt out to tiles in a given order."""
    left, tiles = list(order), []
    for size in sizes:
        tiles.append(sorted(left[:size]))
        left = left[size:]
    return tiles, sorted(left[:newlines])


def view_of(
    rows: list[Row],
    attention: Tensor | dict[int, Tensor],
    states: Tensor,
    max_keep: int = 0,
    *,
    places: Tensor | None = None,
    more: Mapping[Need, Any] | None = None,
) -> tp.TokenView:
    """A view of made-up signals.

    Args:
        rows: Tiles and newlines of each row.
        attention: (B, H, V) of whichever layer of the tower is asked for, or of some layers.
        states: (B, V, C), of whichever layer.
        max_keep: Most tokens that a row will keep.
        places: (B, V, 4), none known by default.
        more: Signals that go before these.
    """
    of_layers = attention if isinstance(attention, dict) else {}
    width = states.shape[1]
    tiles_BV = torch.full((len(rows), width), -1)
    valid = torch.zeros(len(rows), width, dtype=torch.bool)
    for number, (tiles, newlines) in enumerate(rows):
        for tile, tokens in enumerate(tiles):
            tiles_BV[number, tokens] = tile
            valid[number, tokens] = True
        valid[number, newlines] = True
    shape = (
        max(len(tiles) for tiles, _ in rows),
        max(len(tile) for tiles, _ in rows for tile in tiles),
    )
    spots = torch.full((len(rows), width, 4), -1) if places is None else places
    beside = {Tiles(): tiles_BV, TileShape(): shape, HasPatches(): tiles_BV >= 0}

    def signal(need: Any) -> Any:
        if more is not None and need in more:
            return more[need]
        if isinstance(need, tp.VisionRows):
            return of_layers[need.layer] if of_layers else attention
        if isinstance(need, tp.VisionStates):
            return states
        return beside[need]

    return tp.TokenView(
        layer=0,
        num_layers=8,
        num_original=valid.sum(1),
        max_keep=max_keep,
        ragged=not bool(valid.all()),
        _valid=lambda: valid,
        _positions=lambda: torch.arange(width).expand(len(rows), -1),
        _hidden=lambda: states,
        _places=lambda: spots,
        _signal=signal,
    )


def budgets(row: Row, keep: int) -> tuple[list[int], int]:
    """What each tile may keep, by size, largest remainder first; and how many newlines."""
    sizes = [len(tile) for tile in row[0]]
    total = sum(sizes)
    budget = min(keep, total)
    exact = [budget * size / total if total else 0.0 for size in sizes]
    parts = [budget * size // total if total else 0 for size in sizes]
    by_rest = sorted(range(len(sizes)), key=lambda n: (-(budget * sizes[n] % total), n))
    for number in by_rest[: budget - sum(parts)]:
        parts[number] += 1
    assert all(abs(a - b) < 1 for a, b in zip(parts, exact, strict=True))
    return parts, min(keep - budget, len(row[1]))


def ranked(tokens: list[int], scores: list[float]) -> list[int]:
    return sorted(tokens, key=lambda token: (-scores[token], token))


@st.composite
def cases(draw: st.DrawFn) -> tuple[list[Row], int, list[int], int]:
    sizes = st.lists(st.integers(1, 40), min_size=1, max_size=3)
    shapes = draw(st.lists(st.tuples(sizes, st.integers(0, 4)), min_size=1, max_size=3))
    rows = []
    for tiles, newlines in shapes:
        order = list(range(sum(tiles) + newlines))
        rows.append(row_of(tiles, newlines, draw(st.permutations(order))))
    counts = [sum(tiles) + newlines for tiles, newlines in shapes]
    keep = [draw(st.integers(0, count + 2)) for count in counts]
    return rows, max(counts), keep, draw(st.integers(0, 2**31))


def signals(rows: list[Row], width: int, seed: int) -> tuple[Tensor, Tensor]:
    own = torch.Generator().manual_seed(seed)
    attention = torch.rand(len(rows), 2, width, generator=own, dtype=torch.float64)
    states = torch.randn(len(rows), width, 5, generator=own, dtype=torch.float64)
    return attention, states
