"""What strategies ask of the vision tower, heard while it runs, and found again by its output.

The tower runs ahead of the decoder, in the same call or, in `generate`, before any. Hooks on the
asked layers keep what their projections gave; when the model's own `get_image_features` returns,
signals of each visual token are made of it. They are kept by the object that the features came in,
weakly: a call finds those of its own features, or is refused.

Shape suffixes: N sequences that attend to themselves, L positions of one, P patches, H heads,
C channels, T visual tokens of the features, K patches of a token, B batch rows, V visual tokens.
"""

from __future__ import annotations

import functools
import inspect
import threading
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tokenprune.engine.masks import dense, visible
from tokenprune.engine.rows import Bools, Ints, Rows
from tokenprune.families.anatomy import Anatomy
from tokenprune.families.attending import Attending, in_runs, of_fused
from tokenprune.families.tower import Patches, VisionParts, num_tokens
from tokenprune.strategy import Need, VisionNeed, VisionRows, VisionStates
from tokenprune.tensors import attention_rows, single_precision, to_device

#: Bytes of float32 attention weights that one chunk of query rows may take.
CHUNK_BYTES = 2**27
#: Methods that make features, by the kind of their placeholders.
METHODS = {"image": "get_image_features", "video": "get_video_features"}


@dataclass(eq=False)
class Heard:
    """What one layer of the tower did in one run.

    Attributes:
        queries: What its projection of queries gave.
        keys: What its projection of keys gave.
        hidden: Its output.
        attending: What its attention weights are made of.
        named: Arguments of its attention.
    """

    queries: Tensor | None = None
    keys: Tensor | None = None
    hidden: Tensor | None = None
    attending: Attending | None = None
    named: Mapping[str, Any] = field(default_factory=dict)

    def device(self) -> torch.device:
        """Where it ran."""
        return self._some().device

    def shape(self) -> tuple[int, int]:
        """Sequences N and their positions L."""
        length = self._some().shape[-2]
        return self._some().shape[:-1].numel() // length, length  # of (N, L, C) or (P, C)

    def _some(self) -> Tensor:
        return next(v for v in (self.hidden, self.keys, self.queries) if v is not None)


@dataclass(frozen=True, eq=False)
class Signals:
    """What is known of the visual tokens that one call of a features' method made.

    Attributes:
        values: By need, (T, ...).
        tiles: int64 (T,), the tile of each, on the host; -1 for tokens without patches.
        given: (..., C), what the projector was given of each patch, if a strategy mixes there.
        patch: int64 (T,), the patch of each token, -1 for none, if so.
    """

    values: Mapping[Need, Tensor]
    tiles: Ints
    given: Tensor | None = None
    patch: Tensor | None = None


