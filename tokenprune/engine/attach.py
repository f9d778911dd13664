"""The engine: hooks that prune visual tokens inside an unmodified model.

A call goes through three kinds of hook:

* on the modules above the decoder, which see `input_ids`, `labels` and `visual_mask`;
* on the decoder: a pass over its layers is planned (`passes.py`), and ends;
* on each decoder layer from the one before the first cut on: tokens are cut (`cuts.py`), and the
  layer's other arguments follow the survivors (`side.py`).

Nothing of a run is stored on the model, the strategy or the schedule: a pass lives in a
thread-local variable, and what the cache holds is a `Record` on the cache object.
"""

from __future__ import annotations

import functools
import inspect
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from tokenprune.engine import caches, late, side
from tokenprune.engine.ahead import Ahead
from tokenprune.engine.captured import by_graph, note
from tokenprune.engine.cuts import begin
from tokenprune.engine.graphs import Graphs
from tokenprune.engine.layers import Site, by_name, enter
from tokenprune.engine.losses import finish, promise_labels
from tokenprune.engine.passes import Call, Pass, merge, plan_pass
from tokenprune.engine.settings import Settings
from tokenprune.engine.trace import Trace
from tokenprune.engine.vision import METHODS, Watch
from tokenprune.families.anatomy import examine, rotary_modules
from tokenprune.families.inputs import takes_late_features
from tokenprune.schedule import Schedule
from tokenprune.strategy import BeforeProjector, PruningStrategy

#: Decoders that are pruned now.
_attached: weakref.WeakSet[nn.Module] = weakref.WeakSet()


@dataclass(eq=False)
class _Generation:
    """A `generate` under way: whether a call of it is shown by the trace."""

    shown: bool = False


