"""The engine: hooks that prune visual tokens inside an unmodified model.

The only part that touches a model. A call goes through three kinds of hook:

* on the modules above the decoder, which see `input_ids`, `labels` and `visual_mask`;
* on the decoder: a pass begins (`_Pass`) and ends;
* on each decoder layer from the first cut on: tokens are cut, side tensors replaced.

A cut divides a pass into levels: level 0 runs on all tokens, level s on what cut s left. What the
layers of each level hold in the key-value cache is written in a `_Record` on the cache object.

Shape suffixes: B batch rows, T positions of a call, N positions at a level, V visual tokens alive,
Q query rows, K keys, H heads, D hidden size.
"""

from __future__ import annotations

import hashlib
import inspect
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from tokenprune.adapters import Anatomy, examine, mark_visual, places
from tokenprune.schedule import Schedule
from tokenprune.strategy import AttentionRows, PruningStrategy, Selection, TokenView
from tokenprune.tensors import ascending, attention_rows, causal, hide_pads, known_keys, take

POSITIONS = ("original", "renumbered")
LOGITS = ("all", "supervised")
_RECORD = "_tokenprune_record"
_ATTENTIONS = ("eager", "sdpa", "flash_attention_2", "flash_attention_3")
#: Bytes of float32 attention weights that one chunk of query rows may take.
_CHUNK_BYTES = 2**27


# ------------------------------------------------------------------------------------- the trace


@dataclass(frozen=True, eq=False)
class TracedStage:
    """One cut of the latest call that had visual tokens.

    Attributes:
        layer: The cut happened before this layer.
        kept: Per row, int64 ascending: surviving tokens in the sample's own visual coordinates.
        scores: Per row, float32: scores of the tokens alive before the cut, or None.
    """

    layer: int
    kept: list[Tensor]
    scores: list[Tensor] | None


@dataclass(eq=False)
class Trace:
    """What a run did.

    Attributes:
        stages: One entry per cut of the latest call that had visual tokens.
        lengths: int64 (num_layers, B): real tokens, without pads, that each layer processed.
        visual_lengths: int64 (num_layers, B): visual tokens among them.
        places: Per row, int64 (V, 4): image, grid, row and column of each visual token of that
            call, -1 where unknown.
    """

    stages: list[TracedStage] = field(default_factory=list)
    lengths: Tensor = field(default_factory=lambda: torch.empty(0, 0, dtype=torch.int64))
    visual_lengths: Tensor = field(default_factory=lambda: torch.empty(0, 0, dtype=torch.int64))
    places: list[Tensor] = field(default_factory=list)


# --------------------------------------------------------------------- what a cache remembers


@dataclass(eq=False)
class _Held:
    """Tokens that the layers of one level hold in the cache, but for the record's tail.

    Attributes:
        columns: int64 (B, N), their columns in the unpruned conversation.
        real: Bool (B, N), or None if none is a pad.
        shift: int64 (B, 1), the model's position minus the layer's, or None if they agree.
    """

    columns: Tensor
    real: Tensor | None
    shift: Tensor | None


@dataclass(eq=False)
class _Record:
    """What a cache holds at each level.

    Attributes:
        cuts: Layers of the schedule that wrote it.
        num_columns: Columns of the conversation so far.
        num_visual: Visual tokens so far, per row.
        held: One entry per level.
        tail: Latest columns, text without pads, that every level holds besides.
    """

    cuts: tuple[int, ...]
    num_columns: int
    num_visual: list[int]
    held: list[_Held]
    tail: int = 0

    def length(self, level: int) -> int:
        return self.held[level].columns.shape[1] + self.tail

    def columns(self, level: int) -> Tensor:
        columns = self.held[level].columns
        new = torch.arange(self.num_columns - self.tail, self.num_columns, device=columns.device)
        return torch.cat([columns, new.expand(columns.shape[0], -1)], 1)

    def real(self, level: int) -> Tensor | None:
        real = self.held[level].real
        return None if real is None else nn.functional.pad(real, (0, self.tail), value=True)

    def crop(self, num_columns: int) -> None:
        """Forgets the latest columns, as `cache.crop` did (assisted decoding)."""
        dropped = self.num_columns - num_columns
        if dropped > self.tail:
            raise ValueError(
                f"prune: expected a cache cropped by at most {self.tail} columns, the text after "
                f"the pruned prompt, got {dropped}. Start from a copy of the cache instead."
            )
        self.tail -= dropped
        self.num_columns = num_columns


# ------------------------------------------------------------------------- one pass, its levels


@dataclass(eq=False)
class _Level:
    """The tokens of one pass between two cuts.

    Attributes:
        index: int64 (B, N), where they stood at the level before; None if nothing was removed.
        columns: int64 (B, N), columns in the unpruned conversation.
        real: Bool (B, N), or None if none is a pad.
        num_real: Real tokens per row.
        visual: Bool (B, N).
        num_visual: Visual tokens alive per row.
        coordinate: int64 (B, N), a visual token's number within its sample.
        queries: float32 (B, N), weight of each position among the `"last"` query rows.
        positions: int64 (B, N), positions that the model gave; set at the first hooked layer.
        moved: int64 (B, N), positions that the layers of this level use instead, if others.
        shift: int64 (B, 1), the model's next position minus the layer's, if not 0.
        side: Side tensors of this level, by name and identity of the original.
    """

    index: Tensor | None
    columns: Tensor
    real: Tensor | None
    num_real: list[int]
    visual: Tensor
    num_visual: list[int]
    coordinate: Tensor
    queries: Tensor
    positions: Tensor | None = None
    moved: Tensor | None = None
    shift: Tensor | None = None
    side: dict[tuple[str, int], Any] = field(default_factory=dict)


