"""The engine: hooks that prune visual tokens inside an unmodified model.

The only part that touches a model. A call goes through three kinds of hook:

* on the modules above the decoder, which see `input_ids`, `labels` and `visual_mask`;
* on the decoder: a pass over its layers begins (`_Pass`) and ends;
* on each decoder layer from the one before the first cut on: tokens are cut, and side tensors
  (mask, rotary embeddings, positions) replaced by those of the tokens that are left.

Nothing of a run is stored on the model, the strategy or the schedule: a pass lives in a
thread-local variable, and what the cache holds is a `Record` on the cache object.

Shape suffixes: B batch rows, T positions of a call, N positions at a level, V visual tokens alive,
Q query rows, K keys, H heads, D hidden size, S cuts.
"""

from __future__ import annotations

import hashlib
import inspect
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.weak import TensorWeakRef, WeakTensorKeyDictionary

from tokenprune import masks
from tokenprune import record as records
from tokenprune.adapters import (
    Anatomy,
    device_of,
    examine,
    facts,
    layers_that_add_features,
    mark_visual,
    places,
    shows_images,
    window,
)
from tokenprune.levels import Level
from tokenprune.schedule import Schedule
from tokenprune.strategy import AttentionRows, PruningStrategy, Selection, TokenView
from tokenprune.tensors import (
    ascending,
    attention_rows,
    causal,
    hide_pads,
    known_keys,
    take,
    to_device,
)
from tokenprune.trace import Trace, TracedStage

POSITIONS = ("original", "renumbered")
LOGITS = ("all", "supervised")
ATTENTIONS = ("eager", "sdpa", "flex_attention", "flash_attention_2", "flash_attention_3")
#: Arguments of a layer that the engine replaces itself.
_OWN_ARGUMENTS = ("attention_mask", "position_embeddings", "position_ids", "hidden_states")
#: Bytes of float32 attention weights that one chunk of query rows may take.
_CHUNK_BYTES = 2**27


@dataclass(eq=False)
class _Call:
    """What the modules above the decoder were called with.

    Attributes:
        inputs: Arguments by name.
        open: Modules entered and not yet left.
        cache: The cache, while the modules are shown an unpruned view of it.
        late_labels: Label tensors handed to the model's loss, to be filled when the survivors are
            known, and whether they are shifted ones.
    """

    inputs: dict[str, Any] = field(default_factory=dict)
    open: list[nn.Module] = field(default_factory=list)
    cache: Any = None
    late_labels: list[tuple[Tensor, bool]] = field(default_factory=list)


@dataclass(eq=False)
class _Pass:
    """One run of the decoder's layers over new tokens.

    Attributes:
        call: The call that it belongs to.
        ids: Token ids of the call, if it has any.
        record: What the cache holds from before, or None.
        cache: The cache, once a layer has shown it.
        levels: Level 0, and one more per cut done.
        prunes: Whether there are visual tokens and cuts.
        max_queries: Largest number of `"last"` query rows in a batch row.
        last_query: Column of the token whose attention chooses, if one does; else -1.
        budgets: Per cut, tokens that each row may keep.
        budgets_SB: The same, int64 (S, B), on the device.
        places: Finds the places of the visual tokens.
        rows: Attention computed for a cut, by the cut's layer and request.
        rotations: What the rotary modules gave, and how to get it for other positions.
        stages: The trace of the cuts done.
        copies: Levels on other devices than where they were made, for models spread over several.
    """

    call: _Call
    ids: Tensor | None
    record: records.Record | None
    cache: Any
    levels: list[Level]
    prunes: bool
    max_queries: int
    last_query: int
    budgets: list[list[int]]
    budgets_SB: Tensor | None
    places: Callable[[], list[Tensor]]
    rows: dict[tuple[int, AttentionRows], Tensor] = field(default_factory=dict)
    rotations: list[tuple[Any, Callable[[Tensor, Tensor], Any]]] = field(default_factory=list)
    stages: list[TracedStage] = field(default_factory=list)
    copies: dict[tuple[int, torch.device], Level] = field(default_factory=dict)

    @property
    def offset(self) -> int:
        """Columns of the conversation before this pass."""
        return 0 if self.record is None else self.record.num_columns

    def held(self, level: int) -> tuple[int, Tensor | None]:
        """Keys that a layer of a level holds from before: how many, and which are real."""
        if self.record is None:
            return 0, None
        return self.record.length(level), self.record.real(level)

    def at(self, level: int, device: torch.device) -> Level:
        """A level, with its tensors on the device of the layer that runs."""
        made = self.levels[level]
        if made.columns.device == device:
            return made
        if (level, device) not in self.copies:
            self.copies[level, device] = made.on(device)
        return self.copies[level, device]


