"""The engine: hooks that prune visual tokens inside an unmodified model.

The only part that touches a model. A call goes through three kinds of hook:

* on the modules above the decoder, which see `input_ids`, `labels` and `visual_mask`;
* on the decoder: a pass over its layers is planned (`passes.py`), and ends;
* on each decoder layer from the one before the first cut on: tokens are cut, as the strategy says
  of what it sees (`views.py`), and the layer's other arguments follow them (`side.py`).

Nothing of a run is stored on the model, the strategy or the schedule: a pass lives in a
thread-local variable, and what the cache holds is a `Record` on the cache object.

Shape suffixes: B batch rows, V visual tokens alive, N positions at a level, D hidden size, S cuts.
"""

from __future__ import annotations

import inspect
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from tokenprune.engine import record as records
from tokenprune.engine.levels import Level
from tokenprune.engine.losses import fill_labels, promise_labels
from tokenprune.engine.passes import (
    ATTENTIONS,
    Call,
    Pass,
    Settings,
    merge,
    plan,
    read_record,
    unsupported_attention,
)
from tokenprune.engine.side import note_rotation, replace_side_tensors
from tokenprune.engine.trace import Trace, TracedStage
from tokenprune.engine.views import attend, make_view
from tokenprune.families.anatomy import device_of, examine
from tokenprune.schedule import Schedule
from tokenprune.strategy import POSITIONS, PruningStrategy, Selection
from tokenprune.tensors import ascending, take, to_device

LOGITS = ("all", "supervised")

#: Decoders that are pruned now.
_attached: weakref.WeakSet[nn.Module] = weakref.WeakSet()


