"""A prefill by a CUDA graph: what the decoder is given and what it makes, as `graphs.py` wants it.

What layers launch depends on the call by what the host knows of it (which tokens are visual, how
many stay) and on the model's modules. All of that is the kind of a call, compared in full. Numbers
that only the device knows are what the graph reads.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from tokenprune.engine import masks
from tokenprune.engine.graphs import Graphs, NotRecorded
from tokenprune.engine.modules import Modules, walk
from tokenprune.engine.passes import Pass
from tokenprune.engine.rows import Rows
from tokenprune.engine.trees import form, tensors
from tokenprune.strategy import Question, Videos

_CACHE = "past_key_values"
#: Of scaled_dot_product_attention.
_KERNELS = ("flash", "mem_efficient", "math", "cudnn")
#: Whether the caches that a decoder makes for itself just grow.
_plain: WeakKeyDictionary[Any, bool] = WeakKeyDictionary()
#: Whether a decoder returns a cache, by what it is asked.
_cached: WeakKeyDictionary[Any, dict[tuple[Any, bool], bool]] = WeakKeyDictionary()


def by_graph(
    graphs: Graphs,
    run: Pass,
    forward: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    hooks: Collection[int],
    runs: Callable[[Pass], contextlib.AbstractContextManager[Any]],
) -> Any | None:
    """What the decoder returns for a prefill, from a graph; None if it has to be run.

    Args:
        graphs: What keeps them.
        run: The pass.
        forward: The decoder's own.
        args: What it was given by place.
        kwargs: What it was given by name.
        hooks: The engine's own on the decoder's modules.
        runs: Holds while the layers of another pass run.
    """
    if not any(run.rows.num_visual):
        return None
    settings, decoder = run.settings, run.settings.anatomy.decoder
    reason = next(_why_not(run, kwargs), None)
    modules = walk(decoder, hooks) if reason is None else None
    if modules is not None:
        reason = next(_why_no_modules(modules), None)
    if modules is None or reason is not None:
        graphs.tell(str(reason))
        return None
    theirs = kwargs.get(_CACHE)
    caches = _returns(decoder, kwargs)
    theirs = empty_cache(decoder) if theirs is None and caches else theirs
    # The graph's own call has a cache of its own, also where none is wanted: without one,
    # transformers looks for packed sequences among the positions.
    named = kwargs | {_CACHE: None, "attention_mask": None, "use_cache": True}
    given = args, named, run.plan, run.levels, run.seen, run.late
    wanted = settings.strategy, settings.schedule, settings.positions, run.attention
    try:
        kind = form((given, _host(run), theirs is None)), wanted, _modes(), modules.state
        hash(kind)
    except TypeError as error:
        graphs.tell(f"a call with {error}")
        return None
    with torch.inference_mode(False), torch.no_grad():
        found = graphs.replay(
            kind,
            given,
            fixed=partial(_fixed, run),
            work=partial(_run, run, forward, runs, theirs is not None),
            owner=decoder,
        )
    if found is None:
        return None
    output, others, held, run.levels, stages = found
    run.stages += stages
    run.cache = theirs
    for number, pair in enumerate(held):
        _fill(theirs, number, *pair)
    return output(**others, **({_CACHE: theirs} if caches else {}))


def note(run: Pass, kwargs: Mapping[str, Any], output: Any) -> None:
    """Notes whether a decoder that has run returned a cache: some make none that is not given."""
    known = _cached.setdefault(run.settings.anatomy.decoder, {})
    known[_asked(kwargs)] = getattr(output, _CACHE, None) is not None


def _returns(decoder: Any, kwargs: Mapping[str, Any]) -> bool:
    """Whether a decoder would return a cache, as it did when it ran."""
    return _cached.get(decoder, {}).get(_asked(kwargs), True)


def _asked(kwargs: Mapping[str, Any]) -> tuple[Any, bool]:
    return kwargs.get("use_cache"), kwargs.get(_CACHE) is not None


def _run(
    run: Pass,
    forward: Callable[..., Any],
    runs: Callable[[Pass], contextlib.AbstractContextManager[Any]],
    caches: bool,
    given: tuple[Any, ...],
    fixed: dict[Any, Any],
) -> tuple[Any, ...]:
    """Runs the layers on what a graph reads; what they make.

    Raises:
        NotRecorded: If they make something that is not known.
    """
    args, named, plan, levels, seen, late = given
    own = replace(
        run,
        cache=None,
        levels=[*levels],
        plan=plan,
        positions=None,
        embeddings=None,
        seen=seen,
        late=late,
        heard={},
        rotations=[],
        made={},
        stages=[],
        copies=fixed,
    )
    filled = empty_cache(run.settings.anatomy.decoder)
    with torch.no_grad(), _uncached_autocast(), runs(own):
        output = forward(*args, **named | {_CACHE: filled})
    others = {name: value for name, value in output.items() if value is not filled}
    if [*others] != ["last_hidden_state"]:
        raise NotRecorded(f"a decoder that returns {', '.join(others)}")
    held = [(layer.keys, layer.values) for layer in filled.layers] if caches else []
    if caches and len(held) < len(run.settings.anatomy.layers):
        raise NotRecorded("layers that keep nothing in a cache")
    return type(output), others, held, own.levels, own.stages


def _why_no_modules(modules: Modules) -> Iterator[str]:
    """Why no call of a decoder can be recorded."""
    if len(modules.devices) > 1:
        yield "a model on several devices"
    if not modules.addressed:
        yield "weights of a kind that has no address"
    if modules.heard:
        yield "hooks of others on the decoder's layers"


def _why_not(run: Pass, kwargs: Mapping[str, Any]) -> Iterator[str]:
    """Why a call cannot be recorded, as far as it is known before."""
    settings, rows, mask = run.settings, run.rows, kwargs.get("attention_mask")
    decoder, theirs = settings.anatomy.decoder, kwargs.get(_CACHE)
    if decoder.training or torch.is_grad_enabled():
        yield "a model in training, or a call outside torch.no_grad()"
    if rows.labelled:
        yield "labels"
    if rows.packing is not None or rows.padded:
        yield "rows that are packed or padded"
    if run.record is not None:
        yield "a later turn of a conversation"
    if mask is not None and masks.padding(mask) is None:
        yield "an attention mask over pairs of tokens"
    if run.attention.startswith("flash") and rows.shape[0] == 1:
        yield "flash attention at batch 1, for which transformers looks at the positions"
    for strategy in settings.strategies:
        if not strategy.keeps_exactly:
            yield f"{type(strategy).__name__}, which says how many tokens it keeps"
        if Question() in strategy.needs():
            yield f"{type(strategy).__name__}, which reads the question's words"
    for earlier, strategy in itertools.pairwise(settings.strategies):
        if strategy.blind and not earlier.blind:  # it chooses on the host, of what that has left
            yield f"{type(strategy).__name__} after {type(earlier).__name__}, on the host"
    if kwargs.get("output_attentions") or kwargs.get("output_hidden_states"):
        yield "a call for the attention or the hidden states of each layer"
    if kwargs.get("return_dict") is False:
        yield "return_dict=False"
    if not _makes_plain(decoder) or (theirs is not None and not _grows(theirs)):
        yield "a cache that does more than grow, or holds something"


def _host(run: Pass) -> tuple[Any, ...]:
    """What the host knows of a pass, but for ids, which layers do not read."""
    rows = run.rows
    facts = tree_map_only(Tensor, _told, rows.facts)
    known: Rows = replace(rows, ids=None, facts=facts)
    return known, run.budgets, run.idle, run.prunes


def _fixed(run: Pass) -> dict[tuple[str, torch.device], Tensor]:
    """What all calls of a kind share: the places of their visual tokens, and which are of videos.

    Unless something says where these are that the host does not know.
    """
    device = next(run.settings.anatomy.decoder.parameters()).device
    known = all(value.device.type == "cpu" for value in tensors(run.rows.facts))
    if not known:
        return {}
    shared = {("places", device): run.places_on(device)}
    if Videos() in run.settings.needs:
        shared["videos", device] = run.videos_on(device)
    return shared


def _told(value: Tensor) -> Any:
    """What the host knows of a tensor that says something of images: sizes, but no pixels."""
    at_hand = value.device.type == "cpu" and not value.is_floating_point()
    return value.numpy() if at_hand else value


def _modes() -> tuple[Any, ...]:
    """What is set for all of torch, as far as it changes what is launched."""
    kernels: Any = torch.backends.cuda
    return (
        torch.is_autocast_enabled("cuda"),
        torch.get_autocast_dtype("cuda"),
        getattr(kernels.matmul, "fp32_precision", None) or kernels.matmul.allow_tf32,
        torch.are_deterministic_algorithms_enabled(),
        *(getattr(kernels, f"{name}_sdp_enabled")() for name in _KERNELS),
    )


def empty_cache(decoder: Any) -> Any:
    """A cache as decoders make one that are given none."""
    return DynamicCache(config=decoder.config)


def _makes_plain(decoder: Any) -> bool:
    """Whether the caches that a decoder makes for itself just grow."""
    if decoder not in _plain:
        _plain[decoder] = _grows(empty_cache(decoder))
    return _plain[decoder]


def _grows(cache: Any) -> bool:
    """Whether a cache is empty, and its layers keep all that they are given."""
    layers = {type(layer) for layer in cache.layers} <= {DynamicLayer}
    plain = type(cache) is DynamicCache and layers and not cache.offloading
    return plain and cache.get_seq_length() == 0


def _fill(cache: Any, number: int, keys: Tensor, values: Tensor) -> None:
    """Makes keys and values those of a layer of an empty cache, without a copy."""
    while len(cache.layers) <= number:
        cache.layers.append(cache.layer_class_to_replicate())
    layer = cache.layers[number]
    layer.lazy_initialization(keys, values)
    layer.keys, layer.values = keys, values


def _uncached_autocast() -> contextlib.AbstractContextManager[Any]:
    """Autocast as it is, but for the weights that it has turned before: they live for a moment."""
    if not torch.is_autocast_enabled("cuda"):
        return contextlib.nullcontext()
    return torch.autocast("cuda", torch.get_autocast_dtype("cuda"), cache_enabled=False)
