"""A cache that a pruned run has written, and the record of what it holds.

It becomes a `PrunedCache`: still the object that it was, of a class that keeps a record of which
tokens each layer holds, and tells whoever asks for its length that of the conversation. What is
done to the cache is done to the record: rows that are reordered, selected or repeated, tokens that
are cropped, a reset. What is done to its layers one by one it is not told, but sees by their keys.
A deep copy keeps its record; two generations in flight never mix.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tokenprune.engine.levels import Level
from tokenprune.engine.record import Held, Policy, Record

_ATTRIBUTE = "_tokenprune_record"


class PrunedCache:
    """Mixed into the class of a cache that a pruned run has written."""

    def get_seq_length(self, layer_idx: int | None = None) -> Any:
        """Of the conversation; with an index, and between calls, what that layer holds.

        But `generate` makes the masks of a cache of fixed size between calls, by some layer.
        """
        record = record_of(self)
        own: Any = super()
        first = 0 if record is None else int(0 in record.policy.cuts)  # the level of layer 0
        if record is not None and is_fixed(self):
            gone = record.num_columns - record.length(first) if first else 0
            return own.get_seq_length(0) + gone
        if record is None or (layer_idx is not None and not record.in_call):
            return own.get_seq_length(layer_idx or 0)
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
        self._moved(lambda: own.reorder_cache(beam_idx), beam_idx)

    def batch_select_indices(self, indices: Any) -> None:
        own: Any = super()
        self._moved(lambda: own.batch_select_indices(indices), indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        own: Any = super()
        self._moved(lambda: own.batch_repeat_interleave(repeats), repeats)

    def crop(self, *args: Any, **kwargs: Any) -> None:
        own: Any = super()
        self._moved(lambda: own.crop(*args, **kwargs), None)

    def _moved(self, change: Callable[[], None], rows: Any) -> None:
        """Makes a change, and lets the record follow.

        Args:
            change: Makes it.
            rows: The rows that come of it: int64 or bool, a list, a slice, or an int, how often
                each is repeated; None for the same ones.
        """
        record = record_of(self)
        if record is None:
            change()
            return
        _follow_rows(self, record)  # what was done before
        change()
        if isinstance(rows, int):
            rows = torch.arange(record.num_rows).repeat_interleave(rows)
        elif rows is not None and not isinstance(rows, Tensor):
            rows = torch.arange(record.num_rows)[rows]
        if rows is not None:
            record.select(rows.nonzero()[:, 0] if rows.dtype == torch.bool else rows)
        _note_keys(self, record)

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


def settle(cache: Any, record: Record) -> None:
    """Counts what a cache of fixed size has been given since its record was written.

    It waits for the device. Steps of a generation do not count: a graph of one that did would be of
    that one alone.

    Raises:
        ValueError: If it holds less than then.
    """
    if record_of(cache) is record:
        more = int(cache.get_seq_length()) - record.num_columns
        if more < 0:
            raise _emptied()
        record.num_columns += more
        record.tail += more


def _emptied() -> ValueError:
    return ValueError(
        "prune: expected a cache that holds what the last call left, got one whose layers were "
        "emptied. Call its own reset() instead, or take a new one."
    )


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


def _keys(cache: Any, record: Record) -> Any:
    """What the layer that is looked at has for keys, usually (B, heads, N, head width)."""
    return getattr(cache.layers[record.layer], "keys", None) if record.layer >= 0 else None


def _note_keys(cache: Any, record: Record) -> None:
    """Notes that a cache holds what its record says."""
    record.keys = _keys(cache, record)


def _follow_rows(cache: Any, record: Record) -> None:
    """Moves a record's rows to where layers' rows were moved one layer after another.

    It waits for the device, but only if the keys are not the tensor that was left there.

    Raises:
        ValueError: If some row is none of the old ones, or one of several that are not the same.
    """
    left, now = record.keys, _keys(cache, record)
    known = isinstance(left, Tensor) and isinstance(now, Tensor) and left.dim() == now.dim() == 4
    if now is left or not known:
        return
    if all(record.alike(0, row) for row in range(1, record.num_rows)):
        if len(now) != record.num_rows:
            record.select(torch.zeros(len(now), dtype=torch.int64))
    else:  # of the tail nothing is said by row
        length = min(left.shape[2], now.shape[2], record.held[record.level].length)
        order = _places(left[:, :, :length].to(now), now[:, :, :length], record)
        if order is not None:
            record.select(order)
    record.keys = now


def _places(left: Tensor, now: Tensor, record: Record) -> Tensor | None:
    """Which of the rows that were left each row is, int64; None if all are where they were."""
    left, now = left.nan_to_num(), now.nan_to_num()
    same = torch.stack([(now == row).flatten(1).all(1) for row in left], 1).cpu()
    if not same.any(1).all():
        raise ValueError(
            f"prune: expected a cache whose rows are among the {len(left)} that the last call "
            f"left, got other keys in {int((~same.any(1)).sum())} of its {len(now)} rows. Change "
            "it by its own methods: reorder_cache, batch_select_indices, crop."
        )
    order = same.int().argmax(1)
    for row, first in enumerate(order.tolist()):
        for other in same[row].nonzero()[:, 0].tolist():
            if not record.alike(first, other):
                raise ValueError(
                    "prune: expected a cache whose rows are told apart by their keys, got rows "
                    f"{first} and {other} with the same ones that were other prompts. Move rows by "
                    "the cache's own methods: reorder_cache, batch_select_indices."
                )
    still = len(now) == len(left) and bool(same.diagonal().all())
    return None if still else order


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
    _follow_rows(cache, record)
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
    if not any(held) and record.last_visual >= 0:
        raise _emptied()
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
    level_of: Sequence[int],
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
        level_of: Level of each layer of the decoder.
        before: What it held before the pass.
        levels: One per cut, and level 0.
        pruned: Whether the pass had visual tokens.
        real_BT: Which tokens of the call are no pads, or None if none is one.
        ends_visual: Whether each row ends in a visual token.
        last_visual: Latest column of the call that is visual in some row, or -1.
    """
    length = levels[0].length
    if before is not None and not pruned and real_BT is None:
        if not is_fixed(cache):
            before.num_columns += length
            before.tail += length
            _note_keys(cache, before)
        if any(ends_visual):  # a schedule without cuts
            before.seen, before.ended = before.num_visual, ends_visual
        elif any(before.ended):  # now no row does, in whichever order
            before.ended = [False] * len(before.ended)
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
    if is_fixed(cache):
        sizes = [0] * len(held)  # of levels that no layer runs on
        for number, layer in zip(level_of, cache.layers, strict=False):
            sizes[number] = max(sizes[number], layer.max_cache_len)
        record.lay_out(sizes)
    keep(cache, record)
    for layer in reversed(range(min(len(level_of), len(cache.layers)))):
        if isinstance(getattr(cache.layers[layer], "keys", None), Tensor):
            record.layer, record.level = layer, level_of[layer]
            break
    _note_keys(cache, record)


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