class Watch:
    """Hears the vision tower of one model.

    Attributes:
        parts: The tower.
        needs: What is asked of it.
        mixes: Whether survivors are mixed before the projector.
    """

    def __init__(
        self, parts: VisionParts, needs: frozenset[VisionNeed], mixes: bool = False
    ) -> None:
        self.parts = parts
        self.needs = needs
        self.mixes = mixes
        self._thread = threading.local()
        self._known: dict[int, tuple[weakref.ref[Any], Signals]] = {}

    # -- hooks on the tower ----------------------------------------------------------------------

    def hook(self) -> list[Any]:
        """Hooks on the layers that are asked, and on nothing else."""
        found, names = [], self.parts.tower
        numbers = sorted({need.layer for need in self.needs})
        for number, layers in product(numbers, (self.parts.layers, *self.parts.others)):
            kinds = {_kind(need) for need in self.needs if need.layer == number}
            attention = getattr(layers[number], names.attention)
            for what in ("queries", "keys"):
                if {"rows", what} & kinds:
                    module = getattr(attention, getattr(names, what))
                    found.append(module.register_forward_hook(self._note(number, what)))
            if "rows" in kinds:
                after = self._note_attending(number)
                found.append(attention.register_forward_hook(after, with_kwargs=True))
            if "hidden" in kinds:
                layer = layers[number]
                found.append(layer.register_forward_hook(self._note(number, "hidden")))
        if self.mixes and self.parts.projector is not None:
            found.append(self.parts.projector.register_forward_pre_hook(self._note_given))
        return found

    def _note_given(self, module: Any, args: Any) -> None:
        if getattr(self._thread, "layers", None) is not None:
            self._thread.given = args[0]

    def _note(self, number: int, what: str) -> Callable[..., None]:
        def hook(module: Any, args: Any, output: Any) -> None:
            heard = self._heard(number)
            if heard is not None:
                value = output[0] if isinstance(output, tuple) else output
                setattr(heard, what, value.detach())

        return hook

    def _note_attending(self, number: int) -> Callable[..., None]:
        tower = self.parts.tower

        @torch.no_grad()
        def hook(module: Any, args: Any, kwargs: Any, output: Any) -> None:
            heard = self._heard(number)
            if heard is not None:  # while the layer's weights are at hand
                names = inspect.signature(type(module).forward).parameters
                heard.named = dict(zip(list(names)[1:], args, strict=False)) | kwargs
                heard.attending = tower.attending(module, heard.named, heard.queries, heard.keys)

        return hook

    def _heard(self, number: int) -> Heard | None:
        """Where a layer's doings are noted; None outside a call that makes features.

        Gradient checkpointing computes layers anew in the backward pass, which is none.
        """
        layers: dict[int, Heard] | None = getattr(self._thread, "layers", None)
        return None if layers is None else layers.setdefault(number, Heard())

    # -- the calls that make features ------------------------------------------------------------

    def noted(
        self, kind: str, features: Callable[..., Any], found: Callable[[str, Signals], None]
    ) -> Callable[..., Any]:
        """A method that makes features, and signals beside them.

        Args:
            kind: `"image"` or `"video"`.
            features: The model's own method.
            found: Is told of what was made within a call.
        """
        parameters = inspect.signature(features)

        @functools.wraps(features)
        def method(*args: Any, **kwargs: Any) -> Any:
            if getattr(self._thread, "layers", None) is not None:  # one that calls another
                return features(*args, **kwargs)
            layers: dict[int, Heard] = {}
            self._thread.layers, self._thread.given = layers, None
            try:
                output = features(*args, **kwargs)
            finally:
                self._thread.layers = None
                given, self._thread.given = self._thread.given, None
            if kwargs.get("return_dict") is False:  # no call of the model's own
                return output
            named = dict(parameters.bind(*args, **kwargs).arguments)
            named |= named.pop("kwargs", {})
            count = num_tokens(output)
            signals = make_signals(self.parts, self.needs, layers, named, count, given)
            self._keep(output, signals)
            found(kind, signals)
            return output

        return method

    def _keep(self, output: Any, signals: Signals) -> None:
        try:
            key, known = id(output), self._known
            known[key] = weakref.ref(output, lambda _: known.pop(key, None)), signals
        except TypeError:  # a tuple: nothing hands it on to another call
            return

    def known(self, output: Any) -> Signals | None:
        """Signals of what a features' method returned, while that lives."""
        reference, signals = self._known.get(id(output), (lambda: None, None))
        return signals if reference() is output else None

    def forget(self) -> None:
        """Forgets all that was heard."""
        self._known.clear()


def _kind(need: VisionNeed) -> str:
    """What of a layer a need reads: `"rows"`, `"hidden"`, `"keys"` or `"queries"`."""
    return need.what if isinstance(need, VisionStates) else "rows"


# ------------------------------------------------------------------------------------------ signals