class Handle:
    """Pruning attached to a model, until `remove()`.

    Attributes:
        trace: What the latest call did.
    """

    def __init__(self, settings: Settings, graphs: Graphs | None = None) -> None:
        adapter = settings.anatomy.adapter
        self.trace = Trace(framing=adapter.framing, newlines=adapter.newlines)
        self._graphs = graphs
        self._settings = settings
        self._thread = threading.local()
        # A layer recomputed by gradient checkpointing finds its pass by the tensors handed to it.
        self._passes = WeakTensorKeyDictionary()
        self._hooks: list[Any] = []
        self._shadowed: list[Any] = []
        self._names: dict[nn.Module, list[str]] = {}
        self._told = False
        self._first = 0
        needs = settings.vision_needs
        parts = settings.anatomy.vision if needs else None
        mixes = BeforeProjector() in settings.needs
        self._watch = None if parts is None else Watch(parts, needs, mixes)
        self._ahead = Ahead()

    def __reduce__(self) -> Any:
        raise ValueError(
            "prune: expected a model without pruning attached to copy or pickle, got one with. "
            "Call the handle's remove(), or leave prune(...), first."
        )

    # -- hooks -----------------------------------------------------------------------------------

    def _hook(self) -> None:
        settings = self._settings
        for entry in settings.anatomy.entries:
            self._names[entry] = _names(entry)
            self._register(entry, self._enter, self._leave)
            self._refuse_guesses(entry)
            self._note_generation(entry)
        self._names[settings.anatomy.decoder] = _names(settings.anatomy.decoder)
        self._register(settings.anatomy.decoder, self._begin, self._end)
        if settings.renumbers:
            for module in rotary_modules(settings.anatomy.decoder):
                hook = module.register_forward_hook(self._rotated, with_kwargs=True)
                self._hooks.append(hook)
        first = min(settings.cuts, default=len(settings.anatomy.layers))
        self._first = first
        if self._graphs is not None and takes_late_features(self._names[settings.anatomy.decoder]):
            first, self._first = 0, -1  # the model adds them by a mask, which waits for the device
        for index, layer in enumerate(settings.anatomy.layers):
            site = Site(settings, index, _names(layer))
            # A cut may read the layer before it, and what enters the first.
            if index >= first or site.ahead or site.opens:
                self._register(layer, self._at(site), None)
        if self._watch is not None:
            self._hooks += self._watch.hook()
        self._note_features()
        if self._graphs is not None:
            self._capture(self._graphs, settings.anatomy.decoder)

    def _capture(self, graphs: Graphs, decoder: nn.Module) -> None:
        """Lets prefills be captured as CUDA graphs."""
        forward, thread = decoder.forward, self._thread
        own = frozenset(hook.id for hook in self._hooks)

        @contextmanager
        def runs(other: Pass) -> Iterator[None]:
            run = thread.run
            thread.run = other
            try:
                yield
            finally:
                thread.run = run

        @functools.wraps(forward)
        def replayed(*args: Any, **kwargs: Any) -> Any:
            run: Pass | None = getattr(thread, "run", None)
            if run is None or torch.compiler.is_compiling():
                return forward(*args, **kwargs)
            output = by_graph(graphs, run, forward, args, kwargs, own, runs)
            if output is None:
                output = forward(*args, **kwargs)
                note(run, kwargs, output)
            return output

        if not self._shadow(decoder, "forward", replayed):
            graphs.tell("a decoder whose forward was replaced, as accelerate does")

    def _register(
        self, module: nn.Module, before: Callable[..., Any], after: Callable[..., Any] | None
    ) -> None:
        self._hooks.append(module.register_forward_pre_hook(before, with_kwargs=True))
        if after is not None:
            # Also after an exception, so that no pass outlives its call.
            hook = module.register_forward_hook(after, with_kwargs=True, always_call=True)
            self._hooks.append(hook)

    def _refuse_guesses(self, entry: nn.Module) -> None:
        """Assisted decoding tells guesses from the prompt by `logits_to_keep`, if it is taken."""
        if not self._settings.reads_prompt or not hasattr(type(entry), "_get_candidate_generator"):
            return
        if "logits_to_keep" in self._names[entry]:
            return

        def refuse(*args: Any, **kwargs: Any) -> Any:
            raise ValueError(
                "prune: expected a model that takes logits_to_keep, for decoding with guesses, got "
                f"{type(entry).__name__}: guesses would pass for tokens of the prompt, and choose "
                "with them. Decode without guesses, or choose a strategy that reads visual tokens "
                "alone."
            )

        self._shadow(entry, "_get_candidate_generator", refuse)

    def _note_generation(self, entry: nn.Module) -> None:
        """Calls within one `generate` belong together."""
        if not hasattr(type(entry), "generate"):
            return
        generate: Any = entry.generate

        @functools.wraps(generate)
        def noted(*args: Any, **kwargs: Any) -> Any:
            outer = getattr(self._thread, "generation", None)
            self._thread.generation = outer or _Generation()
            try:
                return generate(*args, **kwargs)
            finally:
                self._thread.generation = outer

        self._shadow(entry, "generate", noted)

    def _note_features(self) -> None:
        """Notes the features of images: what the tower did, and what is said of those of later."""
        base: Any = self._settings.anatomy.seeing
        layout = self._settings.anatomy.adapter.layout
        if base is None or (self._watch is None and layout is None):
            return

        def made(kind: str, signals: Any) -> None:
            if (call := self._open_call()) is not None:
                call.signals[kind] = signals

        for kind, name in METHODS.items():
            if hasattr(type(base), name):
                features = getattr(base, name)
                if self._watch is not None:
                    features = self._watch.noted(kind, features, made)
                if layout is not None:
                    features = self._ahead.noted(features, self._open_call)
                self._shadow(base, name, features)

    def _shadow(self, entry: nn.Module, name: str, method: Callable[..., Any]) -> bool:
        """Puts a method before the class's own, until `remove`; not before another such one."""
        if name in vars(entry):
            return False
        setattr(entry, name, method)
        self._shadowed.append((entry, name, method))
        return True

    def remove(self) -> None:
        """Detaches from the model, which is then as it was found. May be called twice."""
        if not self._hooks:
            return
        _attached.discard(self._settings.anatomy.decoder)
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        for entry, name, method in self._shadowed:
            if vars(entry).get(name) is method:  # else somebody has put another there since
                delattr(entry, name)
        self._shadowed.clear()
        if self._watch is not None:
            self._watch.forget()
        self._ahead.forget()

    # -- above the decoder -----------------------------------------------------------------------

    def _enter(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        call = self._open_call()
        if call is None or module in call.open:  # the latter after an interrupt
            call = self._thread.call = Call()
        call.open.append(module)
        if self._watch is not None and module is self._watch.parts.base:
            call.signals.clear()  # of features that were made for something else
        rest, named = by_name(self._names[module], args, kwargs)
        merge(call.inputs, named, call.late_labels)
        call.cache = call.inputs.get("past_key_values")
        caches.in_call(call.cache, begins=True)
        changed = named.pop("visual_mask", None) is not None
        labels = named.get("labels")
        if labels is not None and (self._settings.cuts or self._settings.supervised):
            promise_labels(self._settings, call, module, named, labels)
            changed = True
        return (rest, named) if changed else None

    def _leave(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        call = self._open_call()
        if call is None:
            return None
        call.open.pop()
        if call.open:
            return output
        self._thread.call = None
        caches.in_call(call.cache, begins=False)
        # Layers that are recomputed need none of them, and may find their pass by one.
        call.inputs.clear()
        if not (self._settings.supervised and call.late_labels and isinstance(output, Mapping)):
            return output
        return type(output)(**{key: output[key] for key in output if key != "logits"})

    def _open_call(self) -> Call | None:
        return getattr(self._thread, "call", None)

    # -- the decoder: a pass begins --------------------------------------------------------------

    def _begin(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        if _is_recorded():
            raise ValueError(
                "prune: expected a call that runs, got torch.export or torch.jit.trace: which "
                "tokens survive depends on the input, and would be written down for this one. "
                "Export the unpruned model."
            )
        call = self._open_call() or Call()
        rest, named = by_name(self._names[module], args, kwargs)
        inputs = self._ahead.said(call.inputs) | call.inputs
        merge(inputs, named, call.late_labels)
        embeds = named.get("inputs_embeds")
        tokens = named["input_ids"] if embeds is None else embeds
        caches.in_call(inputs.get("past_key_values"), begins=True)
        generating = getattr(self._thread, "generation", None) is not None
        run = self._thread.run = plan_pass(
            self._settings, call, inputs, tokens, generating, self._watch
        )
        begin(run, tokens.device)
        self._tell_of_labels(run)
        changed = named.pop("visual_mask", None) is not None
        if run.prunes:
            named, run.late = late.take_out(run, named, self._first)
            changed |= run.late is not None
        return (rest, named) if changed else None

    def _tell_of_labels(self, run: Pass) -> None:
        """Says once that labels, or that there are none, let no prompt choose the survivors."""
        if self._told or not run.prunes:
            return
        trains = self._settings.anatomy.decoder.training and torch.is_grad_enabled()
        if run.rows.mute:
            told = (
                "expected labels on answers alone, got rows in which no unlabelled token after an "
                "image comes just before a labelled one: nothing asks, so they stay unpruned. "
                "Label prompts and images -100 (in TRL: completion_only_loss=True or "
                "assistant_only_loss=True)."
            )
        elif trains and self._settings.reads_labels and not run.rows.labelled:
            told = (
                "expected labels in a step of training, whose prompts choose the survivors, got "
                "none: each row passes for a prompt as a whole, and the last token of its answer "
                "asks. Pass them to the model (label smoothing and losses of a trainer's own keep "
                "them back), or choose a strategy that does not read the prompt."
            )
        else:
            return
        self._told = True
        warnings.warn(f"prune: {told}", UserWarning, stacklevel=2)

    # -- the layers ------------------------------------------------------------------------------

    def _at(self, site: Site) -> Callable[..., Any]:
        """The hook of a layer."""
        thread, decoder = self._thread, self._settings.anatomy.decoder

        def hook(module: nn.Module, args: Any, kwargs: Any) -> Any:
            run: Pass | None = getattr(thread, "run", None)
            if run is None or decoder.training:
                run = self._find_run(run, kwargs)
            if run is None:
                return None
            if run.cache is None:
                run.cache = kwargs.get("past_key_values")
            if run.idle and kwargs.get("attention_mask") is None:
                return None
            return enter(run, site, module, args, kwargs)

        return hook

    def _find_run(self, run: Pass | None, named: Mapping[str, Any]) -> Pass | None:
        """The pass of a layer that may be computed anew, in training."""
        embeddings = named.get("position_embeddings")
        key = embeddings[0] if isinstance(embeddings, tuple) else embeddings
        key = named.get("position_ids") if key is None else key
        if key is None:
            return run
        if run is None:  # recomputed during the backward pass
            return cast("Pass | None", self._passes.get(key))  # type: ignore[no-untyped-call]
        self._passes[key] = run
        return run

    def _rotated(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        run: Pass | None = getattr(self._thread, "run", None)
        if run is not None:
            side.note_rotation(run, module, args, kwargs, output)

    # -- the decoder: a pass ends ----------------------------------------------------------------

    def _end(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        run: Pass | None = getattr(self._thread, "run", None)
        self._thread.run = None
        if run is not None:
            caches.in_call(run.cache, begins=False)
            run.open = False  # it may live on, for layers that are computed anew
            run.embeddings = run.seen = None
            run.made.clear()
        if run is None or output is None:  # output is None after an exception
            return None
        past = run.cache if run.cache is not None else getattr(output, "past_key_values", None)
        if past is not None:
            caches.write(
                past,
                self._settings.policy,
                self._settings.level_of,
                run.record,
                run.levels,
                run.prunes,
                run.levels[0].real,
                run.rows.ends_visual,
                run.rows.last_visual,
            )
        seen = any(run.rows.num_visual)
        generation = getattr(self._thread, "generation", None)
        if generation is not None:
            # Guidance runs the text alone beside the prompt: that is not the call to show.
            seen = seen or (run.record is None and not generation.shown)
            generation.shown |= seen
        if seen or (run.record is None and generation is None):
            levels = [run.levels[number] for number in self._settings.level_of]
            stages = run.stages
            self.trace.renew(
                lambda: [make() for make in stages],
                [level.num_real for level in levels],
                [level.num_visual for level in levels],
                run.places,
            )
        return finish(run, output)


def _names(module: nn.Module) -> list[str]:
    """Names of a module's positional arguments."""
    parameters = inspect.signature(module.forward).parameters.values()
    return [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]


def _is_recorded() -> bool:
    exporting = getattr(torch.compiler, "is_exporting", lambda: False)
    tracing: Any = torch.jit
    return bool(tracing.is_tracing() or exporting())


def attach(
    model: nn.Module,
    strategy: PruningStrategy,
    schedule: Schedule,
    positions: str = "original",
    logits: str = "all",
    visual_mask: Tensor | None = None,
    graphs: Graphs | None = None,
) -> Handle:
    """Prunes every call of `model` until the handle's `remove()`.

    Args:
        model: Any Hugging Face vision-language model, or a module that wraps one; not modified.
        strategy: Says which visual tokens survive a cut.
        schedule: Says how many survive, and before which layers.
        positions: `"original"` leaves the survivors their RoPE positions; `"renumbered"` counts
            0..n-1 anew at each cut, and on from each layer's own length at decoding.
        logits: With labels, `"all"` returns logits of the pruned length; `"supervised"` projects
            only rows whose next survivor has a label, and returns the loss with logits None;
            `"full"` returns logits at the length of `input_ids`, with or without labels: in a
            dropped token's column those of the survivor before it.
        visual_mask: Bool (B, T), for calls whose `input_ids` do not show the visual tokens. Covers
            columns 0..T-1 of the conversation; may be passed to a forward call instead. Its rows
            are repeated for batches that generation expands (beams, several returned sequences).
        graphs: Captures prefills on a GPU, and replays them: `tokenprune.Graphs(8)`. Also without
            cuts, for the unpruned model.

    Returns:
        A handle; `handle.trace` says what the latest call did.

    Raises:
        ValueError: If the model, the schedule or an option cannot be honoured.
    """
    for value, kind, hint in (
        (strategy, PruningStrategy, "tokenprune.build_strategy(name)"),
        (schedule, Schedule, "tokenprune.Schedule.pyramid or one_shot"),
        (graphs, Graphs, "tokenprune.Graphs(8)"),
    ):
        if not isinstance(value, kind) and not (kind is Graphs and value is None):
            raise ValueError(
                f"prune: expected a {kind.__name__}, got {value!r}. Build one with {hint}."
            )
    anatomy = examine(model)
    settings = Settings(anatomy, strategy, schedule, positions, logits, visual_mask)
    settings.check(type(model).__name__)
    if anatomy.decoder in _attached:
        raise ValueError(
            f"prune: expected a model that is not pruned already, got {type(model).__name__}. "
            "Leave the other prune(...) first, or call its handle's remove()."
        )
    handle = Handle(settings, graphs)
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
    graphs: Graphs | None = None,
) -> Iterator[Trace]:
    """Prunes every call of `model` inside the `with`, and yields the trace.

    Arguments and errors are those of `attach`. Leaving the context, also by an exception, leaves
    the model as it was found. With gradient checkpointing, call `backward` inside: layers are
    recomputed then.
    """
    handle = attach(model, strategy, schedule, positions, logits, visual_mask, graphs)
    try:
        yield handle.trace
    finally:
        handle.remove()
