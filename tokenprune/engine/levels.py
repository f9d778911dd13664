"""The tokens of one pass between two cuts.

Cuts divide a pass over the decoder's layers into levels: level 0 runs on all tokens of the call,
level s on what cut number s left. Their numbers are known to the host beforehand; which they are,
the device knows, as columns of the call.

Shape suffixes: B batch rows, T columns of the call, N positions at a level, V visual tokens alive,
R text tokens, K survivors.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tokenprune.tensors import single_precision, take


@dataclass(eq=False)
class Plan:
    """What is known of a pass before its first layer.

    Attributes:
        order: int64 (T,), 0 .. T - 1.
        text: int64 (B, R), columns of the text tokens; pads hold `pad`.
        visual: int64 (B, V), columns of the visual tokens; pads hold 0.
        counts: int64 (S + 1, B), visual tokens of each row, and what each cut may keep.
        asking: int64 (B, Q), columns of the `"last"` query rows; pads hold 0.
        num_asking: int64 (B, 1), how many of them exist.
        prompt: int64 (B, S), columns of the prompt's text, pads hold 0; None if nobody asks.
        num_prompt: int64 (B, 1), how many of them exist, or None.
        num_follow: int64 (B, 1), how many of them come after the last visual token, or None.
        targets: int64 (B, L), columns of labelled tokens, pads hold 0; None if nobody asks.
        learned: int64 (M,), which of the B * L entries exist, or None.
        seen: int64 (B, V), numbers of the visual tokens in what the vision tower says of them; None
            if nobody asks.
        tiles: int64 (B, V), the tile of each visual token, numbered within the row, -1 for none;
            None if nobody asks.
        pad: What sorts to the side on which pads stand, -1 or T.
        random: float32 (B, V), numbers by chance, by cut and what asks for them.
    """

    order: Tensor
    text: Tensor
    visual: Tensor
    counts: Tensor
    asking: Tensor
    num_asking: Tensor
    prompt: Tensor | None
    num_prompt: Tensor | None
    num_follow: Tensor | None
    targets: Tensor | None
    learned: Tensor | None
    seen: Tensor | None
    tiles: Tensor | None
    pad: int
    random: dict[Any, Tensor]


@dataclass(eq=False)
class Level:
    """The tokens that the layers between two cuts process.

    Attributes:
        length: Positions N.
        num_real: Real tokens per row.
        num_visual: Visual tokens alive per row.
        columns: int64 (B, N), columns of the call; None for all of them, as they stand.
        real: Bool (B, N), or None if none is a pad.
        index: int64 (B, N), where they stood at the level before; None if nothing was removed.
        visual: int64 (B, V), columns of the visual tokens alive; None if the pass has none.
        counts: int64 (B, 1), how many of them each row has; None if the pass has none.
        pads_left: Whether pads stand on the left.
        chosen: int64 (B, V), which of the visual tokens alive before are left; None for all.
        weights: (B, V, U), how the visual tokens are mixed from the U alive before, or None.
        source: (B, U, C), what is mixed instead of their hidden states, or None.
        project: Makes hidden states of the mixture of `source`.
        moved: int64 (B, N), positions that the layers use instead of the model's, if others.
        shift: int64 (B, 1), the model's next position minus the layers', if not 0.
    """

    length: int
    num_real: list[int]
    num_visual: list[int]
    columns: Tensor | None
    real: Tensor | None
    index: Tensor | None
    visual: Tensor | None
    counts: Tensor | None
    pads_left: bool
    chosen: Tensor | None = None
    weights: Tensor | None = None
    source: Tensor | None = None
    project: Callable[[Tensor], Tensor] | None = None
    moved: Tensor | None = None
    shift: Tensor | None = None
    device: torch.device | None = field(init=False)

    def __post_init__(self) -> None:
        #: Where its tensors are; None without any.
        self.device = None
        for tensor in (self.visual, self.columns, self.real, self.moved):
            if tensor is not None:
                self.device = tensor.device

    @property
    def ragged(self) -> bool:
        """Whether rows have different numbers of visual tokens."""
        return len(set(self.num_visual)) > 1

    def seats(self) -> Tensor:
        """Where the visual tokens stand at this level, int64 (B, V)."""
        assert self.visual is not None
        seats = self.find(self.visual)
        return seats.clamp(0, self.length - 1) if self.ragged else seats

    def numbers(self, first: Level) -> Callable[[], Tensor]:
        """Makes the visual tokens' numbers within the call's, int64 (B, V).

        Args:
            first: Level 0 of the pass.
        """
        known, alive = first.visual, self.visual
        counts = first.counts if first.ragged else None
        assert known is not None
        assert alive is not None
        return partial(_numbers, known, counts, alive)

    def find(self, columns: Tensor) -> Tensor:
        """Positions of columns that are there, int64 like `columns`."""
        if self.columns is None:
            return columns
        # Of equal entries one is the token and the others are pads, on the side of the pads.
        last = self.real is not None and self.pads_left
        found = torch.searchsorted(self.columns, columns, right=last)
        if self.real is None:
            return found
        return (found - 1 if last else found).clamp(0, self.length - 1)

    def valid(self, plan: Plan) -> Tensor:
        """Which of the V entries exist, bool (B, V)."""
        width = max(self.num_visual)
        if not self.ragged:
            return plan.order.new_ones((), dtype=torch.bool).expand(len(self.num_visual), width)
        assert self.counts is not None
        return plan.order[:width] < self.counts

    def unchanged(self) -> Level:
        """The level after a cut that removed nothing."""
        anew: dict[str, Any] = dict.fromkeys(_OF_THE_CUT)
        return replace(self, **anew)

    def enter(self, hidden: Tensor, before: Level, plan: Plan) -> Tensor:
        """Hidden states (B, N, D) of this level, out of those of the level before.

        Survivors are mixed here, so that a layer that is computed anew mixes them anew.
        """
        left = hidden if self.index is None else take(hidden, self.index)
        if self.weights is None:
            return left
        return self.put(left, self.states(take(hidden, before.seats()), plan), plan)

    def put(self, hidden: Tensor, values: Tensor, plan: Plan) -> Tensor:
        """Hidden states (B, N, D) of this level with `values` (B, V, D) as its visual tokens."""
        seats = self.seats()
        if not self.ragged:
            return hidden.scatter(1, seats[..., None].expand_as(values), values)
        # What does not exist goes to a seat beyond the last.
        seats = seats.masked_fill(~self.valid(plan), self.length)
        hidden = torch.nn.functional.pad(hidden, (0, 0, 0, 1))
        return hidden.scatter(1, seats[..., None].expand_as(values), values)[:, :-1]

    def states(self, values: Tensor, plan: Plan) -> Tensor:
        """Hidden states of the tokens alive now, (B, V, D), of those alive before, (B, U, D)."""
        if self.source is None:
            return self.follow(values)
        assert self.project is not None
        kept = values if self.chosen is None else take(values, self.chosen)
        mixed = self.project(self._mixed(self.source)).to(kept)
        return torch.where(self._stay(plan), kept, mixed)

    def _stay(self, plan: Plan) -> Tensor:
        """Survivors that are nothing but themselves, or have no patch to mix, bool (B, V, 1)."""
        assert self.weights is not None
        assert plan.tiles is not None
        chosen = self.chosen
        if chosen is None:
            chosen = plan.order[: self.weights.shape[2]].expand(len(self.weights), -1)
        own = self.weights.gather(2, chosen[..., None])
        alone = (own == 1) & (self.weights != 0).sum(2, keepdim=True).eq(1)
        return alone | (take(plan.tiles, chosen) < 0)[..., None]

    def follow(self, values: Tensor) -> Tensor:
        """What is known of the visual tokens alive before (B, U, ...), of those alive now."""
        if self.weights is not None:
            return self._mixed(values)
        return values if self.chosen is None else take(values, self.chosen)

    def _mixed(self, values: Tensor) -> Tensor:
        """Values (B, U, ...) of the tokens alive before, mixed to those alive now (B, V, ...)."""
        assert self.weights is not None
        dtype = torch.promote_types(values.dtype, torch.float32)
        with single_precision(values.device):
            mixed = self.weights.to(dtype) @ values.flatten(2).to(dtype)
        return mixed.to(values.dtype).view(*mixed.shape[:2], *values.shape[2:])

    def after(self, chosen: Tensor, num_kept: list[int], counts: Tensor, plan: Plan) -> Level:
        """The level on which, of the visual tokens, only some are left.

        Args:
            chosen: int64 (B, K), these among those alive, ascending, then pads.
            num_kept: How many per row.
            counts: The same on the device, int64 (B, 1).
            plan: The pass's.
        """
        if num_kept == self.num_visual:
            return self.unchanged()
        assert self.visual is not None
        num_real = [
            real - before + now
            for real, before, now in zip(self.num_real, self.num_visual, num_kept, strict=True)
        ]
        length, most = max(num_real), max(num_kept)
        if length == 0:
            raise ValueError(
                "prune: expected at least one token to be left, got a call of visual tokens alone "
                "that keeps none of them. Prompt and image belong into one call."
            )
        visual = take(self.visual, chosen)
        survivors = visual
        if len(set(num_kept)) > 1:
            survivors = visual.masked_fill(plan.order[:most] >= counts, plan.pad)
        columns = torch.cat([plan.text, survivors], 1).sort(1).values
        if length < columns.shape[1]:
            columns = columns[:, -length:] if self.pads_left else columns[:, :length]
        real = None
        if any(number < length for number in num_real):
            real = columns != plan.pad
            columns = columns.clamp(0, len(plan.order) - 1)
        columns = columns.contiguous()
        index = self.find(columns)
        if real is not None and self.columns is not None:
            index = index.clamp(0, self.length - 1)
        return Level(
            length=length,
            num_real=num_real,
            num_visual=num_kept,
            columns=columns,
            real=real,
            index=index,
            visual=visual,
            counts=counts,
            pads_left=self.pads_left,
            chosen=chosen,
        )

    def renumber(
        self, first: Level, positions_BT: Tensor, held_shift: Tensor | None, start: bool
    ) -> None:
        """Counts the positions of rows that lost tokens anew, without gaps.

        Args:
            first: Level 0 of the pass.
            positions_BT: The model's positions.
            held_shift: Shift of what the layers of this level hold in the cache already.
            start: Whether they hold nothing: count from 0.
        """
        self.shift, self.device = held_shift, positions_BT.device
        own_BN = positions_BT if self.columns is None else take(positions_BT, self.columns)
        self.moved = None if held_shift is None else own_BN - held_shift
        removed = [a != b for a, b in zip(self.num_visual, first.num_visual, strict=True)]
        if not any(removed):
            return
        known = positions_BT
        if first.real is not None:
            known = known.masked_fill(~first.real, -1)
        next_B1 = known.amax(1, keepdim=True) + 1
        start_B1 = torch.zeros_like(next_B1)
        if not start:
            new = first.length if first.real is None else first.real.sum(1, keepdim=True)
            start_B1 = next_B1 - new
            start_B1 = start_B1 if held_shift is None else start_B1 - held_shift
        ones_BN = torch.ones_like(own_BN) if self.real is None else self.real.long()
        order_BN = (ones_BN.cumsum(1) - 1).clamp_min(0) + start_B1
        assert self.counts is not None
        assert first.counts is not None
        removed_B1 = self.counts != first.counts
        otherwise = own_BN if self.moved is None else self.moved
        self.moved = torch.where(removed_B1, order_BN, otherwise)
        shift_B1 = next_B1 - start_B1 - ones_BN.sum(1, keepdim=True)
        self.shift = torch.where(removed_B1, shift_B1, 0 if held_shift is None else held_shift)


#: Fields of a level that say what the cut before it did.
_OF_THE_CUT = ("index", "chosen", "weights", "source", "project", "moved", "shift")


def _numbers(known_BV: Tensor, counts_B1: Tensor | None, alive_BV: Tensor) -> Tensor:
    """Which of a call's visual tokens are those alive, by their columns."""
    return torch.searchsorted(_ascending(known_BV, counts_B1), alive_BV.contiguous())


def _ascending(visual_BV: Tensor, counts_B1: Tensor | None) -> Tensor:
    """Columns of visual tokens; the entries that do not exist come last."""
    if counts_B1 is None:
        return visual_BV
    order = torch.arange(visual_BV.shape[1], device=visual_BV.device)
    return visual_BV.masked_fill(order >= counts_B1, torch.iinfo(torch.int64).max)
