"""What the layers of a cache hold, which tokens of the conversation, when each level holds others.

Shape suffixes: B batch rows, N tokens held.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from tokenprune.tensors import take


@dataclass(frozen=True)
class Policy:
    """What a cache must be continued with.

    Attributes:
        cuts: Layers of the schedule's cuts.
        positions: `"original"` or `"renumbered"`.
    """

    cuts: tuple[int, ...]
    positions: str


@dataclass(frozen=True, eq=False)
class Held:
    """Tokens that the layers of one level hold, but for the record's tail.

    Attributes:
        length: How many, pads included.
        columns: int64 (B, N), their columns in the unpruned conversation, -1 for pads; None for
            all of them.
        ragged: Whether there are pads.
        shift: int64 (B, 1), the model's position minus the layers', or None if they agree.
        slots: Of layers of a fixed size, int64 (B, size): columns of their entries, also of those
            that the tail fills and will fill; None for others.
        exists: Bool (B, size), which of them are no pads, or None if none is one.
    """

    length: int
    columns: Tensor | None
    ragged: bool
    shift: Tensor | None
    slots: Tensor | None = None
    exists: Tensor | None = None
    #: Whether these are not all tokens. A compiled step that looked at `columns` for it would be
    #: compiled anew for each number of them.
    cut: bool = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "cut", self.columns is not None)


@dataclass(eq=False)
class Record:
    """What a cache holds at each level (see `levels.py`).

    Attributes:
        policy: Cuts and positions it was written with.
        num_columns: Columns of the conversation so far.
        num_rows: Rows of the batch.
        seen: Visual tokens so far, per row, but for `moved`.
        ended: Whether each row ends in a visual token, but for `moved`.
        last_visual: Latest column that is visual in some row, or -1.
        real: Bool (B, num_columns - tail), which columns the caller's mask did not hide, or None.
        held: One entry per level. Levels that hold the same share one entry.
        tail: Latest columns, text without pads, that every level holds besides.
        in_call: Whether the model is being called: transformers sizes masks by some layer, and
            must not be told of one that holds less than the conversation.
        moved: int64, the rows in their present order, as far as nobody has asked: beams move at
            every step, and to ask the device where to would wait for it.
        layer: The last layer that has keys, or -1.
        level: The level that it is on.
        keys: Its keys as the last call or method left them, or None. Other ones mean that somebody
            has changed layers behind the cache's back.
    """

    policy: Policy
    num_columns: int
    seen: list[int]
    ended: list[bool]
    last_visual: int
    real: Tensor | None
    held: list[Held]
    tail: int = 0
    in_call: bool = False
    moved: Tensor | None = None
    layer: int = -1
    level: int = 0
    keys: Any = None

    @property
    def num_rows(self) -> int:
        return len(self.seen) if self.moved is None else len(self.moved)

    @property
    def num_visual(self) -> list[int]:
        """Visual tokens so far, per row."""
        self._settle()
        return self.seen

    @property
    def ends_visual(self) -> list[bool]:
        """Whether each row ends in a visual token."""
        self._settle()
        return self.ended

    def _settle(self) -> None:
        if self.moved is not None:
            order = self.moved.tolist()
            self.seen = [self.seen[row] for row in order]
            self.ended = [self.ended[row] for row in order]
            self.moved = None

    def length(self, level: int) -> int:
        """Tokens that a layer of this level holds, pads included."""
        return self.held[level].length + self.tail

    def columns(self, level: int, device: torch.device) -> Tensor:
        """Their columns in the unpruned conversation, int64 (B, length), 0 for pads."""
        held = self.held[level]
        if held.columns is None:
            every = torch.arange(self.num_columns, device=device)
            return every.expand(self.num_rows, -1)
        new = torch.arange(self.num_columns - self.tail, self.num_columns, device=device)
        known = held.columns.to(device)
        known = known.clamp_min(0) if held.ragged else known
        return torch.cat([known, new.expand(known.shape[0], -1)], 1)

    def lay_out(self, sizes: list[int]) -> None:
        """Notes what the entries of layers of a fixed size are for, as they fill.

        Once, so that steps of a generation have no number of their own: how far a layer is filled
        is the cache's to say.

        Args:
            sizes: Entries that layers of each level have at most.

        Raises:
            ValueError: If one is too small for what its layers hold.
        """
        start, size_of = self.num_columns - self.tail, dict[int, int]()
        for held, size in zip(self.held, sizes, strict=True):  # levels share what they hold
            size_of[id(held)] = max(size, size_of.get(id(held), 0))

        def laid_out(held: Held) -> Held:
            size = size_of[id(held)]
            if held.columns is None or size == 0:
                return held
            device = held.columns.device
            if size < held.length:
                raise ValueError(
                    f"prune: expected a cache of at least {held.length} entries, got one of {size} "
                    "in some layer. Make it larger, or leave cache_implementation out."
                )
            new = torch.arange(start, start + size - held.length, device=device)
            slots = torch.cat([held.columns, new.expand(len(held.columns), -1)], 1)
            exists = slots >= 0 if held.ragged else None
            if self.real is not None:
                real = nn.functional.pad(self.real.to(device), (0, size), value=True)
                real = take(real, slots.clamp_min(0))
                exists = real if exists is None else real & exists
            return replace(held, slots=slots.clamp_min(0), exists=exists)

        self._each(laid_out)

    def known(self, level: int, device: torch.device) -> Tensor | None:
        """Which of them are no pads, bool (B, length), or None if all are real."""
        known = None if self.real is None else self.real.to(device)
        held = self.held[level]
        if held.columns is not None and (known is not None or held.ragged):
            columns = held.columns.to(device)
            known = None if known is None else take(known, columns.clamp_min(0))
            if held.ragged:
                known = columns >= 0 if known is None else known & (columns >= 0)
        if known is None:
            return None
        return nn.functional.pad(known, (0, self.tail), value=True)

    def differs(self, level: int) -> bool:
        """Whether layers of this level hold something else than an unpruned layer would."""
        return self.held[level].cut

    @property
    def cut(self) -> bool:
        """Whether those of any level do."""
        return any(map(self.differs, range(len(self.held))))

    @property
    def ragged(self) -> bool:
        """Whether rows hold different numbers of tokens at some level, and so pads."""
        return any(held.ragged for held in self.held)

    def shifts(self, level: int) -> Tensor | None:
        """The model's position minus the layers', int64 (B, 1), or None if they agree."""
        return self.held[level].shift

    def crop(self, num_columns: int) -> None:
        """Forgets the latest columns, as the cache did (assisted decoding crops its guesses)."""
        dropped = self.num_columns - num_columns
        further = dropped - self.tail
        if num_columns <= self.last_visual:
            raise _cropped_too_far(dropped)
        if further > 0:
            end = self.num_columns - self.tail
            self._each(lambda held: _cropped(held, further, end, self.real))
            self.real = None if self.real is None else self.real[:, :-further]
        self.tail = max(0, -further)
        self.num_columns = num_columns

    def select(self, rows: Tensor) -> None:
        """Rows take other rows' places, as in the cache (beams)."""
        if len(set(self.seen)) == 1 and len(set(self.ended)) == 1:
            self.seen, self.ended = self.seen[:1] * len(rows), self.ended[:1] * len(rows)
            self.moved = None
        elif self.moved is None:
            self.moved = rows.clone()  # the caller may write on it
        else:
            self.moved = self.moved.to(rows.device)[rows]

        def picked(table: Tensor | None) -> Tensor | None:
            return None if table is None else table[rows.to(table.device)]

        self.real = picked(self.real)
        self._each(
            lambda held: replace(
                held,
                columns=picked(held.columns),
                shift=picked(held.shift),
                slots=picked(held.slots),
                exists=picked(held.exists),
            )
        )

    def alike(self, one: int, other: int) -> bool:
        """Whether the same is known of two rows. It waits for the device."""
        tables = [self.real]
        for held in self.held:
            tables += [held.columns, held.shift, held.slots, held.exists]
        seen, ended = self.num_visual, self.ends_visual
        return (seen[one], ended[one]) == (seen[other], ended[other]) and all(
            table is None or torch.equal(table[one], table[other]) for table in tables
        )

    def _each(self, change: Callable[[Held], Held]) -> None:
        made = {id(held): change(held) for held in self.held}
        self.held = [made[id(held)] for held in self.held]


def _cropped(held: Held, dropped: int, end: int, real: Tensor | None) -> Held:
    """What a level holds without its latest columns, which must be text in every row."""
    fits = held.length >= dropped
    if fits and held.columns is not None:
        latest = torch.arange(end - dropped, end, device=held.columns.device)
        fits = bool((held.columns[:, -dropped:] == latest).all())
    if not fits or (real is not None and not real[:, -dropped:].all()):
        raise _cropped_too_far(dropped)
    columns = None if held.columns is None else held.columns[:, :-dropped]
    return replace(held, length=held.length - dropped, columns=columns)


def _cropped_too_far(dropped: int) -> ValueError:
    return ValueError(
        "prune: expected a cache cropped by text after the pruned prompt, got "
        f"{dropped} columns that end in it. Start from a copy of the cache instead."
    )
