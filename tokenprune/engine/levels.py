"""The tokens of one pass between two cuts.

Cuts divide a pass over the decoder's layers into levels: level 0 runs on all tokens of the call,
level s on what cut number s left.

Shape suffixes: B batch rows, N positions at a level, V visual tokens alive.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor

from tokenprune.tensors import ascending, take, to_device


@dataclass(eq=False)
class Level:
    """The tokens that the layers between two cuts process.

    Attributes:
        index: int64 (B, N), where they stood at the level before; None if nothing was removed.
        columns: int64 (B, N), columns in the unpruned conversation.
        real: Bool (B, N), or None if none is a pad.
        num_real: Real tokens per row.
        visual: Bool (B, N).
        num_visual: Visual tokens alive per row.
        alive: The same as int64 (B,), on the device.
        coordinate: int64 (B, N), a visual token's number within its sample.
        queries: float32 (B, N), weight of each position among the `"last"` query rows.
        pads_left: Whether pads stand on the left.
        positions: int64 (B, N), positions that the model gave.
        moved: int64 (B, N), positions that the layers of this level use instead, if others.
        shift: int64 (B, 1), the model's next position minus the layers', if not 0.
        side: Side tensors of this level, by name and identity of the original.
    """

    index: Tensor | None
    columns: Tensor
    real: Tensor | None
    num_real: list[int]
    visual: Tensor
    num_visual: list[int]
    alive: Tensor
    coordinate: Tensor
    queries: Tensor
    pads_left: bool
    positions: Tensor | None = None
    moved: Tensor | None = None
    shift: Tensor | None = None
    side: dict[tuple[str, int], Any] = field(default_factory=dict)

    def seats(self) -> tuple[Tensor, Tensor]:
        """Where the visual tokens stand, int64 (B, V), and which of those entries exist."""
        width = max(self.num_visual)
        order = torch.arange(width, device=self.columns.device)
        return ascending(self.visual, width, left=False), order < self.alive[:, None]

    def on(self, device: torch.device) -> Level:
        """The same level with its tensors on another device."""
        if self.columns.device == device:
            return self
        tensors = {f.name: to_device(getattr(self, f.name), device) for f in fields(self)}
        return replace(self, **tensors | {"side": {}})

    def unchanged(self) -> Level:
        """The level after a cut that removed nothing."""
        return replace(self, index=None, side={})

    def after(self, kept_BV: Tensor, num_kept: list[int], alive: Tensor) -> Level:
        """The level on which, of the visual tokens, only the marked ones are left."""
        if num_kept == self.num_visual:
            return self.unchanged()
        seat_BN = (self.visual.cumsum(1) - 1).clamp_min(0)
        stays_BN = torch.where(self.visual, kept_BV.gather(1, seat_BN), True)
        if self.real is not None:
            stays_BN = stays_BN & self.real
        num_real = [
            real - before + now
            for real, before, now in zip(self.num_real, self.num_visual, num_kept, strict=True)
        ]
        length = max(num_real)
        if length == 0:
            raise ValueError(
                "prune: expected at least one token to be left, got a call of visual tokens alone "
                "that keeps none of them. Prompt and image belong into one call."
            )
        index = ascending(stays_BN, length, left=self.pads_left)
        real = take(stays_BN, index) if any(n < length for n in num_real) else None
        visual, queries = take(self.visual, index), take(self.queries, index)
        if real is not None:
            queries = queries * real
        # A query row may be a visual token, and go: the others count on, or else the last token.
        total_B1 = queries.sum(1, keepdim=True)
        last_BN = torch.ones_like(queries) if real is None else real.to(queries.dtype)
        last_BN = (last_BN.cumsum(1) == last_BN.sum(1, keepdim=True)) & (last_BN > 0)
        queries = torch.where(total_B1 > 0, queries / total_B1.clamp_min(1e-9), last_BN.float())
        assert self.positions is not None, "set at the first hooked layer"
        return Level(
            index=index,
            columns=take(self.columns, index),
            real=real,
            num_real=num_real,
            visual=visual if real is None else visual & real,
            num_visual=num_kept,
            alive=alive,
            coordinate=take(self.coordinate, index),
            queries=queries,
            pads_left=self.pads_left,
            positions=take(self.positions, index),
        )

    def renumber(self, first: Level, held_shift: Tensor | None, continues: bool) -> None:
        """Counts the positions of rows that lost tokens anew, without gaps.

        Args:
            first: Level 0 of the pass.
            held_shift: Shift of what the layers of this level hold in the cache already.
            continues: Whether they hold something: count on from it, else from 0.
        """
        assert self.positions is not None
        assert first.positions is not None
        self.shift = held_shift
        self.moved = None if held_shift is None else self.positions - held_shift
        removed = [a != b for a, b in zip(self.num_visual, first.num_visual, strict=True)]
        if not any(removed):
            return
        known = first.positions
        if first.real is not None:
            known = known.masked_fill(~first.real, -1)
        next_B1 = known.max(1, keepdim=True).values + 1
        start_B1 = torch.zeros_like(next_B1)
        if continues:
            start_B1 = next_B1 - torch.tensor(first.num_real, device=known.device)[:, None]
            start_B1 = start_B1 if held_shift is None else start_B1 - held_shift
        ones_BN = torch.ones_like(self.columns) if self.real is None else self.real.long()
        order_BN = (ones_BN.cumsum(1) - 1).clamp_min(0) + start_B1
        removed_B1 = torch.tensor(removed, device=known.device)[:, None]
        otherwise = self.positions if self.moved is None else self.moved
        self.moved = torch.where(removed_B1, order_BN, otherwise)
        shift_B1 = next_B1 - start_B1 - ones_BN.sum(1, keepdim=True)
        self.shift = torch.where(removed_B1, shift_B1, 0 if held_shift is None else held_shift)