class Handle:
    """Pruning attached to a model, until `remove()`.

    Attributes:
        trace: What the latest call did.
    """

    def __init__(self, settings: Settings) -> None:
        self.trace = Trace()
        self._settings = settings
        self._thread = threading.local()
        # A layer recomputed by gradient checkpointing finds its pass by the tensors handed to it.
        self._passes = WeakTensorKeyDictionary()
        self._hooks: list[Any] = []
        self._shadowed: list[Any] = []
        self._parameters: dict[nn.Module, list[str]] = {}

    def __reduce__(self) -> Any:
        raise ValueError(
            "prune: expected a model without pruning attached to copy or pickle, got one with. "
            "Call the handle's remove(), or leave prune(...), first."
        )

    # -- hooks -----------------------------------------------------------------------------------

    def _hook(self) -> None:
        for entry in self._settings.anatomy.entries:
            self._register(entry, self._enter, self._leave)
            self._refuse_guesses(entry)
        self._register(self._settings.anatomy.decoder, self._begin, self._end)
        if self._settings.renumbers:
            for module in self._settings.anatomy.decoder.modules():
                if type(module).__name__.endswith("RotaryEmbedding"):
                    hook = module.register_forward_hook(self._rotated, with_kwargs=True)
                    self._hooks.append(hook)
        first = min(self._settings.cuts, default=len(self._settings.anatomy.layers))
        for index, layer in enumerate(self._settings.anatomy.layers):
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

    def _refuse_guesses(self, entry: nn.Module) -> None:
        """Assisted decoding tells guesses from the prompt by `logits_to_keep`, if it is taken."""
        if not self._settings.asks_last or not hasattr(type(entry), "_get_candidate_generator"):
            return
        if "logits_to_keep" in self._parameters[entry]:
            return

        def refuse(*args: Any, **kwargs: Any) -> Any:
            raise ValueError(
                "prune: expected a model that takes logits_to_keep, for decoding with guesses, got "
                f"{type(entry).__name__}: the last guess would pass for the prompt's last token. "
                "Decode without guesses, or choose a strategy that reads no attention of the last "
                "token."
            )

        entry._get_candidate_generator = refuse  # type: ignore[assignment]
        self._shadowed.append(entry)

    def remove(self) -> None:
        """Detaches from the model, which is then as it was found. May be called twice."""
        if not self._hooks:
            return
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        for entry in self._shadowed:
            del entry._get_candidate_generator
        self._shadowed.clear()
        _attached.discard(self._settings.anatomy.decoder)

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
            call = self._thread.call = Call()
        call.open.append(module)
        rest, named = self._named(module, args, kwargs)
        merge(call.inputs, named, call.late_labels)
        changed = named.pop("visual_mask", None) is not None
        changed |= self._show_unpruned(call, named)
        labels = named.get("labels")
        if labels is not None and (self._settings.cuts or self._settings.supervised):
            promise_labels(self._settings, call, module, named, labels)
            changed = True
        return (rest, named) if changed else None

    def _show_unpruned(self, call: Call, named: dict[str, Any]) -> bool:
        """Lets a module above the decoder see a pruned cache as long as the conversation."""
        past = named.get("past_key_values")
        if not records.has_record(past):
            return False
        tokens = named.get("inputs_embeds")
        tokens = named["input_ids"] if tokens is None else tokens
        record = read_record(self._settings, past, tokens, named.get("attention_mask"))
        if record is None:
            return False
        call.cache, call.record = past, record
        named["past_key_values"] = records.unpruned(past, record)
        return True

    def _leave(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        call = self._open_call()
        if call is None:
            return None
        call.open.pop()
        if call.cache is not None and output is not None:
            output = _with_cache(output, call.cache)
        if not call.open:
            self._thread.call = None
        if not (self._settings.supervised and call.late_labels and isinstance(output, Mapping)):
            return output
        return type(output)(**{key: output[key] for key in output if key != "logits"})

    def _open_call(self) -> Call | None:
        return getattr(self._thread, "call", None)

    # -- the decoder: a pass begins --------------------------------------------------------------

    def _begin(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        call = self._open_call() or Call()
        rest, named = self._named(module, args, kwargs)
        inputs = dict(call.inputs)
        merge(inputs, named, call.late_labels)
        named.pop("visual_mask", None)
        embeds = named.get("inputs_embeds")
        tokens = named["input_ids"] if embeds is None else embeds
        run = self._thread.run = plan(self._settings, call, inputs, tokens)
        if run.record is not None:
            named["past_key_values"] = records.unpruned(run.cache, run.record)
        return rest, named

    # -- the layers ------------------------------------------------------------------------------

    def _layer_hook(self, index: int) -> Callable[..., Any]:
        number = self._settings.level_of[index]
        cuts_here, cuts_next = index in self._settings.cuts, index + 1 in self._settings.cuts
        ahead = [request for request in self._settings.requests if request.source == "previous"]

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
            if run.levels[0].positions is None and (run.prunes or self._settings.renumbers):
                self._set_positions(run, named)
            if cuts_here:
                if len(run.levels) == number:
                    self._cut(run, number, module, hidden, named)
                index_BN = run.at(number, device).index
                hidden = hidden if index_BN is None else take(hidden, index_BN)
            mask = named.get("attention_mask")
            replace_side_tensors(run, number, module, hidden, named)
            if cuts_next and run.prunes and len(run.levels) == number + 1:
                for request in ahead:
                    run.rows[index + 1, request] = attend(
                        run, number, module, hidden, named, mask, request, index
                    )
            return (hidden, *rest[1:]), named

        return hook

    def _find_run(self, named: Mapping[str, Any]) -> Pass | None:
        embeddings = named.get("position_embeddings")
        key = embeddings[0] if isinstance(embeddings, tuple) else named.get("position_ids")
        run: Pass | None = getattr(self._thread, "run", None)
        if run is None:  # recomputed during the backward pass
            return None if key is None else cast("Pass | None", self._passes.get(key))  # type: ignore[no-untyped-call]
        if key is not None and self._settings.anatomy.decoder.training:
            self._passes[key] = run
        return run

    @staticmethod
    def _set_positions(run: Pass, named: Mapping[str, Any]) -> None:
        level = run.levels[0]
        given = named.get("position_ids")
        given = level.columns if given is None else given
        given = given[0] if given.dim() > 2 else given
        # A clone: a view would keep alive the tensor by which a recomputed layer finds its pass.
        given = given.expand(level.columns.shape).to(level.columns.device)
        level.positions = given.clone()

    def _rotated(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        run: Pass | None = getattr(self._thread, "run", None)
        if run is not None:
            note_rotation(run, module, args, kwargs, output)

    def _cut(
        self, run: Pass, number: int, module: nn.Module, hidden: Tensor, named: dict[str, Any]
    ) -> None:
        """Adds the level after cut `number`: asks the strategy, keeps what it chose."""
        level, device = run.at(number - 1, hidden.device), hidden.device
        new = run.levels[-1].unchanged()
        if run.prunes:
            assert run.budgets_SB is not None
            seats_BV, valid_BV = level.seats()
            view = make_view(run, number, module, hidden, named, seats_BV, valid_BV)
            with torch.no_grad():
                keep_B = to_device(run.budgets_SB[number - 1], device)
                selection = self._settings.strategy.select(view, keep_B)
            kept_BV, num_kept = self._checked(selection, valid_BV, level, run.budgets[number - 1])
            run.stages.append(_traced(view.layer, selection, kept_BV, num_kept, level, seats_BV))
            if num_kept != level.num_visual:
                new = level.after(kept_BV, num_kept, kept_BV.sum(1))
        if self._settings.renumbers:
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
                f"{type(self._settings.strategy).__name__}.select: expected a bool mask of shape "
                f"{tuple(valid_BV.shape)}, got {kept.dtype} of shape {tuple(kept.shape)}. "
                "Return Selection(kept=mask)."
            )
        most = [min(alive, keep) for alive, keep in zip(level.num_visual, budget, strict=True)]
        if self._settings.strategy.keeps_exactly:
            return kept, most
        kept = kept & valid_BV
        counts: list[int] = kept.sum(1).tolist()
        if any(count > keep for count, keep in zip(counts, most, strict=True)):
            raise ValueError(
                f"{type(self._settings.strategy).__name__}.select: expected at most {most} "
                f"tokens per row, got {counts}. Respect `keep`."
            )
        return kept, counts

    # -- the decoder: a pass ends ----------------------------------------------------------------

    def _end(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        run: Pass | None = getattr(self._thread, "run", None)
        self._thread.run = None
        if run is None or output is None:  # output is None after an exception
            return None
        # A text-only pass whose cache no hooked layer has shown still has one level per cut.
        run.levels += [run.levels[-1]] * (len(self._settings.cuts) + 1 - len(run.levels))
        if run.record is not None:
            output = _with_cache(output, run.cache)
        past = run.cache if run.cache is not None else getattr(output, "past_key_values", None)
        if past is not None:
            records.write(
                past, self._settings.policy, run.record, run.levels, run.prunes, run.ends_visual
            )
        if any(run.levels[0].num_visual) or run.record is None:
            levels = [run.levels[number] for number in self._settings.level_of]
            self.trace.stages = run.stages
            self.trace.lengths = torch.tensor([level.num_real for level in levels])
            self.trace.visual_lengths = torch.tensor([level.num_visual for level in levels])
            self.trace._find_places = run.places
        return fill_labels(run, output) if run.call.late_labels else output


def _with_cache(output: Any, cache: Any) -> Any:
    """A decoder's output with the cache itself in place of its unpruned view."""
    if isinstance(output, tuple):
        return tuple(cache if records.is_unpruned(x) else x for x in output)
    if records.is_unpruned(getattr(output, "past_key_values", None)):
        output.past_key_values = cache
    return output


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
        raise unsupported_attention(anatomy)
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
    settings = Settings(anatomy, strategy, schedule, positions, logits, visual_mask)
    handle = Handle(settings)
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