@dataclass(eq=False)
class _Call:
    """What the modules above the decoder were called with."""

    inputs: dict[str, Any] = field(default_factory=dict)
    depth: int = 0
    late_labels: list[tuple[Tensor, bool]] = field(default_factory=list)
    hide_logits: bool = False


@dataclass(eq=False)
class _Pass:
    """One run of the decoder's layers over new tokens.

    Attributes:
        call: The call that it belongs to.
        offset: Columns of the conversation before it.
        record: What the cache holds from before, or None.
        cache: The cache, once a layer has shown it.
        levels: Level 0, and one more per cut done.
        prunes: Whether it has visual tokens.
        max_queries: Largest number of `"last"` query rows in a batch row.
        unpruned: Rows that keep everything: labels, but none that follows an unlabelled token.
        places: Places of the visual tokens, once asked for.
        rows: Attention computed for a cut, by its layer and request.
        stages: The trace of the cuts done.
    """

    call: _Call
    offset: int
    record: _Record | None
    cache: Any
    levels: list[_Level]
    prunes: bool
    max_queries: int
    unpruned: list[bool]
    original: list[int]
    places: list[Tensor]
    ids: Tensor | None
    rows: dict[tuple[int, AttentionRows], Tensor] = field(default_factory=dict)
    stages: list[TracedStage] = field(default_factory=list)


_attached: weakref.WeakKeyDictionary[nn.Module, Handle]
_attached = weakref.WeakKeyDictionary()


