"""What a key-value cache holds when its layers hold different tokens.

A cache that a pruned run has written becomes a `PrunedCache`: still the object that it was, of a
class that keeps a record of which tokens each layer holds, and tells whoever asks for its length
that of the conversation. What is done to the cache is done to the record: rows that are reordered,
selected or repeated, tokens that are cropped, a reset. A deep copy keeps its record; two
generations in flight never mix.

Shape suffixes: B batch rows, N tokens held.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from tokenprune.engine.levels import Level
from tokenprune.tensors import take

_ATTRIBUTE = "_tokenprune_record"


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
    """

    length: int
    columns: Tensor | None
    ragged: bool
    shift: Tensor | None


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
        return self.held[level].columns is not None

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
            lambda held: replace(held, columns=picked(held.columns), shift=picked(held.shift))
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


# ------------------------------------------------------------------------- the cache and its record


class PrunedCache:
    """Mixed into the class of a cache that a pruned run has written."""

    def get_seq_length(self, layer_idx: int | None = None) -> Any:
        """Of the conversation; with an index, and between calls, what that layer holds.

        But `generate` makes the masks of a cache of fixed size between calls, by some layer.
        """
        record = record_of(self)
        own: Any = super()
        if record is not None and is_fixed(self):
            return record.num_columns
        if record is None or (layer_idx is not None and not record.in_call):
            return own.get_seq_length(layer_idx or 0)
        first = int(0 in record.policy.cuts)  # the level of layer 0
        return record.num_columns + own.get_seq_length(0) - record.length(first)

    def get_mask_sizes(self, query_length: int, *args: Any, **kwargs: Any) -> Any:
        own: Any = super()
        record = record_of(self)
        if record is None or is_fixed(self) or not record.cut:
            return own.get_mask_sizes(query_length, *args, **kwargs)
        return self.get_seq_length() + query_length, 0

    def update(self, *args: Any, **kwargs: Any) -> Any:
        """Between calls of a pruned model; within one, the cache's own is in its place."""
        own: Any = super()
        record = record_of(self)
        if record is not None and record.cut:
            raise ValueError(
                f"prune: expected a cache pruned at layers {list(record.policy.cuts)} to be "
                "continued inside prune(...), as it began, got a call of the unpruned model, which "
                "would take its layers for layers that hold the whole conversation."
            )
        return own.update(*args, **kwargs)

    def reset(self) -> None:
        own: Any = super()
        own.reset()
        vars(self).pop(_ATTRIBUTE, None)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        own: Any = super()
        own.reorder_cache(beam_idx)
        self._select(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        own: Any = super()
        own.batch_select_indices(indices)
        self._select(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        own: Any = super()
        own.batch_repeat_interleave(repeats)
        record = record_of(self)
        if record is not None:
            self._select(torch.arange(record.num_rows).repeat_interleave(repeats))

    def _select(self, rows: Tensor) -> None:
        record = record_of(self)
        if record is not None:
            rows = rows.nonzero()[:, 0] if rows.dtype == torch.bool else rows
            record.select(rows)

    def __reduce__(self) -> Any:
        # The class is made on the way: copies and pickles name the one that it was made of.
        return _empty, (type(self).__mro__[2],), dict(vars(self))


def _empty(kind: Any) -> Any:
    return object.__new__(_pruned_class(kind))


@functools.cache
def _pruned_class(kind: Any) -> type:
    return type(f"Pruned{kind.__name__}", (PrunedCache, kind), {})


def record_of(cache: Any) -> Record | None:
    """The record of a cache that a pruned run has written, or None."""
    record: Record | None = getattr(cache, _ATTRIBUTE, None)
    return record


def is_fixed(cache: Any) -> bool:
    """Whether a cache has a fixed size, and shows entries that are not filled yet."""
    return bool(getattr(cache, "is_compileable", False))


def in_call(cache: Any, begins: bool) -> None:
    """Notes that a call with a cache begins or ends."""
    record = record_of(cache)
    if record is None:
        return
    record.in_call = begins
    if begins:  # spares each layer the question
        vars(cache)["update"] = super(PrunedCache, cache).update
    else:
        vars(cache).pop("update", None)


def keep(cache: Any, record: Record) -> None:
    """Notes on a cache what it holds."""
    setattr(cache, _ATTRIBUTE, record)
    if not isinstance(cache, PrunedCache):
        kind: Any = type(cache)
        cache.__class__ = _pruned_class(kind)


def read(cache: Any, policy: Policy, level_of: Sequence[int], num_rows: int) -> Record | None:
    """The record of a cache; None for no cache or an empty one.

    Args:
        cache: A Hugging Face cache.
        policy: Cuts and positions of the present run.
        level_of: Level of each layer of the decoder.
        num_rows: Rows of the batch.

    Raises:
        ValueError: If the cache cannot be continued under this schedule.
    """
    if cache is None:
        return None
    record = record_of(cache)
    if record is None:
        if int(cache.get_seq_length()) == 0:
            return None
        return _of_unpruned(_lengths(cache, len(level_of)), policy, num_rows)
    if record.policy != policy:
        raise ValueError(
            f"prune: expected a cache pruned at layers {list(policy.cuts)} with {policy.positions} "
            f"positions, got one pruned at {list(record.policy.cuts)} with "
            f"{record.policy.positions} ones. Continue a conversation the way it began."
        )
    if record.num_rows != num_rows:
        raise ValueError(
            f"prune: expected a cache of {num_rows} rows, got one recorded with "
            f"{record.num_rows}. Repeat the prompt's rows, not the cache's."
        )
    if is_fixed(cache):  # it holds its lengths on the device, and cannot be cropped
        return record
    held, lengths = _lengths(cache, len(level_of)), [*map(record.length, range(len(record.held)))]
    expected = [lengths[level] for level in level_of]
    if held == expected:
        return record
    shorter = {length - now for length, now in zip(expected, held, strict=True)}
    if len(shorter) > 1 or min(shorter) < 0:
        raise ValueError(
            f"prune: expected layers that hold {expected} tokens, got {held}. "
            "Something else changed this cache."
        )
    (dropped,) = shorter
    record.crop(record.num_columns - dropped)
    return record


def _lengths(cache: Any, num_layers: int) -> list[int]:
    """Tokens that each layer holds."""
    layers = cache.layers[:num_layers]
    lengths = [layer.get_seq_length() for layer in layers]
    if any(isinstance(length, Tensor) for length in lengths):  # of a fixed size
        lengths = torch.stack([torch.as_tensor(length).cpu() for length in lengths]).tolist()
    return [int(length) for length in lengths] + [0] * (num_layers - len(layers))


def _of_unpruned(held: list[int], policy: Policy, num_rows: int) -> Record:
    if len(set(held)) > 1:
        raise ValueError(
            f"prune: expected a cache that this engine filled, got one whose layers hold "
            f"{sorted(set(held), reverse=True)} tokens and no record of which. "
            "Start again from an empty cache."
        )
    if 0 in policy.cuts:
        raise ValueError(
            f"prune: expected a cache that this engine filled, for a cut at layer 0, got one of "
            f"{held[0]} tokens without a record: whether an image was cut out of it cannot be "
            "seen. Fill it under the same prune(...), and copy it with copy.deepcopy; or, for a "
            "prefix of peft's, make the first cut later."
        )
    everything = [Held(held[0], None, False, None)] * (len(policy.cuts) + 1)
    return Record(policy, held[0], [0] * num_rows, [False] * num_rows, -1, None, everything)


def write(
    cache: Any,
    policy: Policy,
    before: Record | None,
    levels: Sequence[Level],
    pruned: bool,
    real_BT: Tensor | None,
    ends_visual: list[bool],
    last_visual: int,
) -> None:
    """Notes on the cache what it holds after a pass over `levels`.

    Args:
        cache: The cache.
        policy: What it must be continued with.
        before: What it held before the pass.
        levels: One per cut, and level 0.
        pruned: Whether the pass had visual tokens.
        real_BT: Which tokens of the call are no pads, or None if none is one.
        ends_visual: Whether each row ends in a visual token.
        last_visual: Latest column of the call that is visual in some row, or -1.
    """
    length = levels[0].length
    if before is not None and not pruned and real_BT is None:
        before.num_columns += length
        if any(ends_visual):  # a schedule without cuts
            before.seen, before.ended = before.num_visual, ends_visual
        elif any(before.ended):  # now no row does, in whichever order
            before.ended = [False] * len(before.ended)
        before.tail += length
        keep(cache, before)
        return
    held: list[Held] = []
    for number, level in enumerate(levels):
        below = levels[number - 1]
        if (
            number > 0
            and level.columns is below.columns
            and level.shift is below.shift
            and (before is None or before.held[number] is before.held[number - 1])
        ):
            held.append(held[-1])
        else:
            held.append(_held(before, number, level))
    seen = before.num_visual if before is not None else [0] * len(levels[0].num_visual)
    offset = 0 if before is None else before.num_columns
    real = real_BT
    if before is not None and (real is not None or before.real is not None):
        device = (before.real if real is None else real).device  # type: ignore[union-attr]
        ones = torch.ones(len(seen), offset, dtype=torch.bool, device=device)
        old = ones if before.real is None else nn.functional.pad(
            before.real.to(device), (0, before.tail), value=True)  # fmt: skip
        new = torch.ones(len(seen), length, dtype=torch.bool, device=device)
        real = torch.cat([old, new if real is None else real], 1)
    latest = -1 if before is None else before.last_visual
    latest = offset + last_visual if last_visual >= 0 else latest
    record = Record(
        policy=policy,
        num_columns=offset + length,
        seen=[a + b for a, b in zip(seen, levels[0].num_visual, strict=True)],
        ended=ends_visual,
        last_visual=latest,
        real=real,
        held=held,
    )
    keep(cache, record)


def _held(before: Record | None, number: int, level: Level) -> Held:
    """What the layers of a level hold after a pass."""
    old = None if before is None else before.held[number]
    length = level.length + (0 if before is None else before.length(number))
    if level.columns is None and (old is None or old.columns is None):
        return Held(length, None, False, level.shift)
    offset = 0 if before is None else before.num_columns
    device = (level.columns if level.columns is not None else old.columns).device  # type: ignore[union-attr]
    columns = level.columns
    if columns is None:
        columns = torch.arange(level.length, device=device).expand(len(level.num_real), -1)
    columns = columns + offset if offset else columns
    ragged = level.columns is not None and level.real is not None
    if ragged:
        assert level.real is not None
        columns = columns.masked_fill(~level.real, -1)
    if before is not None and old is not None:
        known = before.columns(number, device)
        if old.ragged:
            assert old.columns is not None
            pads = nn.functional.pad(old.columns < 0, (0, before.tail))
            known = known.masked_fill(pads.to(device), -1)
        columns = torch.cat([known, columns], 1)
        ragged = ragged or old.ragged
    return Held(length, columns, ragged, level.shift)