@torch.no_grad()
def make_signals(
    parts: VisionParts,
    needs: frozenset[VisionNeed],
    layers: Mapping[int, Heard],
    named: Mapping[str, Any],
    count: int,
    given: Tensor | None = None,
) -> Signals:
    """Signals (T, ...) of the visual tokens that one run of the tower made.

    Args:
        parts: The tower.
        needs: What is asked.
        layers: What the asked layers did.
        named: Arguments of the method that ran the tower.
        count: Visual tokens T that it made.
        given: What the projector was given, if survivors are mixed there.

    Raises:
        ValueError: If it cannot be said which patches make up each token.
    """
    heard = layers[next(iter(needs)).layer]
    num_sequences, length = heard.shape()
    start, stop = parts.span(length)
    index = torch.arange(num_sequences * (stop - start)).view(num_sequences, -1)
    index = torch.nn.functional.pad(index, (start, length - stop), value=-1)
    tiles = torch.arange(num_sequences).repeat_interleave(stop - start)
    if parts.tower.frames is not None:
        tiles = parts.tower.frames(parts.base, named)
    patches = parts.tower.patches(parts.base, named, index)
    if len(patches.index) != count:
        raise ValueError(
            f"prune: expected the patches of {count} visual tokens, got those of "
            f"{len(patches.index)} from what is known of {type(parts.base).__name__}. "
            "Choose a strategy that does not read the vision tower."
        )
    largest = patches.index.amax(1)
    of_token = tiles[largest.clamp_min(0)].where(largest >= 0, -1)
    patches = _placed(patches, heard.device())
    values: dict[Need, Tensor] = {}
    for need in sorted(needs, key=repr):
        values[need] = _mean(_of_patches(parts, need, layers[need.layer], tiles), patches)
    patch = None
    if given is not None:
        if patches.index.shape[1] > 1 or given.shape[:-1].numel() != len(tiles):
            raise ValueError(
                f"prune: expected a projector that is given each of {len(tiles)} patches, got one "
                f"of {given.shape[:-1].numel()}, for survivors that are mixed before it. Mix them "
                'in space="decoder".'
            )
        patch = patches.index[:, 0]
    return Signals(values, of_token.numpy(), given, patch)


def _placed(patches: Patches, device: torch.device) -> Patches:
    return Patches(patches.index.to(device), to_device(patches.shares, device))


def _mean(values: Tensor, patches: Patches) -> Tensor:
    """Values (P, ...) of patches, mean over those of each token, (T, ...)."""
    shares = patches.shares
    exists_TK = patches.index >= 0
    if shares is None:
        shares = exists_TK.float()
        shares = shares / shares.sum(1, keepdim=True).clamp_min(1)
    else:
        shares = shares * exists_TK
    shares = shares.to(values.dtype)
    taken = values[patches.index.clamp_min(0)]  # (T, K, ...)
    return torch.einsum("tk...,tk->t...", taken, shares)


def _of_patches(parts: VisionParts, need: VisionNeed, heard: Heard, tiles: Tensor) -> Tensor:
    """What is asked of each patch, (P, H) or (P, C)."""
    if isinstance(need, VisionStates):
        values: Tensor = getattr(heard, need.what)
        if need.what != "hidden" and parts.tower.is_fused:
            values = of_fused(parts.attention(need.layer), need.what, values)
        values = values if values.dim() == 3 else values[None]  # (N, L, C)
        start, stop = parts.span(values.shape[1])
        values = values[:, start:stop].to(torch.promote_types(values.dtype, torch.float32))
        return values.flatten(0, 1)
    assert isinstance(need, VisionRows)
    assert heard.attending is not None
    attending, packed = heard.attending, parts.tower.frames is not None
    if packed:
        ends = heard.named.get("cu_seqlens")
        attending = in_runs(attending, tiles.bincount() if ends is None else ends.diff().cpu())
    else:
        valid = _valid(heard.named.get("attention_mask"), attending.keys)
        attending = replace(attending, valid=valid)
    if need.heads == "one":
        attending = attending.as_one_head()
    start, stop = parts.span(attending.keys.shape[2])
    with single_precision(attending.keys.device):
        if need.queries == "class":
            asking = parts.class_position(attending.keys.shape[2])
            rows = _rows(attending, asking, asking + 1)[:, :, 0, start:stop]
            return rows.transpose(1, 2).flatten(0, 1)
        received = _received(attending, start, stop).transpose(1, 2)  # (N, P, H)
    if not packed:
        if attending.valid is None:
            return received.flatten(0, 1) / received.shape[1]
        num_asking = attending.valid[:, start:stop].sum(1).clamp_min(1)
        return (received / num_asking[:, None, None]).flatten(0, 1)
    values = received.flatten(0, 1)
    if attending.valid is not None:
        values = values[attending.valid.flatten()]
    of_frame = tiles.bincount()[tiles]  # of windows, those of the whole frame
    return values / of_frame.to(values.device)[:, None]