#: Decoders that are pruned now.
_attached: weakref.WeakSet[nn.Module] = weakref.WeakSet()


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
        self._policy = records.Policy(self._cuts, positions)
        self._window = window(anatomy)
        #: Level that each layer runs on.
        self._level_of = [sum(c <= i for c in self._cuts) for i in range(len(anatomy.layers))]
        self._requests = strategy.attention_rows()
        self._asks_last = any(request.queries == "last" for request in self._requests)
        self._thread = threading.local()
        # A layer recomputed by gradient checkpointing finds its pass by the tensors handed to it.
        self._passes = WeakTensorKeyDictionary()
        self._hooks: list[Any] = []
        self._parameters: dict[nn.Module, list[str]] = {}

    def __reduce__(self) -> Any:
        raise ValueError(
            "prune: expected a model without pruning attached to copy or pickle, got one with. "
            "Call the handle's remove(), or leave prune(...), first."
        )

    # -- hooks -----------------------------------------------------------------------------------

    def _hook(self) -> None:
        for entry in self._anatomy.entries:
            self._register(entry, self._enter, self._leave)
        self._register(self._anatomy.decoder, self._begin, self._end)
        if self._renumber:
            for module in self._anatomy.decoder.modules():
                if type(module).__name__.endswith("RotaryEmbedding"):
                    hook = module.register_forward_hook(self._rotated, with_kwargs=True)
                    self._hooks.append(hook)
        first = min(self._cuts, default=len(self._anatomy.layers))
        for index, layer in enumerate(self._anatomy.layers):
            if index >= first - 1:  # a cut may read the layer before it
                self._register(layer, self._layer_hook(index), None)

    def _register(
        self, module: nn.Module, before: Callable[..., Any], after: Callable[..., Any] | None
    ) -> None:
        parameters = inspect.signature(module.forward).parameters.values()
        self._parameters[module] = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
        self._hooks.append(module.register_forward_pre_hook(before, with_kwargs=True))
        if after is not None:
            # Also after an exception, so that no pass outlives its call.
            hook = module.register_forward_hook(after, with_kwargs=True, always_call=True)
            self._hooks.append(hook)

    def remove(self) -> None:
        """Detaches from the model, which is then as it was found. May be called twice."""
        if not self._hooks:
            return
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        _attached.discard(self._anatomy.decoder)

    def _named(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Positional arguments that have no name, and all others by name."""
        names = self._parameters[module]
        if len(args) > len(names):  # forward(*args): they stay as they are
            return args, dict(kwargs)
        return (), dict(zip(names, args, strict=False)) | dict(kwargs)

    # -- above the decoder -----------------------------------------------------------------------

    def _enter(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        call = self._open_call()
        if call is None or module in call.open:  # the latter after an interrupt
            call = self._thread.call = _Call()
        call.open.append(module)
        rest, named = self._named(module, args, kwargs)
        _merge(call.inputs, named, call.late_labels)
        changed = named.pop("visual_mask", None) is not None
        changed |= self._show_unpruned(call, named)
        labels = named.get("labels")
        if labels is not None and self._cuts:
            self._promise_labels(call, module, named, labels)
            changed = True
        return (rest, named) if changed else None

    def _show_unpruned(self, call: _Call, named: dict[str, Any]) -> bool:
        """Lets a module above the decoder see a pruned cache as long as the conversation."""
        past = named.get("past_key_values")
        if not records.has_record(past):
            return False
        tokens = named.get("inputs_embeds")
        tokens = named["input_ids"] if tokens is None else tokens
        record = self._read(past, tokens, named.get("attention_mask"))
        if record is None:
            return False
        call.cache, named["past_key_values"] = past, records.unpruned(past, record)
        return True

    def _read(self, past: Any, tokens: Tensor, mask: Any) -> records.Record | None:
        padding = masks.padding(mask, past, known=records.has_record(past))
        num_layers = len(self._anatomy.layers)
        return records.read(past, self._policy, num_layers, tokens.shape[0], padding)

    def _promise_labels(
        self, call: _Call, module: nn.Module, named: dict[str, Any], labels: Tensor
    ) -> None:
        """Hands the model's own loss label tensors that are filled when the survivors are known."""
        if self._supervised and named.get("return_dict") is False:
            raise ValueError(
                'prune: expected return_dict=True with logits="supervised", got False. '
                "Leave return_dict out."
            )
        named["labels"] = labels.clone()
        call.late_labels.append((named["labels"], False))
        computes_loss = hasattr(module, "loss_function")  # a wrapper around the model need not
        if (self._supervised and computes_loss) or named.get("shift_labels") is not None:
            named["shift_labels"] = labels.clone()
            call.late_labels.append((named["shift_labels"], True))

    def _leave(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        call = self._open_call()
        if call is None:
            return None
        call.open.pop()
        if call.cache is not None and output is not None:
            output = _with_cache(output, call.cache)
        if not call.open:
            self._thread.call = None
        if not (self._supervised and call.late_labels and isinstance(output, Mapping)):
            return output
        return type(output)(**{key: output[key] for key in output if key != "logits"})

    def _open_call(self) -> _Call | None:
        return getattr(self._thread, "call", None)

    # -- the decoder: a pass begins --------------------------------------------------------------

    def _begin(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        call = self._open_call() or _Call()
        rest, named = self._named(module, args, kwargs)
        inputs = dict(call.inputs)
        _merge(inputs, named, call.late_labels)
        named.pop("visual_mask", None)
        embeds = named.get("inputs_embeds")
        tokens = named["input_ids"] if embeds is None else embeds
        run = self._thread.run = self._plan(call, inputs, tokens)
        if run.record is not None:
            named["past_key_values"] = records.unpruned(run.cache, run.record)
        return rest, named

    def _plan(self, call: _Call, inputs: dict[str, Any], tokens: Tensor) -> _Pass:
        num_rows, length = tokens.shape[:2]
        device = tokens.device
        past = inputs.get("past_key_values")
        past = call.cache if records.is_unpruned(past) else past
        padding = masks.padding(inputs.get("attention_mask"), past, records.has_record(past))
        record = self._read(past, tokens, inputs.get("attention_mask"))
        offset = 0 if record is None else record.num_columns
        if self._window is not None and self._cuts and offset + length > self._window:
            raise ValueError(
                f"prune: expected at most {self._window} tokens, up to which every layer of "
                f"{type(self._anatomy.config).__name__} attends to all of them alike, got "
                f"{offset + length}. Shorten the prompt or the answer."
            )
        visual = self._find_visual(inputs, num_rows, length, offset)
        real = None
        if padding is not None:
            real = padding[:, offset : offset + length].to(device=device, dtype=torch.bool)
        if visual is not None:
            visual = visual.to(device) if real is None else visual.to(device) & real
        blank = torch.zeros(num_rows, length, dtype=torch.bool, device=device)
        labels = self._labels(inputs, device)
        to_keep = inputs.get("logits_to_keep")
        guesses = to_keep - 1 if isinstance(to_keep, int) and to_keep > 1 else 0
        asks = blank if visual is None else self._asking(blank, real, labels, guesses)
        per_row = [[0, length, 0, 0, 1]] * num_rows  # a decoding step: nothing to ask the device
        if visual is not None or real is not None:
            ones = torch.ones_like(blank)
            known = ones if real is None else real
            per_row = torch.stack(  # the only synchronisation of a prefill
                [
                    (blank if visual is None else visual).sum(1),
                    known.sum(1),
                    asks.sum(1),
                    (blank if visual is None else _turns_back(inputs, known)).sum(1),
                    known[:, -1].long(),
                ],
                1,
            ).tolist()
        num_visual, num_real, num_asking, turns_back, ends_real = map(
            list, zip(*per_row, strict=True)
        )
        prunes = any(num_visual) and bool(self._cuts)
        if prunes:
            padded = any(n < length for n in num_real)
            self._check_inputs(inputs, any(turns_back), padded, offset)
        budgets = [
            [
                count if labels is not None and not asking else self._schedule.count(stage, count)
                for count, asking in zip(num_visual, num_asking, strict=True)
            ]
            for stage in range(len(self._cuts) if prunes else 0)
        ]
        counts_SB = torch.tensor([num_visual, *budgets], device=device) if prunes else None
        visual = blank if visual is None else visual
        coordinate = visual.cumsum(1) - 1 if prunes else blank
        if prunes and record is not None:
            coordinate = coordinate + torch.tensor(record.num_visual, device=device)[:, None]
        level = Level(
            index=None,
            columns=(torch.arange(length, device=device) + offset).expand(num_rows, -1),
            real=None if all(n == length for n in num_real) else real,
            num_real=num_real,
            visual=visual,
            num_visual=num_visual,
            alive=blank if counts_SB is None else counts_SB[0],
            coordinate=coordinate,
            queries=asks / asks.sum(1, keepdim=True).clamp_min(1) if prunes else blank,
            # Generation reads the last column: pad on the left unless the batch is on the right.
            pads_left=all(ends_real),
        )
        return _Pass(
            call=call,
            ids=inputs.get("input_ids"),
            record=record,
            cache=past,
            levels=[level],
            prunes=prunes,
            max_queries=max(num_asking),
            last_query=offset + length - 1 - guesses if self._asks_last and prunes else -1,
            budgets=budgets,
            budgets_SB=None if counts_SB is None else counts_SB[1:],
            places=cache(self._place_finder(inputs, visual, num_visual)),
        )

    def _find_visual(
        self, inputs: Mapping[str, Any], num_rows: int, length: int, offset: int
    ) -> Tensor | None:
        """Which of the call's tokens are visual, bool (B, T); None if there can be none."""
        mask = inputs.get("visual_mask", self._visual_mask)
        if mask is not None:
            if mask.dim() != 2 or mask.dtype != torch.bool or num_rows % mask.shape[0]:
                raise ValueError(
                    f"prune: expected visual_mask of dtype bool and shape ({num_rows}, T), got "
                    f"{mask.dtype} and {tuple(mask.shape)}. Mark the visual columns with True."
                )
            part = mask[:, offset : offset + length]
            if part.shape[1] == 0:
                return None
            part = nn.functional.pad(part, (0, length - part.shape[1]))
            return part.repeat_interleave(num_rows // mask.shape[0], 0)
        # A generated id is text, whatever its number: later calls show images only with pixels.
        if offset > 0 and not shows_images(inputs):
            return None
        if not self._anatomy.visual_ids:
            raise ValueError(
                "prune: expected visual_mask, bool (B, T), or placeholder ids of visual tokens in "
                f"the config, got neither for {type(self._anatomy.config).__name__}. Pass the mask "
                "to prune or to the call."
            )
        ids = inputs.get("input_ids")
        if ids is None:
            raise ValueError(
                "prune: expected input_ids or visual_mask, got inputs_embeds alone. Pass "
                "visual_mask, bool (B, T), to say which columns are visual."
            )
        return mark_visual(self._anatomy.visual_ids, ids)

    @staticmethod
    def _labels(inputs: Mapping[str, Any], device: torch.device) -> Tensor | None:
        labels, shifted = inputs.get("labels"), inputs.get("shift_labels")
        if shifted is not None:  # then these are what the loss reads
            labels = nn.functional.pad(shifted, (1, 0), value=-100)[:, :-1]
        return None if labels is None else cast(Tensor, labels.to(device))

    @staticmethod
    def _asking(blank: Tensor, real: Tensor | None, labels: Tensor | None, guesses: int) -> Tensor:
        """The `"last"` query rows, bool (B, T).

        Assisted decoding puts guesses after the prompt, and asks for logits from its last token on.
        """
        known = torch.ones_like(blank) if real is None else real
        if labels is None:
            order = torch.arange(1, blank.shape[1] + 1, device=blank.device)
            last = (known * order).argmax(1, keepdim=True)
            return order - 1 == (last - guesses).clamp_min(0)
        labelled = labels != -100
        return ~labelled & nn.functional.pad(labelled, (0, 1))[:, 1:] & known

    def _check_inputs(
        self, inputs: Mapping[str, Any], turns_back: bool, padded: bool, offset: int
    ) -> None:
        """Refuses what cannot be honoured in a pass that prunes."""
        if self._anatomy.attention not in ATTENTIONS:
            raise _unsupported_attention(self._anatomy)
        if isinstance(inputs.get("logits_to_keep"), Tensor):
            raise ValueError(
                "prune: expected an integer logits_to_keep, got a tensor. "
                "Its indices would point into the unpruned sequence."
            )
        router = inputs.get("output_router_logits")
        if router is None:
            router = getattr(self._anatomy.text_config, "output_router_logits", False)
        if router and padded and inputs.get("labels") is not None:
            raise ValueError(
                "prune: expected a batch without padding for a loss with router terms, got a "
                "padded one. Use batches of one, or output_router_logits=False."
            )
        first = layers_that_add_features(inputs)
        if getattr(inputs.get("past_key_values"), "is_compileable", False) and offset > 0:
            raise ValueError(
                "prune: expected a cache that grows, for images of a later turn, got "
                f"{type(inputs['past_key_values']).__name__}. Leave cache_implementation out."
            )
        if self._cuts[0] < first:
            raise ValueError(
                f"prune: expected cuts at layer {first} or later, because the model adds visual "
                f"features before that, got {list(self._cuts)}. Move the first cut."
            )
        position_ids = inputs.get("position_ids")
        if self._renumber and position_ids is not None and position_ids.dim() > 2:
            raise ValueError(
                'prune: expected one-dimensional positions with positions="renumbered", got '
                f'{position_ids.shape[0]}-dimensional ones. Use positions="original".'
            )
        if turns_back:
            raise ValueError(
                "prune: expected position_ids that rise along each row, got a row that starts "
                "anew: several sequences packed into one. Pass them as rows of a batch."
            )

    def _place_finder(
        self, inputs: Mapping[str, Any], visual: Tensor, num_visual: list[int]
    ) -> Callable[[], list[Tensor]]:
        # A trace must keep neither pixels nor the model alive.
        small, layout, config = facts(inputs), self._anatomy.adapter.layout, self._anatomy.config
        return lambda: places(layout, config, small, visual, num_visual)

    # -- the layers ------------------------------------------------------------------------------

    def _layer_hook(self, index: int) -> Callable[..., Any]:
        number = self._level_of[index]
        cuts_here, cuts_next = index in self._cuts, index + 1 in self._cuts
        ahead = [request for request in self._requests if request.source == "previous"]

        def hook(module: nn.Module, args: Any, kwargs: Any) -> Any:
            rest, named = self._named(module, args, kwargs)
            hidden = rest[0] if rest else named.pop("hidden_states")
            run = self._find_run(named)
            if run is None:
                return None
            if run.record is None:
                run.cache = named.get("past_key_values", run.cache)
            elif "past_key_values" in named:
                named["past_key_values"] = run.cache
            device = device_of(module, hidden)
            hidden = to_device(hidden, device)
            if run.levels[0].positions is None and (run.prunes or self._renumber):
                self._set_positions(run, named)
            if cuts_here:
                if len(run.levels) == number:
                    self._cut(run, number, module, hidden, named)
                index_BN = run.at(number, device).index
                hidden = hidden if index_BN is None else take(hidden, index_BN)
            self._replace_side_tensors(run, number, module, hidden, named)
            if cuts_next and run.prunes and len(run.levels) == number + 1:
                for request in ahead:
                    run.rows[index + 1, request] = self._attend(
                        run, number, module, hidden, named, request, index
                    )
            return (hidden, *rest[1:]), named

        return hook

    def _find_run(self, named: Mapping[str, Any]) -> _Pass | None:
        embeddings = named.get("position_embeddings")
        key = embeddings[0] if isinstance(embeddings, tuple) else named.get("position_ids")
        run: _Pass | None = getattr(self._thread, "run", None)
        if run is None:  # recomputed during the backward pass
            return None if key is None else cast("_Pass | None", self._passes.get(key))  # type: ignore[no-untyped-call]
        if key is not None and self._anatomy.decoder.training:
            self._passes[key] = run
        return run

    @staticmethod
    def _set_positions(run: _Pass, named: Mapping[str, Any]) -> None:
        level = run.levels[0]
        given = named.get("position_ids")
        given = level.columns if given is None else given
        given = given[0] if given.dim() > 2 else given
        # A clone: a view would keep alive the tensor by which a recomputed layer finds its pass.
        given = given.expand(level.columns.shape).to(level.columns.device)
        level.positions = given.clone()

    def _rotated(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        """Notes how to get a rotary module's output for other positions."""
        run: _Pass | None = getattr(self._thread, "run", None)
        if run is None:
            return
        names = [*range(len(args)), *kwargs]
        values = [*args, *kwargs.values()]
        tensors = {n: v.is_floating_point() for n, v in zip(names, values, strict=True)
                   if isinstance(v, Tensor)}  # fmt: skip
        others = {n: v for n, v in zip(names, values, strict=True) if n not in tensors}

        def again(hidden: Tensor, positions: Tensor) -> Any:
            filled = others | {n: hidden if floats else positions for n, floats in tensors.items()}
            named = {str(n): v for n, v in filled.items() if not isinstance(n, int)}
            return module(*[filled[n] for n in range(len(args))], **named)

        first = output[0] if isinstance(output, tuple) else output
        run.rotations.append((TensorWeakRef(first), again))

    def _cut(
        self, run: _Pass, number: int, module: nn.Module, hidden: Tensor, named: dict[str, Any]
    ) -> None:
        """Adds the level after cut `number`: asks the strategy, keeps what it chose."""
        level, device = run.at(number - 1, hidden.device), hidden.device
        new = run.levels[-1].unchanged()
        if run.prunes:
            assert run.budgets_SB is not None
            seats_BV, valid_BV = level.seats()
            view = self._view(run, number, module, hidden, named, seats_BV, valid_BV)
            with torch.no_grad():
                keep_B = to_device(run.budgets_SB[number - 1], device)
                selection = self._strategy.select(view, keep_B)
            kept_BV, num_kept = self._checked(selection, valid_BV, level, run.budgets[number - 1])
            run.stages.append(_traced(view.layer, selection, kept_BV, num_kept, level, seats_BV))
            if num_kept != level.num_visual:
                new = level.after(kept_BV, num_kept, kept_BV.sum(1))
        if self._renumber:
            shift = None if run.record is None else run.record.held[number].shift
            new = new.on(device)
            shift = to_device(shift, device)
            new.renumber(run.at(0, device), shift, continues=run.record is not None)
        run.levels.append(new)

    def _checked(
        self, selection: Selection, valid_BV: Tensor, level: Level, budget: list[int]
    ) -> tuple[Tensor, list[int]]:
        """The survivors that a strategy chose, and how many per row."""
        kept = selection.kept
        if kept.dtype != torch.bool or kept.shape != valid_BV.shape:
            raise ValueError(
                f"{type(self._strategy).__name__}.select: expected a bool mask of shape "
                f"{tuple(valid_BV.shape)}, got {kept.dtype} of shape {tuple(kept.shape)}. "
                "Return Selection(kept=mask)."
            )
        most = [min(alive, keep) for alive, keep in zip(level.num_visual, budget, strict=True)]
        if self._strategy.keeps_exactly:
            return kept, most
        kept = kept & valid_BV
        counts: list[int] = kept.sum(1).tolist()
        if any(count > keep for count, keep in zip(counts, most, strict=True)):
            raise ValueError(
                f"{type(self._strategy).__name__}.select: expected at most {most} tokens per "
                f"row, got {counts}. Respect `keep`."
            )
        return kept, counts

    # -- what a strategy sees --------------------------------------------------------------------

    def _view(
        self,
        run: _Pass,
        number: int,
        module: nn.Module,
        hidden: Tensor,
        named: dict[str, Any],
        seats_BV: Tensor,
        valid_BV: Tensor,
    ) -> TokenView:
        layer, device = self._cuts[number - 1], hidden.device
        level = run.at(number - 1, device)
        assert level.positions is not None
        assert run.budgets_SB is not None

        def attend(request: AttentionRows) -> Tensor:
            if request not in self._requests:
                raise ValueError(
                    f"{type(self._strategy).__name__}: expected attention declared in "
                    f"attention_rows(), {list(self._requests)}, got {request}. Declare it there."
                )
            if (layer, request) not in run.rows:
                assert request.source == "next", "rows of the previous layer are computed in it"
                before_cut = dict(named)
                self._replace_side_tensors(run, number - 1, module, hidden, before_cut)
                run.rows[layer, request] = self._attend(
                    run, number - 1, module, hidden, before_cut, request, layer
                )
            return cast(Tensor, to_device(run.rows[layer, request], device))

        def find_places() -> Tensor:
            table = nn.utils.rnn.pad_sequence(run.places(), batch_first=True, padding_value=-1)
            own_BV = take(level.coordinate, seats_BV)
            if run.record is not None:
                own_BV = own_BV - torch.tensor(run.record.num_visual, device=device)[:, None]
            return take(table.to(device), own_BV.masked_fill(~valid_BV, 0))

        return TokenView(
            layer=layer,
            num_layers=len(self._anatomy.layers),
            valid=valid_BV,
            num_original=run.at(0, device).alive,
            positions=take(level.positions, seats_BV),
            _hidden=lambda: take(hidden, seats_BV).detach(),
            _places=find_places,
            _attend=attend,
            _random=lambda seed: _random(run, level.num_visual, seed, layer).to(device),
        )

    @torch.no_grad()
    def _attend(
        self,
        run: _Pass,
        number: int,
        module: nn.Module,
        hidden: Tensor,
        named: Mapping[str, Any],
        request: AttentionRows,
        layer: int,
    ) -> Tensor:
        """Attention (B, H, V) of a layer to the visual tokens, mean over the asked query rows."""
        level = run.at(number, hidden.device)
        num_rows, length = level.columns.shape
        if request.queries == "all":
            weights = level.queries.new_ones(1).expand(num_rows, length)
            weights = weights if level.real is None else weights * level.real
            weights = weights / weights.sum(1, keepdim=True).clamp_min(1)
            rows_BQ = torch.arange(length, device=hidden.device).expand(num_rows, -1)
        else:
            weights = level.queries
            rows_BQ = ascending(weights > 0, run.max_queries, left=False)
        weights_BQ = take(weights, rows_BQ)
        named = {name: to_device(value, hidden.device) for name, value in named.items()}
        projected = self._anatomy.adapter.project(module, hidden, rows_BQ, named)
        keys = projected.keys
        mask = named.get("attention_mask")
        holding = self._level_of[layer]  # at a cut, the layer's cache is one level further
        before, held_real = run.held(holding)
        held_real = to_device(held_real, hidden.device)
        if before:
            held = run.cache.layers[layer].keys[:, :, :before]
            if held.shape[1:] != (keys.shape[1], before, keys.shape[3]):
                raise ValueError(
                    "prune: expected a cache of keys as they are attended to, for attention in a "
                    f"later turn, got {type(run.cache.layers[layer]).__name__} with entries of "
                    f"shape {tuple(held.shape)}. Choose another cache, or a strategy that reads no "
                    "attention."
                )
            keys = torch.cat([held.to(keys.dtype), keys], 2)
            mask = mask if holding == number else None
        known = None
        if level.real is not None or held_real is not None:
            known = known_keys(level.columns, level.real, before, held_real)
        total: Tensor | None = None
        num_heads = projected.queries.shape[1]
        chunk = max(1, _CHUNK_BYTES // (4 * num_rows * num_heads * keys.shape[2]))
        for start in range(0, rows_BQ.shape[1], chunk):
            part_BQ = rows_BQ[:, start : start + chunk]
            if isinstance(mask, Tensor) and mask.dim() == 4:
                allowed = take(
                    mask[..., : keys.shape[2]].expand(num_rows, -1, -1, -1), part_BQ, dim=2
                )
            else:
                allowed = causal(part_BQ, keys.shape[2], before, known)
            rows = attention_rows(
                projected.queries[:, :, start : start + chunk],
                keys,
                allowed,
                projected.scaling,
                projected.softcap,
            )
            part = torch.einsum("bhqk,bq->bhk", rows, weights_BQ[:, start : start + chunk])
            total = part if total is None else total + part
        assert total is not None
        return take(total, level.seats()[0] + before, dim=2)

    # -- side tensors ----------------------------------------------------------------------------

    def _replace_side_tensors(
        self, run: _Pass, number: int, module: nn.Module, hidden: Tensor, named: dict[str, Any]
    ) -> None:
        """Puts the layer's other arguments in place of those of tokens that are gone."""
        level = run.at(number, hidden.device)
        cut = run.levels[number].columns is not run.levels[0].columns
        if cut or (run.record is not None and run.record.differs(number)):
            named["attention_mask"] = self._once(
                level,
                "attention_mask",
                named.get("attention_mask"),
                lambda mask: self._mask(run, number, mask, hidden),
            )
        if not cut and level.moved is None:
            return
        index = level.columns - run.offset
        if named.get("position_embeddings") is not None:
            named["position_embeddings"] = self._once(
                level,
                "position_embeddings",
                named["position_embeddings"],
                lambda pair: _embeddings(run, level, hidden, pair, index),
            )
        if named.get("position_ids") is not None:
            given = level.positions if level.moved is None else level.moved
            # Gaps would look like several packed sequences to the flash kernel's wrapper.
            gaps = self._anatomy.attention.startswith("flash")
            named["position_ids"] = None if gaps and "position_embeddings" in named else given
        if cut:
            length = run.levels[0].columns.shape[1]
            for name, dim in self._token_arguments(module, named, length).items():
                value = to_device(named[name], hidden.device)
                named[name] = self._once(level, name, value, partial(take, index_BN=index, dim=dim))

    def _token_arguments(
        self, module: nn.Module, named: Mapping[str, Any], length: int
    ) -> dict[str, int]:
        """The layer's arguments with an entry per token, and in which dimension."""
        known = self._anatomy.adapter.token_arguments
        for name in self._parameters[module]:  # others pass through unread
            value = named.get(name)
            if name in _OWN_ARGUMENTS or name in known or not isinstance(value, Tensor):
                continue
            if length > 1 and length in value.shape:
                raise ValueError(
                    f"prune: expected layer arguments that are known, got {name!r} of shape "
                    f"{tuple(value.shape)} in {type(self._anatomy.config).__name__}. Say in which "
                    "dimension its tokens are: Adapter(token_arguments={...})."
                )
        return {name: dim for name, dim in known.items() if isinstance(named.get(name), Tensor)}

    @staticmethod
    def _once(level: Level, name: str, original: Any, make: Callable[[Any], Any]) -> Any:
        """A side tensor is made once per level, for every layer that was handed the same one."""
        key = (name, id(original[0] if isinstance(original, tuple) else original))
        if key not in level.side:
            # The original is kept, too: another one could get its identity.
            level.side[key] = (original, make(original))
        return level.side[key][1]

    def _mask(self, run: _Pass, number: int, mask: Any, hidden: Tensor) -> Any:
        """The attention mask of a level, in the form that the attention implementation reads."""
        level, device = run.at(number, hidden.device), hidden.device
        num_rows, length = level.columns.shape
        before, held_real = run.held(number)
        held_real = to_device(held_real, device)
        attention = self._anatomy.attention
        padded = level.real is not None or held_real is not None
        if attention.startswith("flash"):
            known = known_keys(level.columns, level.real, before, held_real)
            return known if padded else None  # keeps the fast kernel
        given = to_device(masks.dense(mask, num_rows), device)
        fixed = getattr(run.cache, "is_compileable", False)  # then it shows entries not yet filled
        size = given.shape[-1] if given is not None and fixed else 0
        if fixed and run.record is not None:
            given = None  # `generate` made it, by the length of a layer that may be pruned
        plain = not padded and given is None and attention == "sdpa"
        if plain and (before == 0 or (length == 1 and not fixed)):
            return None  # keeps the fast kernel
        if given is None:
            order = torch.arange(length, device=level.columns.device).expand(num_rows, -1)
            allowed = causal(order, before + length, before, None).expand(num_rows, -1, -1, -1)
        else:
            columns = level.columns
            if run.record is not None:
                columns = torch.cat([run.record.columns(number).to(device), columns], 1)
            allowed = take(take(given, level.columns - run.offset, dim=2), columns, dim=3)
        if padded:
            known = known_keys(level.columns, level.real, before, held_real)
            allowed = hide_pads(allowed, known, level.real)
        if fixed and not size:
            size = run.cache.layers[0].max_cache_len
        return masks.form(allowed, attention, hidden.dtype, size)

    # -- the decoder: a pass ends ----------------------------------------------------------------

    def _end(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        run: _Pass | None = getattr(self._thread, "run", None)
        self._thread.run = None
        if run is None or output is None:  # output is None after an exception
            return None
        # A text-only pass whose cache no hooked layer has shown still has one level per cut.
        run.levels += [run.levels[-1]] * (len(self._cuts) + 1 - len(run.levels))
        if run.record is not None:
            output = _with_cache(output, run.cache)
        past = run.cache if run.cache is not None else getattr(output, "past_key_values", None)
        if past is not None:
            records.write(past, self._policy, run.record, run.levels, run.prunes, run.last_query)
        if any(run.levels[0].num_visual) or run.record is None:
            levels = [run.levels[number] for number in self._level_of]
            self.trace.stages = run.stages
            self.trace.lengths = torch.tensor([level.num_real for level in levels])
            self.trace.visual_lengths = torch.tensor([level.num_visual for level in levels])
            self.trace._find_places = run.places
        return self._fill_labels(run, output) if run.call.late_labels else output

    def _fill_labels(self, run: _Pass, output: Any) -> Any:
        """Keeps the promise of `_promise_labels`; `"supervised"` drops rows without a label."""
        level = run.levels[-1]
        device, columns = level.columns.device, level.columns - run.offset
        labels = run.call.inputs["labels"].to(device)
        shifted = run.call.inputs.get("shift_labels")
        if shifted is None:
            shifted = nn.functional.pad(labels, (0, 1), value=-100)[:, 1:]
        # What a survivor predicts stands, shifted, just before the next survivor.
        ends = torch.full_like(columns[:, :1], run.levels[0].columns.shape[1])
        before_next = torch.cat([columns[:, 1:], ends], 1) - 1
        if level.real is not None:
            followed = nn.functional.pad(level.real, (0, 1), value=True)[:, 1:]
            before_next = torch.where(followed, before_next, columns).clamp_min(0)
        labels, shifted = take(labels, columns), take(shifted.to(device), before_next)
        if level.columns is not run.levels[0].columns and level.real is not None:
            labels = labels.masked_fill(~level.real, -100)
            shifted = shifted.masked_fill(~level.real, -100)
        if self._supervised:
            hidden = output.last_hidden_state
            chosen = (shifted != -100).flatten().nonzero()[:, 0]
            if len(chosen) == 0:  # the loss of nothing is the model's own affair
                chosen = torch.zeros(1, dtype=torch.int64, device=hidden.device)
            output.last_hidden_state = hidden.flatten(0, 1)[chosen][None]
            labels = shifted = shifted.flatten()[chosen][None]
        for tensor, is_shifted in run.call.late_labels:
            tensor.data = (shifted if is_shifted else labels).to(tensor.device).contiguous()
        return output


def _with_cache(output: Any, cache: Any) -> Any:
    """A decoder's output with the cache itself in place of its unpruned view."""
    if isinstance(output, tuple):
        return tuple(cache if records.is_unpruned(x) else x for x in output)
    if records.is_unpruned(getattr(output, "past_key_values", None)):
        output.past_key_values = cache
    return output


def _merge(
    inputs: dict[str, Any], named: Mapping[str, Any], promised: list[tuple[Tensor, bool]]
) -> None:
    """Adds a module's arguments to those of the modules around it.

    An inner module's win, because a wrapper may change them on the way. But labels are known from
    outside only, and an attention mask says where pads are only in its 2-D form.
    """
    for key, value in named.items():
        keeps = key in ("labels", "shift_labels", "visual_mask") or (
            key == "attention_mask" and not (isinstance(value, Tensor) and value.dim() == 2)
        )
        ours = any(value is tensor for tensor, _ in promised)
        if value is not None and not ours and not (keeps and key in inputs):
            inputs[key] = value


def _embeddings(run: _Pass, level: Level, hidden: Tensor, pair: Any, index: Tensor) -> Any:
    """Rotary embeddings of a level: gathered, or made for its own positions."""
    parts = pair if isinstance(pair, tuple) else (pair,)
    if level.moved is not None:
        for made, again in run.rotations:
            if made() is parts[0]:
                return again(hidden, level.moved)
        raise ValueError(
            "prune: expected rotary embeddings that a module of the decoder makes, with "
            'positions="renumbered", got others. Use positions="original".'
        )
    # Most have a batch first; several position axes may stand before it.
    taken = tuple(
        take(
            to_device(part, hidden.device),
            index,
            batch=max(0, part.dim() - 3),
            dim=max(0, part.dim() - 3) + 1,
        )
        for part in parts
    )
    return taken if isinstance(pair, tuple) else taken[0]


def _unsupported_attention(anatomy: Anatomy) -> ValueError:
    return ValueError(
        f"prune: expected attn_implementation to be one of {list(ATTENTIONS)}, got "
        f"{anatomy.attention!r}. Load the model with another one."
    )


def _turns_back(inputs: Mapping[str, Any], real: Tensor) -> Tensor:
    """Where given positions do not rise from one real token to the next: bool (B, T - 1)."""
    given = inputs.get("position_ids")
    if given is None or given.dim() > 2:
        return real.new_zeros(real.shape[0], 1)
    back = given[:, 1:] <= given[:, :-1]
    return cast(Tensor, back & real[:, 1:] & real[:, :-1])


def _traced(
    layer: int,
    selection: Selection,
    kept_BV: Tensor,
    num_kept: list[int],
    level: Level,
    seats_BV: Tensor,
) -> TracedStage:
    own_BV = take(level.coordinate, seats_BV)
    kept = take(own_BV, ascending(kept_BV, max(num_kept), left=False))
    scores = selection.scores
    return TracedStage(
        layer=layer,
        kept=[row[:count] for row, count in zip(kept, num_kept, strict=True)],
        scores=None
        if scores is None
        else [row[:count] for row, count in zip(scores, level.num_visual, strict=True)],
    )


def _random(run: _Pass, num_alive: list[int], seed: int, layer: int) -> Tensor:
    """Numbers (B, V) fixed by seed, layer and the row's unpadded ids, or its token counts."""
    level = run.levels[0]
    ids = None if run.ids is None else run.ids.cpu()
    real = None if level.real is None else level.real.cpu()
    numbers = torch.zeros(len(num_alive), max(num_alive))
    for row, count in enumerate(num_alive):
        if ids is None:
            own = [level.num_real[row], level.num_visual[row]]
        else:
            own = (ids[row] if real is None else ids[row][real[row]]).tolist()
        digest = hashlib.blake2b(repr((seed, layer, own)).encode(), digest_size=8).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)
        numbers[row, :count] = torch.rand(count, generator=generator)
    return numbers


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
            columns 0..T-1 of the conversation; may be passed to a forward call instead. Its rows
            are repeated for batches that generation expands (beams, several returned sequences).

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
    if anatomy.attention not in ATTENTIONS:
        raise _unsupported_attention(anatomy)
    rotates = any(type(m).__name__.endswith("RotaryEmbedding") for m in anatomy.decoder.modules())
    if positions == "renumbered" and not rotates:
        raise ValueError(
            'prune: expected rotary embeddings with positions="renumbered", got '
            f"{type(anatomy.decoder).__name__}, which adds positions before its first layer. "
            'Use positions="original".'
        )
    requests = strategy.attention_rows()
    reads_previous = any(request.source == "previous" for request in requests)
    first = max(anatomy.adapter.first_layer, int(reads_previous))
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
    _attached.add(anatomy.decoder)
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
    """Prunes every call of `model` inside the `with`, and yields the trace.

    Arguments and errors are those of `attach`. Leaving the context, also by an exception, leaves
    the model as it was found. With gradient checkpointing, call `backward` inside: layers are
    recomputed then.
    """
    handle = attach(model, strategy, schedule, positions, logits, visual_mask)
    try:
        yield handle.trace
    finally:
        handle.remove()