class Handle:
    """Pruning attached to a model, until `remove()`.

    Attributes:
        trace: What the latest call did.
    """

    def __init__(
        self,
        anatomy: Anatomy,
        strategy: PruningStrategy,
        schedule: Schedule,
        positions: str,
        logits: str,
        visual_mask: Tensor | None,
    ) -> None:
        self.trace = Trace()
        self._anatomy = anatomy
        self._strategy = strategy
        self._schedule = schedule
        self._renumber = positions == "renumbered"
        self._supervised = logits == "supervised"
        self._visual_mask = visual_mask
        self._cuts = tuple(stage.layer for stage in schedule.stages)
        self._requests = strategy.attention_rows()
        self._thread = threading.local()
        # A layer recomputed by gradient checkpointing finds its pass by the tensors handed to it.
        self._passes = WeakTensorKeyDictionary()
        self._hooks: list[Any] = []
        self._parameters: dict[nn.Module, list[str]] = {}

    # -- hooking ---------------------------------------------------------------------------------

    def _hook(self) -> None:
        for entry in self._anatomy.entries:
            self._register(entry, self._enter, self._leave)
        self._register(self._anatomy.decoder, self._begin, self._end)
        first = min(self._cuts, default=len(self._anatomy.layers))
        for index, layer in enumerate(self._anatomy.layers):
            if index >= first - 1:  # a cut may read the layer before it
                self._register(layer, self._layer_hook(index), None)

    def _register(
        self, module: nn.Module, before: Callable[..., Any], after: Callable[..., Any] | None
    ) -> None:
        names = list(inspect.signature(module.forward).parameters)
        self._parameters[module] = names
        self._hooks.append(module.register_forward_pre_hook(before, with_kwargs=True))
        if after is not None:
            # Also after an exception, so that no pass outlives its call.
            self._hooks.append(
                module.register_forward_hook(after, with_kwargs=True, always_call=True)
            )

    def remove(self) -> None:
        """Detaches from the model, which is then as it was found. May be called twice."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        if _attached.get(self._anatomy.decoder) is self:
            del _attached[self._anatomy.decoder]

    def _named(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict:
        return dict(zip(self._parameters[module], args, strict=False)) | dict(kwargs)

    # -- above the decoder -----------------------------------------------------------------------

    def _enter(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        call = self._current_call()
        if call is None or call.depth == 0:
            call = self._thread.call = _Call()
        call.depth += 1
        named = self._named(module, args, kwargs)
        mask = named.pop("visual_mask", None)
        given = {k: v for k, v in named.items() if v is not None}
        call.inputs = given | call.inputs | ({} if mask is None else {"visual_mask": mask})
        labels = named.get("labels")
        if labels is None or not self._cuts:
            return (args, kwargs) if mask is None else ((), named)
        # The model's own loss runs on the labels of the survivors, which are known only after the
        # decoder: it gets tensors that `_end` fills.
        if isinstance(named.get("logits_to_keep"), Tensor):
            raise ValueError(
                "prune: expected an integer logits_to_keep together with labels, got a tensor. "
                "Its indices would point into the unpruned sequence."
            )
        named["labels"] = labels.clone()
        call.late_labels.append((named["labels"], False))
        if self._supervised or named.get("shift_labels") is not None:
            named["shift_labels"] = labels.clone()
            call.late_labels.append((named["shift_labels"], True))
        call.hide_logits = self._supervised
        return (), named

    def _leave(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        call = self._current_call()
        if call is None:
            return None
        call.depth -= 1
        if call.depth > 0 or not call.hide_logits or output is None:
            return None
        if isinstance(output, tuple):
            raise ValueError(
                'prune: expected return_dict=True with logits="supervised", got a tuple. '
                "Leave return_dict out."
            )
        return type(output)(**{key: output[key] for key in output if key != "logits"})

    def _current_call(self) -> _Call | None:
        return getattr(self._thread, "call", None)

    # -- the decoder -----------------------------------------------------------------------------

    def _begin(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        named = self._named(module, args, kwargs)
        call = self._current_call()
        if call is None or call.depth == 0:
            call = _Call()
        mask = named.pop("visual_mask", None)
        given = {key: value for key, value in named.items() if value is not None}
        inputs = given | call.inputs | ({} if mask is None else {"visual_mask": mask})
        tokens = given["inputs_embeds"] if "inputs_embeds" in given else given["input_ids"]
        run = self._thread.run = self._plan(call, inputs, tokens)
        if run.record is not None and given.get("position_ids") is None:
            # The model would count on from its first layer, which a cut at layer 0 has shortened.
            step = torch.arange(tokens.shape[1], device=tokens.device) + run.offset
            named["position_ids"] = step[None]
        return (), named

    def _end(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        run: _Pass | None = getattr(self._thread, "run", None)
        self._thread.run = None
        if run is None or output is None:  # output is None after an exception
            return None
        cache = run.cache if run.cache is not None else getattr(output, "past_key_values", None)
        if cache is not None:
            setattr(cache, _RECORD, self._recorded(run))
        if any(run.original) or run.offset == 0:
            self._write_trace(run)
        return self._fill_labels(run, output)

    def _plan(self, call: _Call, inputs: dict[str, Any], tokens: Tensor) -> _Pass:
        num_rows, length = tokens.shape[:2]
        device = tokens.device
        cache = inputs.get("past_key_values")
        record = self._find_record(cache, num_rows, inputs.get("attention_mask"))
        offset = record.num_columns if record is not None else 0
        visual = self._find_visual(inputs, num_rows, length, offset, device)
        padding = inputs.get("attention_mask")
        real: Tensor | None = None
        if isinstance(padding, Tensor) and padding.dim() == 2 and (length > 1 or offset == 0):
            real = padding[:, offset : offset + length].to(device=device, dtype=torch.bool)
        queries, labelled = self._query_weights(inputs, real, num_rows, length, device)
        facts: list[list[int]]
        if visual is None and real is None:  # a decoding step: nothing to ask the device
            facts = [[0, length, 1]] * num_rows
        else:
            shown = torch.zeros(num_rows, dtype=torch.int64, device=device)
            facts = torch.stack(
                [
                    shown if visual is None else visual.sum(1),
                    shown + length if real is None else real.sum(1),
                    (queries > 0).sum(1),
                ],
                1,
            ).tolist()
        num_visual = [fact[0] for fact in facts]
        num_real = [fact[1] for fact in facts]
        prunes = any(num_visual) and bool(self._cuts)
        if visual is None:
            visual = torch.zeros(num_rows, length, dtype=torch.bool, device=device)
        seen = record.num_visual if record is not None else [0] * num_rows
        start = torch.tensor(seen, device=device)[:, None] if any(seen) else 0
        level = _Level(
            index=None,
            columns=(torch.arange(length, device=device) + offset).expand(num_rows, -1),
            real=None if all(n == length for n in num_real) else real,
            num_real=num_real,
            visual=visual,
            num_visual=num_visual,
            coordinate=visual.cumsum(1) - 1 + start if prunes else visual.long(),
            queries=queries,
        )
        run = _Pass(
            call=call,
            offset=offset,
            record=record,
            cache=cache,
            levels=[level],
            prunes=prunes,
            max_queries=max(fact[2] for fact in facts),
            unpruned=[labelled and fact[2] == 0 for fact in facts],
            original=num_visual,
            places=places(self._anatomy, inputs, visual, num_visual) if any(num_visual) else [],
            ids=inputs.get("input_ids"),
        )
        if prunes:
            self._check_packed(inputs, run)
        return run

    def _find_record(self, cache: Any, num_rows: int, padding: Any) -> _Record | None:
        if cache is None or not hasattr(cache, "get_seq_length"):
            return None
        if getattr(cache, "is_compileable", False):
            raise ValueError(
                f"prune: expected a cache that grows, got {type(cache).__name__}. "
                "Leave cache_implementation out."
            )
        first = int(cache.get_seq_length())
        if first == 0:
            return None
        levels = [sum(cut <= i for cut in self._cuts) for i in range(len(self._anatomy.layers))]
        held = [int(cache.get_seq_length(index)) for index in range(len(levels))]
        record: _Record | None = getattr(cache, _RECORD, None)
        if record is None:
            if len(set(held)) > 1:
                raise ValueError(
                    f"prune: expected a cache that this engine filled, got one whose layers hold "
                    f"{sorted(set(held), reverse=True)} tokens and no record of which. "
                    "Start again from an empty cache."
                )
            device = cache.layers[0].keys.device
            columns = torch.arange(first, device=device).expand(num_rows, -1)
            real = None
            if isinstance(padding, Tensor) and padding.dim() == 2 and not padding[:, :first].all():
                real = padding[:, :first].to(device=device, dtype=torch.bool)
            held_by_all = [_Held(columns, real, None)] * (len(self._cuts) + 1)
            return _Record(self._cuts, first, [0] * num_rows, held_by_all)
        if record.cuts != self._cuts:
            raise ValueError(
                f"prune: expected a cache pruned at layers {list(self._cuts)}, got one pruned at "
                f"{list(record.cuts)}. Continue a conversation with the schedule it began with."
            )
        dropped = {record.length(s) - n for s, n in zip(levels, held, strict=True)}
        if len(dropped) > 1:
            raise ValueError(
                f"prune: expected layers that hold {[record.length(s) for s in levels]} tokens, "
                f"got {held}. Something else changed this cache."
            )
        (shorter,) = dropped
        if shorter:
            record.crop(record.num_columns - shorter)
        return record

    def _find_visual(
        self, inputs: dict[str, Any], num_rows: int, length: int, offset: int, device: Any
    ) -> Tensor | None:
        mask = inputs.get("visual_mask", self._visual_mask)
        if mask is not None:
            if mask.dim() != 2 or mask.dtype != torch.bool or num_rows % mask.shape[0]:
                raise ValueError(
                    f"prune: expected visual_mask of dtype bool and shape ({num_rows}, T), got "
                    f"{mask.dtype} and {tuple(mask.shape)}. Mark the visual columns with True."
                )
            part = mask[:, offset : offset + length].to(device)
            if part.shape[1] == 0:
                return None
            part = nn.functional.pad(part, (0, length - part.shape[1]))
            return part.repeat_interleave(num_rows // mask.shape[0], 0)
        # A generated id is text, whatever its number: later calls show images only with pixels.
        if offset > 0 and not any("pixel" in key for key in inputs):
            return None
        if not self._anatomy.visual_ids:
            raise ValueError(
                f"prune: expected visual_mask, because {type(self._anatomy.entries[0]).__name__} "
                "has no placeholder ids for visual tokens. Pass it to prune or to the call, bool "
                "(B, T)."
                if self._anatomy.entries
                else "prune: expected visual_mask with a bare decoder. Pass it to prune or to the "
                "call, bool (B, T)."
            )
        ids = inputs.get("input_ids")
        if ids is None:
            raise ValueError(
                "prune: expected input_ids or visual_mask, got inputs_embeds alone. Pass "
                "visual_mask, bool (B, T), to say which columns are visual."
            )
        return mark_visual(self._anatomy.visual_ids, ids).to(device)

    @staticmethod
    def _query_weights(
        inputs: dict[str, Any], real: Tensor | None, num_rows: int, length: int, device: Any
    ) -> tuple[Tensor, bool]:
        """Weights (B, T) of the `"last"` query rows, and whether labels decided them."""
        labels = inputs.get("labels")
        if labels is None and inputs.get("shift_labels") is not None:
            labels = nn.functional.pad(inputs["shift_labels"], (1, 0), value=-100)[:, :-1]
        if labels is not None:
            labelled = labels.to(device) != -100
            asks = ~labelled & nn.functional.pad(labelled, (0, 1))[:, 1:]
            if real is not None:
                asks &= real
        elif real is None:
            asks = torch.zeros(num_rows, length, dtype=torch.bool, device=device)
            asks[:, -1] = True
        else:
            last = (real * torch.arange(1, length + 1, device=device)).argmax(1)
            asks = torch.arange(length, device=device) == last[:, None]
        weights = asks / asks.sum(1, keepdim=True).clamp_min(1)
        return weights, labels is not None

    def _check_packed(self, inputs: dict[str, Any], run: _Pass) -> None:
        position_ids = inputs.get("position_ids")
        if position_ids is None:
            return
        if position_ids.dim() > 2:
            if self._renumber:
                raise ValueError(
                    'prune: expected one-dimensional positions with positions="renumbered", got '
                    f'{position_ids.shape[0]}-dimensional ones. Use positions="original".'
                )
            return
        back = position_ids[:, 1:] <= position_ids[:, :-1]
        real = run.levels[0].real
        if real is not None:
            back = back & real[:, 1:] & real[:, :-1]
        if back.any():
            raise ValueError(
                "prune: expected position_ids that rise along each row, got a row that starts "
                "anew: several sequences packed into one. Pass them as rows of a batch."
            )

    # -- the layers ------------------------------------------------------------------------------

    def _layer_hook(self, index: int) -> Callable[..., Any]:
        before = sum(cut < index for cut in self._cuts)  # cuts done when the layer is reached
        stage = self._cuts.index(index) if index in self._cuts else None
        ahead = self._cuts.index(index + 1) if index + 1 in self._cuts else None
        requests = [request for request in self._requests if request.source == "previous"]

        def hook(module: nn.Module, args: Any, kwargs: Any) -> Any:
            named = self._named(module, args, kwargs)
            hidden = named.pop("hidden_states", None)
            if hidden is None:
                hidden = named.pop(self._parameters[module][0])
            run = self._find_run(named)
            if run is None:
                return None
            run.cache = named.get("past_key_values", run.cache)
            level_number = before
            if run.levels[0].positions is None and (run.prunes or self._renumber):
                self._set_positions(run, named)
            if stage is not None:
                if len(run.levels) == stage + 1:
                    run.levels.append(self._cut(run, stage, module, hidden, named))
                    if self._renumber:
                        self._renumber_level(run, stage + 1)
                level = run.levels[stage + 1]
                if level.index is not None:
                    hidden = take(hidden, level.index)
                level_number = stage + 1
            named = self._side_tensors(run, level_number, hidden, named)
            if ahead is not None and run.prunes and len(run.levels) == ahead + 1:
                for request in requests:
                    run.rows[index + 1, request] = self._attend(
                        run, level_number, module, hidden, named, request, index
                    )
            return (hidden,), named

        return hook

    def _find_run(self, named: Mapping[str, Any]) -> _Pass | None:
        embeddings = named.get("position_embeddings")
        key = embeddings[0] if isinstance(embeddings, tuple) else named.get("position_ids")
        run: _Pass | None = getattr(self._thread, "run", None)
        if run is None:  # recomputed during the backward pass
            return cast("_Pass | None", self._passes.get(key)) if key is not None else None
        if key is not None and self._anatomy.decoder.training:
            self._passes[key] = run
        return run

    def _set_positions(self, run: _Pass, named: Mapping[str, Any]) -> None:
        level = run.levels[0]
        given = named.get("position_ids")
        if given is not None and given.dim() > 2:
            given = given[0]
        if given is None:
            given = level.columns
        # A clone: a view would keep alive the tensor by which a recomputed layer finds its pass.
        level.positions = given.expand(level.columns.shape).clone()

    def _cut(
        self, run: _Pass, stage: int, module: nn.Module, hidden: Tensor, named: Mapping[str, Any]
    ) -> _Level:
        """Level after cut number `stage`: asks the strategy, keeps what it chose."""
        level = run.levels[stage]
        layer = self._cuts[stage]
        if not run.prunes:
            return replace(level, index=None, side={})
        budgets = [
            alive if skip else min(alive, self._schedule.count(stage, original))
            for alive, skip, original in zip(
                level.num_visual, run.unpruned, run.original, strict=True
            )
        ]
        width = max(level.num_visual)
        seats_BV = ascending(level.visual, width, left=False)
        alive_B = torch.tensor(level.num_visual, device=hidden.device)
        valid_BV = torch.arange(width, device=hidden.device) < alive_B[:, None]
        view = self._view(run, stage, module, hidden, named, seats_BV, valid_BV)
        with torch.no_grad():
            keep_B = torch.tensor(budgets, device=hidden.device)
            selection = self._strategy.select(view, keep_B)
        kept_BV = self._checked(selection, valid_BV)
        if not self._strategy.keeps_exactly:
            budgets = self._counted(kept_BV, budgets)
        order_BN = ascending(kept_BV, max(budgets), left=False)
        coordinates = take(take(level.coordinate, seats_BV), order_BN)
        scores = selection.scores
        run.stages.append(
            TracedStage(
                layer=layer,
                kept=[row[:n] for row, n in zip(coordinates, budgets, strict=True)],
                scores=None
                if scores is None
                else [row[:n] for row, n in zip(scores, level.num_visual, strict=True)],
            )
        )
        if budgets == level.num_visual:
            return replace(level, index=None, side={})
        seat_BN = (level.visual.cumsum(1) - 1).clamp_min(0)
        stays_BN = torch.where(level.visual, kept_BV.gather(1, seat_BN), True)
        if level.real is not None:
            stays_BN = stays_BN & level.real
        return self._shortened(level, stays_BN, budgets)

    def _checked(self, selection: Selection, valid_BV: Tensor) -> Tensor:
        kept = selection.kept
        if kept.dtype != torch.bool or kept.shape != valid_BV.shape:
            raise ValueError(
                f"{type(self._strategy).__name__}.select: expected a bool mask of shape "
                f"{tuple(valid_BV.shape)}, got {kept.dtype} of shape {tuple(kept.shape)}. "
                "Return Selection(kept=mask)."
            )
        return kept & valid_BV

    def _counted(self, kept_BV: Tensor, budgets: list[int]) -> list[int]:
        counts: list[int] = kept_BV.sum(1).tolist()
        if any(count > budget for count, budget in zip(counts, budgets, strict=True)):
            raise ValueError(
                f"{type(self._strategy).__name__}.select: expected at most {budgets} tokens per "
                f"row, got {counts}. Respect `keep`."
            )
        return counts

    @staticmethod
    def _shortened(level: _Level, stays_BN: Tensor, budgets: list[int]) -> _Level:
        """The level on which only the marked positions are left."""
        num_real = [
            real - alive + kept
            for real, alive, kept in zip(level.num_real, level.num_visual, budgets, strict=True)
        ]
        length = max(num_real)
        # Generation reads the last column: pad on the left unless the batch is padded on the right.
        left = level.real is None or bool(level.real[:, -1].all())
        index = ascending(stays_BN, length, left=left)
        real = None
        if any(n < length for n in num_real):
            real = take(stays_BN, index)
        assert level.positions is not None
        positions = take(level.positions, index)
        queries = take(level.queries, index)
        visual = take(level.visual, index)
        return _Level(
            index=index,
            columns=take(level.columns, index),
            real=real,
            num_real=num_real,
            visual=visual if real is None else visual & real,
            num_visual=budgets,
            coordinate=take(level.coordinate, index),
            queries=queries if real is None else queries * real,
            positions=positions,
        )

    def _renumber_level(self, run: _Pass, number: int) -> None:
        """Positions of a level whose rows lost tokens: 0, 1, ..., or on from what it holds."""
        level, first = run.levels[number], run.levels[0]
        assert level.positions is not None and first.positions is not None
        held = run.record.held[number].shift if run.record is not None else None
        removed = [a != b for a, b in zip(level.num_visual, run.original, strict=True)]
        level.shift = held
        level.moved = None if held is None else level.positions - held
        if not any(removed):
            return
        real, all_real = level.real, first.real
        known = first.positions if all_real is None else first.positions.masked_fill(~all_real, -1)
        next_B1 = known.max(1, keepdim=True).values + 1
        start_B1 = torch.zeros_like(next_B1)
        if run.offset:
            num_B1 = torch.tensor(first.num_real, device=known.device)[:, None]
            start_B1 = next_B1 - num_B1 - (0 if held is None else held)
        ones = torch.ones_like(level.columns) if real is None else real.long()
        count_BN = ones.cumsum(1)
        removed_B1 = torch.tensor(removed, device=known.device)[:, None]
        order_BN = (count_BN - 1).clamp_min(0) + start_B1
        level.moved = torch.where(
            removed_B1, order_BN, level.positions if level.moved is None else level.moved
        )
        shift_B1 = next_B1 - start_B1 - count_BN[:, -1:]
        level.shift = torch.where(removed_B1, shift_B1, 0 if held is None else held)

    # -- what a strategy sees --------------------------------------------------------------------

    def _view(
        self,
        run: _Pass,
        stage: int,
        module: nn.Module,
        hidden: Tensor,
        named: Mapping[str, Any],
        seats_BV: Tensor,
        valid_BV: Tensor,
    ) -> TokenView:
        level = run.levels[stage]
        layer = self._cuts[stage]
        assert level.positions is not None

        def attend(request: AttentionRows) -> Tensor:
            if request not in self._requests:
                raise ValueError(
                    f"{type(self._strategy).__name__}: expected attention declared in "
                    f"attention_rows(), {list(self._requests)}, got {request}. Declare it there."
                )
            if (layer, request) not in run.rows:
                assert request.source == "next", "rows of the previous layer are computed in it"
                prepared = self._side_tensors(run, stage, hidden, named)
                run.rows[layer, request] = self._attend(
                    run, stage, module, hidden, prepared, request, layer
                )
            return run.rows[layer, request]

        own_BV = take(level.coordinate, seats_BV)
        if run.record is not None:
            own_BV = own_BV - torch.tensor(run.record.num_visual, device=hidden.device)[:, None]
        return TokenView(
            layer=layer,
            num_layers=len(self._anatomy.layers),
            valid=valid_BV,
            num_original=torch.tensor(run.original, device=hidden.device),
            positions=take(level.positions, seats_BV),
            places=take(self._padded_places(run, hidden.device), own_BV.masked_fill(~valid_BV, 0)),
            _hidden=lambda: take(hidden, seats_BV).detach(),
            _attend=attend,
            _random=lambda seed: self._random(run, seed, layer, level.num_visual, hidden.device),
        )

    @staticmethod
    def _padded_places(run: _Pass, device: torch.device) -> Tensor:
        return nn.utils.rnn.pad_sequence(run.places, batch_first=True, padding_value=-1).to(device)

    @staticmethod
    def _random(
        run: _Pass, seed: int, layer: int, num_visual: list[int], device: torch.device
    ) -> Tensor:
        """Numbers (B, V) fixed by seed, layer and the row's unpadded ids, or its token counts."""
        level = run.levels[0]
        ids = run.ids.cpu() if run.ids is not None else None
        real = level.real.cpu() if level.real is not None else None
        numbers = torch.zeros(len(num_visual), max(num_visual))
        for row, count in enumerate(num_visual):
            if ids is None:
                own = [level.num_real[row], level.num_visual[row]]
            else:
                own = (ids[row] if real is None else ids[row][real[row]]).tolist()
            digest = hashlib.blake2b(repr((seed, layer, own)).encode(), digest_size=8).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)
            numbers[row, :count] = torch.rand(count, generator=generator)
        return numbers.to(device)

    @torch.no_grad()
    def _attend(
        self,
        run: _Pass,
        level_number: int,
        module: nn.Module,
        hidden: Tensor,
        named: Mapping[str, Any],
        request: AttentionRows,
        layer: int,
    ) -> Tensor:
        """Attention (B, H, V) of a layer to the visual tokens, mean over the asked query rows."""
        level = run.levels[level_number]
        num_rows, length = level.columns.shape
        if request.queries == "all":
            weights = torch.ones_like(level.queries) if level.real is None else level.real.float()
            weights = weights / weights.sum(1, keepdim=True).clamp_min(1)
            rows_BQ = torch.arange(length, device=hidden.device).expand(num_rows, -1)
        else:
            weights = level.queries
            rows_BQ = ascending(weights > 0, run.max_queries, left=False)
        weights_BQ = take(weights, rows_BQ)
        queries, keys, scaling = self._anatomy.adapter.project(
            module, hidden, rows_BQ, named.get("position_embeddings")
        )
        before, held_real, mask = 0, None, named.get("attention_mask")
        if run.record is not None:
            holds = sum(
                cut <= layer for cut in self._cuts
            )  # the level that this layer's cache holds
            before, held_real = run.record.length(holds), run.record.real(holds)
            keys = torch.cat([run.cache.layers[layer].keys.to(keys.dtype), keys], 2)
            mask = mask if holds == level_number else None
        seats_BV = ascending(level.visual, max(level.num_visual), left=False) + before
        total: Tensor | None = None
        chunk = max(1, _CHUNK_BYTES // (4 * num_rows * queries.shape[1] * keys.shape[2]))
        for start in range(0, rows_BQ.shape[1], chunk):
            part_BQ = rows_BQ[:, start : start + chunk]
            if isinstance(mask, Tensor) and mask.dim() == 4:
                rows_mask = mask.expand(num_rows, -1, -1, -1)
                allowed = take(rows_mask, part_BQ, dim=2)
            else:
                allowed = causal(part_BQ, length, level.real, before, held_real)
            attention = attention_rows(queries[:, :, start : start + chunk], keys, allowed, scaling)
            part = torch.einsum("bhqk,bq->bhk", attention, weights_BQ[:, start : start + chunk])
            total = part if total is None else total + part
        assert total is not None
        return take(total, seats_BV, dim=2)

    # -- side tensors ----------------------------------------------------------------------------

    def _side_tensors(
        self, run: _Pass, level_number: int, hidden: Tensor, named: Mapping[str, Any]
    ) -> dict[str, Any]:
        """The layer's other arguments, for the tokens of a level."""
        named = dict(named)
        level = run.levels[level_number]
        cut = level.columns is not run.levels[0].columns
        if cut or (
            run.record is not None and run.record.held[level_number] is not run.record.held[0]
        ):
            named["attention_mask"] = self._once(
                level,
                "attention_mask",
                named.get("attention_mask"),
                lambda mask: self._mask(run, level_number, mask, hidden.dtype),
            )
        if not cut and level.moved is None:
            return named
        if named.get("position_embeddings") is not None:
            named["position_embeddings"] = self._once(
                level,
                "position_embeddings",
                named["position_embeddings"],
                lambda pair: self._embeddings(run, level, hidden, pair),
            )
            # Gaps would look like several packed sequences to the flash kernel's wrapper.
            named["position_ids"] = None
        elif named.get("position_ids") is not None:
            named["position_ids"] = level.positions if level.moved is None else level.moved
        return named

    @staticmethod
    def _once(level: _Level, name: str, original: Any, make: Callable[[Any], Any]) -> Any:
        """A side tensor is made once per level, for every layer that was handed the same one."""
        marker = original[0] if isinstance(original, tuple) else original
        key = (name, id(marker))
        if key not in level.side:
            level.side[key] = make(original)
        return level.side[key]

    def _embeddings(self, run: _Pass, level: _Level, hidden: Tensor, pair: Any) -> Any:
        if level.moved is not None:
            rotary: Any = self._anatomy.decoder.rotary_emb
            return rotary(hidden, position_ids=level.moved)
        index = level.columns - run.offset
        return tuple(take(part, index, batch=part.dim() - 3, dim=part.dim() - 2) for part in pair)

    def _mask(self, run: _Pass, level_number: int, mask: Any, dtype: torch.dtype) -> Tensor | None:
        """The attention mask of a level, in the form that the attention implementation reads."""
        level = run.levels[level_number]
        record = run.record
        num_rows, length = level.columns.shape
        before = record.length(level_number) if record is not None else 0
        held_real = record.real(level_number) if record is not None else None
        everything_real = level.real is None and held_real is None
        if self._attention().startswith("flash"):
            if everything_real:
                return None
            return known_keys(level.real, num_rows, length, held_real, before, level.columns.device)
        if mask is None and everything_real and (length == 1 or before == 0):
            return None
        if length == 1 and everything_real and self._attention() == "sdpa":
            return None
        columns = level.columns
        if record is not None:
            columns = torch.cat([record.columns(level_number), columns], 1)
        uncut = run.offset + run.levels[0].columns.shape[1]
        rows_BN = level.columns - run.offset
        if isinstance(mask, Tensor) and mask.dim() == 4 and mask.shape[-1] == uncut:
            mask = mask.expand(num_rows, -1, -1, -1)
            mask = take(take(mask, rows_BN, dim=2), columns, dim=3)
            known = known_keys(level.real, num_rows, length, held_real, before, columns.device)
            return mask if everything_real else hide_pads(mask, known, level.real)
        order = torch.arange(length, device=columns.device).expand(num_rows, -1)
        allowed = causal(order, length, level.real, before, held_real)
        if level.real is not None:
            allowed = allowed | ~level.real[:, None, :, None]  # a pad's row must not be empty
        if self._attention() == "sdpa":
            return allowed
        return torch.zeros_like(allowed, dtype=dtype).masked_fill(~allowed, torch.finfo(dtype).min)

    def _attention(self) -> str:
        return str(self._anatomy.decoder.config._attn_implementation)  # type: ignore[union-attr]

    # -- the end of a pass -----------------------------------------------------------------------

    def _recorded(self, run: _Pass) -> _Record:
        """What the cache holds after this pass."""
        levels = run.levels + [run.levels[-1]] * (len(self._cuts) + 1 - len(run.levels))
        record = run.record
        length = levels[0].columns.shape[1]
        if record is not None and not run.prunes and levels[0].real is None:
            record.num_columns += length
            record.tail += length
            return record
        held: list[_Held] = []
        for number, level in enumerate(levels):
            columns, real, shift = level.columns, level.real, level.shift
            if record is not None:
                before = record.length(number)
                old_real = record.real(number)
                real = (
                    None
                    if real is None and old_real is None
                    else known_keys(real, *columns.shape, old_real, before, columns.device)
                )
                columns = torch.cat([record.columns(number), columns], 1)
            below = levels[number - 1]
            same = (
                number > 0
                and level.columns is below.columns
                and level.shift is below.shift
                and (record is None or record.held[number] is record.held[number - 1])
            )
            held.append(held[-1] if same else _Held(columns, real, shift))
        seen = record.num_visual if record is not None else [0] * len(run.original)
        return _Record(
            cuts=self._cuts,
            num_columns=run.offset + length,
            num_visual=[a + b for a, b in zip(seen, run.original, strict=True)],
            held=held,
        )

    def _write_trace(self, run: _Pass) -> None:
        num_layers = len(self._anatomy.layers)
        levels = run.levels + [run.levels[-1]] * (len(self._cuts) + 1 - len(run.levels))
        per_layer = [levels[sum(cut <= i for cut in self._cuts)] for i in range(num_layers)]
        self.trace.stages = run.stages
        self.trace.lengths = torch.tensor([level.num_real for level in per_layer])
        self.trace.visual_lengths = torch.tensor([level.num_visual for level in per_layer])
        self.trace.places = run.places

    def _fill_labels(self, run: _Pass, output: Any) -> Any:
        """Gives the model's loss the labels of the survivors; keeps only their supervised rows."""
        if not run.call.late_labels:
            return None
        labels = run.call.inputs["labels"]
        level = run.levels[-1]
        columns = level.columns - run.offset
        labels = take(labels.to(columns.device), columns)
        if level.real is not None and level.columns is not run.levels[0].columns:
            labels = labels.masked_fill(~level.real, -100)
        shifted = nn.functional.pad(labels, (0, 1), value=-100)[:, 1:]
        if self._supervised:
            hidden = output.last_hidden_state
            chosen = (shifted != -100).flatten().nonzero()[:, 0]
            if len(chosen) == 0:  # the loss of nothing is the model's own affair
                chosen = torch.zeros(1, dtype=torch.int64, device=hidden.device)
            output.last_hidden_state = hidden.flatten(0, 1)[chosen][None]
            shifted = shifted.flatten()[chosen][None]
            labels = shifted
        for tensor, is_shifted in run.call.late_labels:
            tensor.data = (shifted if is_shifted else labels).to(tensor.device).contiguous()
        return output if self._supervised else None


# ------------------------------------------------------------------------------------- public API


def attach(
    model: nn.Module,
    strategy: PruningStrategy,
    schedule: Schedule,
    positions: str = "original",
    logits: str = "all",
    visual_mask: Tensor | None = None,
) -> Handle:
    """Prunes every call of `model` until the handle's `remove()`.

    Args:
        model: Any Hugging Face vision-language model, or a module that wraps one; not modified.
        strategy: Says which visual tokens survive a cut.
        schedule: Says how many survive, and before which layers.
        positions: `"original"` leaves the survivors their RoPE positions; `"renumbered"` counts
            0..n-1 anew at each cut, and on from each layer's own length at decoding.
        logits: With labels, `"all"` returns logits of the pruned length; `"supervised"` projects
            only rows whose next survivor has a label, and returns the loss with logits None.
        visual_mask: Bool (B, T), for calls whose `input_ids` do not show the visual tokens. Covers
            columns 0..T-1 of the conversation; may be passed to the call instead.

    Returns:
        A handle; `handle.trace` says what the latest call did.

    Raises:
        ValueError: If the model, the schedule or an option cannot be honoured.
    """
    for name, value, choices in (("positions", positions, POSITIONS), ("logits", logits, LOGITS)):
        if value not in choices:
            raise ValueError(
                f"prune: expected {name} to be one of {list(choices)}, got {value!r}. "
                "See the docstring of tokenprune.attach."
            )
    if not isinstance(strategy, PruningStrategy):
        raise ValueError(
            f"prune: expected a PruningStrategy, got {strategy!r}. "
            "Build one with tokenprune.build_strategy(name)."
        )
    if not isinstance(schedule, Schedule):
        raise ValueError(
            f"prune: expected a Schedule, got {schedule!r}. "
            "Build one with tokenprune.Schedule.pyramid or one_shot."
        )
    anatomy = examine(model)
    schedule.check_depth(len(anatomy.layers))
    attention = str(anatomy.decoder.config._attn_implementation)  # type: ignore[union-attr]
    if attention not in _ATTENTIONS:
        raise ValueError(
            f"prune: expected attn_implementation to be one of {list(_ATTENTIONS)}, got "
            f"{attention!r}. Load the model with another one."
        )
    first = anatomy.adapter.first_layer
    if any(request.source == "previous" for request in strategy.attention_rows()):
        first = max(first, 1)
    early = [stage.layer for stage in schedule.stages if stage.layer < first]
    if early:
        raise ValueError(
            f"prune: expected cuts at layer {first} or later for {type(strategy).__name__} on "
            f"{type(model).__name__}, got {early}. Move the first cut."
        )
    if anatomy.decoder in _attached:
        raise ValueError(
            f"prune: expected a model that is not pruned already, got {type(model).__name__}. "
            "Leave the other prune(...) first, or call its handle's remove()."
        )
    handle = Handle(anatomy, strategy, schedule, positions, logits, visual_mask)
    _attached[anatomy.decoder] = handle
    handle._hook()
    return handle


@contextmanager
def prune(
    model: nn.Module,
    strategy: PruningStrategy,
    schedule: Schedule,
    positions: str = "original",
    logits: str = "all",
    visual_mask: Tensor | None = None,
) -> Iterator[Trace]:
    """Prunes every call of `model` inside the `with`; yields the trace. Arguments as in `attach`."""
    handle = attach(model, strategy, schedule, positions, logits, visual_mask)
    try:
        yield handle.trace
    finally:
        handle.remove()