def _valid(mask: Any, keys: Tensor) -> Tensor | None:
    """Which positions of the tower's sequences are no padding, bool (N, L); None for all."""
    if isinstance(mask, Tensor) and mask.dim() == 2:
        return mask.bool()
    given = dense(mask, len(keys))
    return None if given is None else visible(given).any(1)


def _rows(attending: Attending, start: int, stop: int) -> Tensor:
    """Attention of some positions of each sequence to all of its own, (N, H, Q, L), float32."""
    allowed = None if attending.valid is None else attending.valid[:, None, None]
    return attention_rows(
        attending.queries[:, :, start:stop], attending.keys, allowed, attending.scaling
    )


def _received(attending: Attending, first: int, stop: int) -> Tensor:
    """Attention that patches get from all patches of their sequence, summed (N, H, P), float32.

    Args:
        attending: What the attention is made of.
        first: First patch; what precedes it does not ask.
        stop: First position after the last patch.
    """
    num_sequences, num_heads, length, _ = attending.queries.shape
    chunk = max(1, CHUNK_BYTES // (4 * num_sequences * num_heads * length))
    total = attending.keys.new_zeros(num_sequences, num_heads, length, dtype=torch.float32)
    for start in range(first, stop, chunk):
        end = min(start + chunk, stop)
        rows = _rows(attending, start, end)
        if attending.valid is not None:
            rows = rows * attending.valid[:, None, start:end, None]
        total += rows.sum(2)
    return total[:, :, first:stop]


# ----------------------------------------------------------------------------------- of one's call


@dataclass(frozen=True, eq=False)
class Seen:
    """Signals of a call's visual tokens.

    Attributes:
        parts: Those of its features.
        index: int64 (B, V), of each visual token its number in them, one after another; what does
            not exist has the number after the last.
        tiles: int64 (B, V), the tile of each, numbered within the row; -1 for none.
        tile_shape: Tiles that a row has at most, and tokens that a tile has at most.
    """

    parts: list[Signals]
    index: Ints
    tiles: Ints
    tile_shape: tuple[int, int]

    def signal(self, need: Need, index_BV: Tensor) -> Tensor:
        """A signal of the call's visual tokens, (B, V, ...); zeros for what does not exist.

        Args:
            need: Which.
            index_BV: The index, on the device where it is needed.
        """
        known = [to_device(part.values[need], index_BV.device) for part in self.parts]
        if (self.index == sum(len(part.tiles) for part in self.parts)).any():
            known.append(known[0].new_zeros(1, *known[0].shape[1:]))
        joined = known[0] if len(known) == 1 else torch.cat(known)
        return joined.index_select(0, index_BV.flatten()).view(*index_BV.shape, *joined.shape[1:])

    def given(self, index_BV: Tensor) -> Tensor:
        """What the projector was given of a call's tokens, (B, V, C); zeros for what has none."""
        known = []
        for part in self.parts:
            assert part.given is not None
            assert part.patch is not None
            patch = part.patch.to(part.given.device)
            own = part.given.flatten(0, -2)[patch.clamp_min(0)]
            known.append(own.masked_fill((patch < 0)[:, None], 0).to(index_BV.device))
        known.append(known[0].new_zeros(1, known[0].shape[1]))
        joined = torch.cat(known)
        return joined.index_select(0, index_BV.flatten()).view(*index_BV.shape, -1)


def match(
    watch: Watch,
    anatomy: Anatomy,
    inputs: Mapping[str, Any],
    made: Mapping[str, Signals],
    rows: Rows,
) -> Seen:
    """Signals of the features that a call was given, or made itself.

    Args:
        watch: What has heard the tower.
        anatomy: The model's parts.
        inputs: Arguments of the modules above the decoder.
        made: Signals of features that the call made, by kind.
        rows: The call's rows.

    Raises:
        ValueError: If there are none, or not of all visual tokens.
    """
    given: Any = inputs.get("mm_encoder_outputs")
    given = given if isinstance(given, Mapping) else {}
    index_BT = np.full(rows.visual.shape, -1, dtype=np.int64)
    parts: list[Signals] = []
    start = 0
    for kind in METHODS:
        signals = made.get(kind) if given.get(kind) is None else watch.known(given[kind])
        marked = rows.visual
        if rows.ids is not None:
            marked = np.isin(rows.ids, anatomy.placeholders(kind))
        if signals is None or not marked.any():
            continue
        count = len(signals.tiles)
        number_BT = _numbers(marked, count)
        if number_BT is None:
            continue
        index_BT = np.where(marked, number_BT + start, index_BT)
        parts.append(signals)
        start += count
    index_BV = _of_visual(index_BT, rows, start)
    if (index_BV < 0).any():
        raise ValueError(
            "prune: expected images that the vision tower encodes while the model is pruned, for a "
            f"strategy that reads it ({', '.join(map(repr, sorted(watch.needs, key=repr)))}), got "
            "visual tokens whose features were made before, elsewhere, or in parts. Pass pixels, "
            "and leave prefill_chunk_size out."
        )
    return Seen(parts, index_BV, *_tiles(parts, index_BV))


def _tiles(parts: list[Signals], index_BV: Ints) -> tuple[Ints, tuple[int, int]]:
    """Tiles of a call's visual tokens, numbered within the row, and how many of how many tokens."""
    through, start = [], 0
    for part in parts:
        through.append(np.where(part.tiles < 0, -1, part.tiles + start))
        start = int(through[-1].max(initial=start - 1)) + 1
    tiles_BV = np.concatenate([*through, [-1]])[index_BV]
    most, length = 1, 1
    for row in tiles_BV:
        _, row[row >= 0], sizes = np.unique(row[row >= 0], return_inverse=True, return_counts=True)
        most, length = max(most, len(sizes)), max(length, int(sizes.max(initial=0)))
    return tiles_BV, (most, length)


def _numbers(marked: Bools, count: int) -> Ints | None:
    """Numbers of marked tokens among the features', int64 (B, T); None where they do not fit.

    Generation repeats rows (beams, several returned sequences), and shows each the same features.
    """
    own = marked.sum(1)
    times, rest = divmod(int(own.sum()), count) if count else (0, 0)
    if rest or times == 0 or len(own) % times:
        return None
    groups = own.reshape(-1, times)
    if (groups != groups[:, :1]).any():
        return None
    before = np.cumsum(groups[:, 0]) - groups[:, 0]
    numbers: Ints = np.cumsum(marked, 1) - 1 + np.repeat(before, times)[:, None]
    return numbers


def _of_visual(index_BT: Ints, rows: Rows, pad: int) -> Ints:
    """Entries of the visual tokens of each row, int64 (B, V), filled up with `pad`."""
    table = np.full((len(index_BT), max(rows.num_visual)), pad, dtype=np.int64)
    for row, marked in enumerate(rows.visual):
        table[row, : rows.num_visual[row]] = index_BT[row][marked]
    return table
