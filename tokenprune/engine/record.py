"""What a key-value cache holds when its layers hold different tokens.

The record of a run is an attribute of the cache object: two generations in flight never mix, and a
deep copy of a cache keeps its record.

Shape suffixes: B batch rows, N tokens held.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tokenprune.engine.levels import Level
from tokenprune.tensors import known_keys

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


@dataclass(eq=False)
class Held:
    """Tokens that the layers of one level hold, but for the record's tail.

    Attributes:
        columns: int64 (B, N), their columns in the unpruned conversation.
        real: Bool (B, N), or None if none is a pad.
        shift: int64 (B, 1), the model's position minus the layers', or None if they agree.
    """

    columns: Tensor
    real: Tensor | None
    shift: Tensor | None


@dataclass(eq=False)
class Record:
    """What a cache holds at each level (see `levels.py`).

    Attributes:
        policy: Cuts and positions it was written with.
        num_columns: Columns of the conversation so far.
        num_visual: Visual tokens so far, per row.
        held: One entry per level. Levels that hold the same share one entry.
        ends_visual: Whether each row ends in a visual token, 0 or 1.
        tail: Latest columns, text without pads, that every level holds besides.
    """

    policy: Policy
    num_columns: int
    num_visual: list[int]
    held: list[Held]
    ends_visual: list[int]
    tail: int = 0

    def length(self, level: int) -> int:
        """Tokens that a layer of this level holds, pads included."""
        return self.held[level].columns.shape[1] + self.tail

    def columns(self, level: int) -> Tensor:
        """Their columns in the unpruned conversation, int64 (B, length)."""
        columns = self.held[level].columns
        new = torch.arange(self.num_columns - self.tail, self.num_columns, device=columns.device)
        return torch.cat([columns, new.expand(columns.shape[0], -1)], 1)

    def real(self, level: int) -> Tensor | None:
        """Which of them are no pads, bool (B, length), or None if all are real."""
        real = self.held[level].real
        return None if real is None else nn.functional.pad(real, (0, self.tail), value=True)

    def differs(self, level: int) -> bool:
        """Whether layers of this level hold something else than an unpruned layer would."""
        return self.held[level] is not self.held[0]

    def crop(self, num_columns: int) -> None:
        """Forgets the latest columns, as the cache did (assisted decoding crops its guesses)."""
        dropped = self.num_columns - num_columns
        further = dropped - self.tail
        if further > 0:
            self.held = _cropped(self.held, further, self.num_columns - self.tail)
        self.tail = max(0, -further)
        self.num_columns = num_columns


def _cropped(held: Sequence[Held], dropped: int, num_columns: int) -> list[Held]:
    """What levels hold without their latest columns, which must be text in every row."""
    new: dict[int, Held] = {}
    for one in held:
        latest = torch.arange(num_columns - dropped, num_columns, device=one.columns.device)
        fits = one.columns.shape[1] >= dropped and (one.columns[:, -dropped:] == latest).all()
        if not fits or (one.real is not None and not one.real[:, -dropped:].all()):
            raise ValueError(
                "prune: expected a cache cropped by text after the pruned prompt, got "
                f"{dropped} columns that end in it. Start from a copy of the cache instead."
            )
        real = None if one.real is None else one.real[:, :-dropped]
        new[id(one)] = Held(one.columns[:, :-dropped], real, one.shift)
    return [new[id(one)] for one in held]


def has_record(cache: Any) -> bool:
    """Whether a pruned run has written this cache, and no unpruned view of it is in use."""
    return hasattr(cache, _ATTRIBUTE) and not is_unpruned(cache)


def is_unpruned(cache: Any) -> bool:
    """Whether this is a view made by `unpruned`."""
    return getattr(cache, "is_unpruned", False)


def unpruned(cache: Any, record: Record) -> Any:
    """The same cache, but as long as the conversation, for who sizes masks and positions by it."""
    setattr(cache, _ATTRIBUTE, record)
    kind: Any = type(cache)
    view: Any = object.__new__(_unpruned_class(kind))
    view.__dict__ = cache.__dict__
    return view


@functools.cache
def _unpruned_class(kind: type) -> type:
    def get_seq_length(self: Any, *args: Any, **kwargs: Any) -> int:
        return int(getattr(self, _ATTRIBUTE).num_columns)

    def get_mask_sizes(self: Any, query_length: int, *args: Any, **kwargs: Any) -> Any:
        if self.is_compileable:  # of a fixed size
            return kind.get_mask_sizes(self, query_length, *args, **kwargs)  # type: ignore[attr-defined]
        return getattr(self, _ATTRIBUTE).num_columns + query_length, 0

    members = {"get_seq_length": get_seq_length, "get_mask_sizes": get_mask_sizes}
    return type(f"Unpruned{kind.__name__}", (kind,), members | {"is_unpruned": True})


def read(
    cache: Any, policy: Policy, num_layers: int, num_rows: int, padding: Tensor | None
) -> Record | None:
    """The record of a cache; None for no cache or an empty one.

    Args:
        cache: A Hugging Face cache.
        policy: Cuts and positions of the present run.
        num_layers: Layers of the decoder.
        num_rows: Rows of the batch.
        padding: 2-D attention mask over the whole conversation, if any.

    Raises:
        ValueError: If the cache cannot be continued under this schedule.
    """
    if cache is None or not hasattr(cache, "get_seq_length"):
        return None
    if int(cache.get_seq_length(0)) == 0:
        return None
    record: Record | None = getattr(cache, _ATTRIBUTE, None)
    # A fixed cache holds its lengths on the device, and cannot be cropped.
    fixed = record is not None and getattr(cache, "is_compileable", False)
    held = [] if fixed else _lengths(cache, num_layers)
    if record is None:
        return _of_unpruned(cache, held, policy, num_rows, padding)
    if record.policy != policy:
        raise ValueError(
            f"prune: expected a cache pruned at layers {list(policy.cuts)} with {policy.positions} "
            f"positions, got one pruned at {list(record.policy.cuts)} with "
            f"{record.policy.positions} ones. Continue a conversation the way it began."
        )
    if record.held[0].columns.shape[0] != num_rows:
        raise ValueError(
            f"prune: expected a cache of {num_rows} rows, got one recorded with "
            f"{record.held[0].columns.shape[0]}. Repeat the prompt's rows, not the cache's."
        )
    if fixed:
        return record
    expected = [record.length(sum(cut <= i for cut in policy.cuts)) for i in range(num_layers)]
    shorter = {length - now for length, now in zip(expected, held, strict=True)}
    if len(shorter) > 1 or min(shorter) < 0:
        raise ValueError(
            f"prune: expected layers that hold {expected} tokens, got {held}. "
            "Something else changed this cache."
        )
    (dropped,) = shorter
    if dropped:
        record.crop(record.num_columns - dropped)
    return record


def _lengths(cache: Any, num_layers: int) -> list[int]:
    """Tokens that each layer holds."""
    lengths = [cache.get_seq_length(layer) for layer in range(num_layers)]
    if any(isinstance(length, Tensor) for length in lengths):  # of a fixed size
        lengths = torch.stack([torch.as_tensor(length).cpu() for length in lengths]).tolist()
    return [int(length) for length in lengths]


def _of_unpruned(
    cache: Any, held: list[int], policy: Policy, num_rows: int, padding: Tensor | None
) -> Record:
    if len(set(held)) > 1:
        raise ValueError(
            f"prune: expected a cache that this engine filled, got one whose layers hold "
            f"{sorted(set(held), reverse=True)} tokens and no record of which. "
            "Start again from an empty cache."
        )
    device = cache.layers[0].keys.device
    real = None if padding is None else padding[:, : held[0]].to(device=device, dtype=torch.bool)
    if real is not None and real.all():
        real = None
    columns = torch.arange(held[0], device=device).expand(num_rows, -1)
    everything = [Held(columns, real, None)] * (len(policy.cuts) + 1)
    return Record(policy, held[0], [0] * num_rows, everything, ends_visual=[0] * num_rows)


def write(
    cache: Any,
    policy: Policy,
    before: Record | None,
    levels: Sequence[Level],
    pruned: bool,
    ends_visual: list[int],
) -> None:
    """Notes on the cache what it holds after a pass over `levels`."""
    length = levels[0].columns.shape[1]
    if before is not None and not pruned and levels[0].real is None:
        before.num_columns += length
        before.ends_visual = ends_visual
        before.tail += length
        setattr(cache, _ATTRIBUTE, before)
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
            continue
        columns, real = level.columns, level.real
        if before is not None:
            old = before.real(number)
            if real is not None or old is not None:
                real = known_keys(columns, real, before.length(number), old)
            columns = torch.cat([before.columns(number), columns], 1)
        held.append(Held(columns, real, level.shift))
    seen = before.num_visual if before is not None else [0] * len(levels[0].num_visual)
    record = Record(
        policy=policy,
        num_columns=(before.num_columns if before is not None else 0) + length,
        num_visual=[a + b for a, b in zip(seen, levels[0].num_visual, strict=True)],
        held=held,
        ends_visual=ends_visual,
    )
    setattr(cache, _ATTRIBUTE, record)
