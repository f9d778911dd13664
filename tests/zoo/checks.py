"""What is checked of a model type under an attention implementation, and how it is reported.

Every check raises AssertionError where a pruned run is not exact. The reference is the unmodified
model whose layers are given masks that hide what the trace says was dropped.
"""

from __future__ import annotations

import inspect
import itertools
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

import tokenprune as tp
from tokenprune.engine.masks import dense
from tokenprune.families.anatomy import examine
from zoo.flash import attention
from zoo.specimen import NUM_LAYERS, PROMPTS, TEXT, VOCABULARY, Specimen

STEPS = 4
EXACT = "exact"
CLOSE = {"atol": 1e-4, "rtol": 1e-4}


@dataclass(frozen=True)
class ByPlace(tp.ScoreStrategy):
    """A choice that depends on nothing but a token's place in the conversation."""

    def score(self, view: tp.TokenView) -> Tensor:
        return (view.positions * 37 % 101).float()


def schedule(specimen: Specimen, keep: float = 0.5) -> tp.Schedule:
    stages = [tp.Stage(cut, keep ** (number + 1)) for number, cut in enumerate(specimen.cuts)]
    return tp.Schedule(tuple(stages))


def forward(model: PreTrainedModel, inputs: dict[str, Any]) -> Any:
    with torch.no_grad():
        return model(**inputs, use_cache=False)


def generate(model: PreTrainedModel, inputs: dict[str, Any], **options: Any) -> Any:
    # A random model would say its own placeholders, and then be asked for their images.
    special = list(range(TEXT, VOCABULARY))
    options = {"do_sample": False, "max_new_tokens": STEPS, "suppress_tokens": special} | options
    return model.generate(**inputs, **options, return_dict_in_generate=True, output_logits=True)


@contextmanager
def masked(
    model: PreTrainedModel, inputs: dict[str, Tensor], trace: tp.Trace, extra: int = 2 * STEPS
) -> Iterator[None]:
    """The unmodified model, with masks that hide what was dropped, and survivors mixed by hand.

    Args:
        model: The model.
        inputs: Those of the whole conversation.
        trace: Of a run over it; `kept` over all visual tokens of the conversation.
        extra: Columns that may come after it.
    """
    anatomy = examine(model)
    visual, padding = tp.visual_mask(model, inputs["input_ids"]), inputs["attention_mask"].bool()
    num_rows, prompt = visual.shape
    dropped_BLK = torch.zeros(num_rows, len(anatomy.layers), prompt + extra, dtype=torch.bool)
    mixed: dict[int, list[tuple[Tensor, Tensor, Tensor]]] = {}
    alive = [marked.nonzero()[:, 0] for marked in visual]
    for stage in trace.stages:
        for row, kept in enumerate(stage.kept):
            columns = visual[row].nonzero()[:, 0]
            gone = torch.ones(len(columns), dtype=torch.bool)
            gone[kept] = False
            dropped_BLK[row, stage.layer :, columns[gone]] = True
            if stage.weights is not None:
                mixed.setdefault(stage.layer, []).append(
                    (alive[row], columns[kept], stage.weights[row])
                )
            alive[row] = columns[kept]

    def hook(index: int, layer: nn.Module) -> Callable[..., Any]:
        names = [
            p.name
            for p in inspect.signature(layer.forward).parameters.values()
            if p.kind is p.POSITIONAL_OR_KEYWORD
        ]

        def before(module: nn.Module, args: Any, kwargs: Any) -> Any:
            named = dict(zip(names, args, strict=False)) | kwargs
            length = named["hidden_states"].shape[1]
            rows = named["hidden_states"].shape[0]
            cache = named.get("past_key_values")
            offset = int(cache.get_seq_length(index)) if cache is not None else 0
            total = offset + length
            times = rows // num_rows  # beams
            if index in mixed and offset == 0:
                named["hidden_states"] = named["hidden_states"].clone()
                for row in range(rows):
                    own = named["hidden_states"][row]
                    before, after, weights = mixed[index][row // times]
                    own[after] = (weights @ own[before].float()).to(own.dtype)
            given = dense(named.get("attention_mask"), rows)
            if given is None:
                given = torch.arange(total) <= torch.arange(offset, total)[:, None]
                real = nn.functional.pad(padding, (0, extra), value=True)[:, :total]
                given = given & real.repeat_interleave(times, 0)[:, None, None]
            if given.dtype == torch.bool:
                low = torch.finfo(torch.float32).min
                given = torch.zeros(given.shape).masked_fill(~given, low)
            hidden = dropped_BLK[:, index, :total].repeat_interleave(times, 0)[:, None, None]
            named["attention_mask"] = given.masked_fill(hidden, torch.finfo(given.dtype).min)
            return (), named

        return before

    def mix_features(module: nn.Module, args: Any, kwargs: Any) -> Any:
        """Visual features that are added after a cut, as the tokens were mixed there."""
        marked = kwargs.get("visual_pos_masks", kwargs.get("vision_mask"))
        late = kwargs.get("deepstack_visual_embeds", kwargs.get("deepstack_features"))
        if late is None or marked is None:
            return None
        marked = marked.reshape(marked.shape[:2])
        rank = marked.flatten().cumsum(0).view_as(marked) - 1
        by_layer = late if isinstance(late, dict) else {i + 1: own for i, own in enumerate(late)}
        by_layer = {layer: own.clone() for layer, own in by_layer.items()}
        for cut, layer in itertools.product(sorted(mixed), by_layer):
            if layer <= cut:
                continue
            for row, places in enumerate(rank):
                before, after, weights = mixed[cut][row // (len(rank) // num_rows)]
                own = by_layer[layer]
                own[places[after]] = (weights @ own[places[before]].float()).to(own.dtype)
        name = "deepstack_features" if isinstance(late, dict) else "deepstack_visual_embeds"
        given = by_layer if isinstance(late, dict) else [by_layer[i + 1] for i in range(len(late))]
        return args, kwargs | {name: given}

    hooks = [
        layer.register_forward_pre_hook(hook(i, layer), with_kwargs=True)
        for i, layer in enumerate(anatomy.layers)
    ]
    hooks.append(anatomy.decoder.register_forward_pre_hook(mix_features, with_kwargs=True))
    # Masks of other implementations say less than the reference needs.
    name = anatomy.attention if anatomy.attention in ("eager", "sdpa") else "eager"
    try:
        with attention(model, name):
            yield
    finally:
        for handle in hooks:
            handle.remove()


def survivors(model: PreTrainedModel, inputs: Any, trace: tp.Trace, row: int) -> Tensor:
    """Columns of a row that reach the last layer."""
    visual = tp.visual_mask(model, inputs["input_ids"])[row]
    alive = inputs["attention_mask"][row].bool() & ~visual
    alive[visual.nonzero()[:, 0][trace.stages[-1].kept[row]]] = True
    return alive.nonzero()[:, 0]


def same_tokens_and_logits(ours: Any, theirs: Any) -> None:
    assert torch.equal(ours.sequences, theirs.sequences)
    for a, b in zip(ours.logits, theirs.logits, strict=True):
        torch.testing.assert_close(a, b, **CLOSE)


# --------------------------------------------------------------------------------------- the checks


def every_layer(specimen: Specimen, model: PreTrainedModel) -> str:
    """Cuts before each layer: refused up to some layer, exact from there on."""
    inputs = specimen.batch(model)
    reasons = []
    for layer in range(NUM_LAYERS):
        cut = tp.Schedule.one_shot(layer, 0.5)
        try:
            with tp.prune(model, tp.build_strategy("uniform"), cut) as trace:
                forward(model, inputs)
                once = tp.Trace(stages=list(trace.stages))
                got = generate(model, inputs, max_new_tokens=2)
        except ValueError as error:
            assert len(reasons) == layer, "refused after a layer that was not"
            reasons.append(refusal(error))
            continue
        with masked(model, inputs, once):
            same_tokens_and_logits(got, generate(model, inputs, max_new_tokens=2))
    return reasons[-1] if len(reasons) == NUM_LAYERS else f"{EXACT} from layer {len(reasons)}"


def identity(specimen: Specimen, model: PreTrainedModel) -> None:
    """Keeping everything changes no bit."""
    for side in ("left", "right"):
        inputs = specimen.batch(model, side=side)
        plain = forward(model, inputs).logits
        with tp.prune(model, tp.build_strategy("pyramiddrop"), schedule(specimen, 1.0)) as trace:
            pruned = forward(model, inputs).logits
        assert torch.equal(plain, pruned)
        counts = tp.visual_mask(model, inputs["input_ids"]).sum(1).tolist()
        assert sum(counts) > 0
        assert [[len(k) for k in stage.kept] for stage in trace.stages] == [counts] * 2


def scores(specimen: Specimen, model: PreTrainedModel) -> None:
    """Attention rows are those of the model's own attention."""
    inputs = specimen.batch(model)
    (cut, *_), real = specimen.cuts, inputs["attention_mask"].bool()
    with torch.no_grad(), attention(model, "eager"):
        weights = model(**inputs, use_cache=False, output_attentions=True).attentions
    visual = tp.visual_mask(model, inputs["input_ids"])
    for source, layer in (("next", cut), ("previous", cut - 1)):
        strategy = tp.build_strategy("fastv", source=source)
        with tp.prune(model, strategy, tp.Schedule.one_shot(cut, 0.5)) as trace:
            forward(model, inputs)
        for row, ours in enumerate(trace.stages[0].scores):
            last = int(real[row].nonzero()[-1])
            theirs = weights[layer][row, :, last].mean(0)[visual[row]]
            torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


def drop_is_mask(specimen: Specimen, model: PreTrainedModel) -> None:
    """A pruned forward is the unmodified model with masks."""
    for side in ("left", "right"):
        inputs = specimen.batch(model, side=side)
        strategy = tp.build_strategy("pyramiddrop")
        with tp.prune(model, strategy, schedule(specimen)) as trace:
            pruned = forward(model, inputs).logits
        assert all(stage.kept for stage in trace.stages)
        with masked(model, inputs, trace):
            reference = forward(model, inputs).logits
        for row in range(len(pruned)):
            columns = survivors(model, inputs, trace, row)
            ours = pruned[row, -len(columns) :] if side == "left" else pruned[row, : len(columns)]
            torch.testing.assert_close(ours, reference[row, columns], **CLOSE)


def greedy(specimen: Specimen, model: PreTrainedModel) -> None:
    """A pruned generation is the unmodified model's with masks."""
    _generation(specimen, model)


def sampling(specimen: Specimen, model: PreTrainedModel) -> None:
    """Two sampled sequences per prompt are the unmodified model's with masks."""
    _generation(specimen, model, do_sample=True, num_return_sequences=2)


def beams(specimen: Specimen, model: PreTrainedModel) -> None:
    """Beam search, which permutes the cache, is the unmodified model's with masks."""
    _generation(specimen, model, num_beams=3, num_return_sequences=2)


def _generation(specimen: Specimen, model: PreTrainedModel, **options: Any) -> None:
    inputs = specimen.batch(model)
    with tp.prune(model, tp.build_strategy("pyramiddrop"), schedule(specimen)) as trace:
        forward(model, inputs)  # the trace of a batch that is not expanded
        once = tp.Trace(stages=list(trace.stages))
        torch.manual_seed(0)
        got = generate(model, inputs, **options)
    with masked(model, inputs, once):
        torch.manual_seed(0)
        expected = generate(model, inputs, **options)
    same_tokens_and_logits(got, expected)


def later_turn(specimen: Specimen, model: PreTrainedModel) -> str | None:
    """A second turn brings another image to the cache of the first."""
    first = specimen.batch(model, [(3, "image", 5)])
    second = specimen.batch(model, [(2, "image", 4)])
    whole = {
        key: torch.cat([first[key], second[key]], 1) for key in ("input_ids", "attention_mask")
    }
    turns = [
        {key: value for key, value in turn.items() if key != "attention_mask"}
        for turn in (first, second)
    ]

    def talk(note: Callable[[], None] = lambda: None) -> list[Tensor]:
        cache = DynamicCache(config=model.config.get_text_config(decoder=True))
        logits = []
        for turn in turns:
            with torch.no_grad():
                output = model(**turn, past_key_values=cache, use_cache=True)
            logits.append(output.logits[0, -1])
            note()
        assert cache.get_seq_length() > 0
        return logits

    try:
        talk()
    except (AttributeError, RuntimeError) as error:
        return f"impossible unpruned: {type(error).__name__} in a later call with an image"
    seen: list[list[tp.TracedStage]] = []
    with tp.prune(model, tp.build_strategy("pyramiddrop"), schedule(specimen)) as trace:
        ours = talk(lambda: seen.append(list(trace.stages)))
    both = [
        tp.TracedStage(layer=a.layer, kept=[torch.cat([a.kept[0], b.kept[0]])], scores=None)
        for a, b in zip(*seen, strict=True)
    ]
    with masked(model, whole, tp.Trace(stages=both)):
        theirs = talk()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, **CLOSE)
    return None


def prompt_lookup(specimen: Specimen, model: PreTrainedModel) -> None:
    """Guesses taken back leave the cache right."""
    inputs = specimen.batch(model, [(3, "image", 3, 3)])
    ids = inputs["input_ids"]
    ids[:, -3:] = ids[:, -6:-3]  # something to look up
    with tp.prune(model, tp.build_strategy("pyramiddrop"), schedule(specimen)):
        plain = generate(model, inputs, max_new_tokens=8)
        looked_up = generate(model, inputs, max_new_tokens=8, prompt_lookup_num_tokens=3)
    same_tokens_and_logits(looked_up, plain)


def static_cache(specimen: Specimen, model: PreTrainedModel) -> None:
    """A cache of fixed size gives the same tokens."""
    inputs = specimen.batch(model)
    with tp.prune(model, tp.build_strategy("pyramiddrop"), schedule(specimen)):
        grows = generate(model, inputs)
        fixed = generate(model, inputs, cache_implementation="static", disable_compile=True)
    same_tokens_and_logits(fixed, grows)


def batch_is_alone(specimen: Specimen, model: PreTrainedModel) -> None:
    """Each row of a padded batch gives what it gives alone."""
    _rows_alone(specimen, model, "original")


def renumbered(specimen: Specimen, model: PreTrainedModel) -> None:
    """Renumbered positions: rows alone, and a cache that makes no difference."""
    _rows_alone(specimen, model, "renumbered")
    _without_cache(specimen, model, "renumbered")


def _rows_alone(specimen: Specimen, model: PreTrainedModel, positions: str) -> None:
    prompts = [*PROMPTS, *(specimen.video_prompts if "video" in specimen.pictures else ())]
    strategy = tp.build_strategy("uniform")
    with tp.prune(model, strategy, schedule(specimen), positions=positions):
        together = forward(model, specimen.batch(model, prompts)).logits
        for row, prompt in enumerate(prompts):
            alone = forward(model, specimen.batch(model, [prompt])).logits[0]
            torch.testing.assert_close(together[row, -len(alone) :], alone, **CLOSE)


def no_cache(specimen: Specimen, model: PreTrainedModel) -> None:
    """A generation without a cache gives the same."""
    _without_cache(specimen, model, "original")


def _without_cache(specimen: Specimen, model: PreTrainedModel, positions: str) -> None:
    inputs = specimen.batch(model)
    with tp.prune(model, ByPlace(), schedule(specimen), positions=positions):
        cached = generate(model, inputs)
        plain = generate(model, inputs, use_cache=False)
    same_tokens_and_logits(cached, plain)


def training(specimen: Specimen, model: PreTrainedModel) -> None:
    """Labels, with and without gradient checkpointing: one loss, the same gradients."""
    inputs = specimen.batch(model)
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    labels[:, :-3] = -100
    gradients = []
    model.train()
    try:
        for checkpointing in (False, True):
            if checkpointing:
                model.gradient_checkpointing_enable({"use_reentrant": False})
            model.zero_grad()
            with tp.prune(model, tp.build_strategy("pyramiddrop"), schedule(specimen)) as trace:
                loss = model(**inputs, labels=labels, use_cache=False).loss
                loss.backward()
            assert trace.stages
            gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    finally:
        model.gradient_checkpointing_disable()
        model.zero_grad()
        model.eval()
    assert torch.isfinite(loss)
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


def packed(specimen: Specimen, model: PreTrainedModel) -> str | None:
    """Sequences end to end in a row, kept apart by positions: each gives what it gives alone."""
    prompts = [prompt for prompt in PROMPTS if "image" in prompt]
    alone = [specimen.batch(model, [prompt]) for prompt in prompts]
    given: list[Tensor | None] = []
    hook = examine(model).decoder.register_forward_pre_hook(
        lambda module, args, kwargs: given.append(kwargs.get("position_ids")), with_kwargs=True
    )
    expected = [forward(model, one).logits[0] for one in alone]
    hook.remove()
    whole = specimen.batch(model, prompts, "right")
    real = whole.pop("attention_mask").bool()
    call = {k: v[real][None] if v.shape == real.shape else v for k, v in whole.items()}
    own = zip(given, (one["input_ids"].shape[1] for one in alone), strict=True)
    call["position_ids"] = torch.cat([_with_text(axes, length) for axes, length in own], -1)
    try:
        apart = torch.allclose(forward(model, call).logits[0], torch.cat(expected), **CLOSE)
    except (IndexError, RuntimeError):
        apart = False
    if not apart:
        return "impossible unpruned: a sequence of a row does not give what it gives alone"
    for name in ("pyramiddrop", "uniform"):
        with tp.prune(model, tp.build_strategy(name), schedule(specimen)):
            together, end = forward(model, call).logits[0], 0
            for one in alone:
                logits = forward(model, one).logits[0]
                start, end = end, end + len(logits)
                torch.testing.assert_close(together[start:end], logits, **CLOSE)
        assert end == len(together)
    return None


def _with_text(positions: Tensor | None, length: int) -> Tensor:
    """Positions of a sequence; those of several axes with the text's before them."""
    line = torch.arange(length)[None]
    if positions is None:
        return line
    return torch.cat([line[None], positions.long()]) if len(positions) == 3 else positions


_ALL = (
    *(every_layer, identity, scores, drop_is_mask, batch_is_alone, renumbered, packed),
    *(greedy, sampling, beams, prompt_lookup, static_cache, no_cache, later_turn, training),
)
#: What it returns is its outcome, if there is more to say than that it is exact.
Check = Callable[[Specimen, PreTrainedModel], str | None]
CHECKS: dict[str, Check] = {check.__name__: check for check in _ALL}


def outcome(specimen: Specimen, model: PreTrainedModel, check: Check) -> str:
    """`exact`, or `refused: ...` where the engine says why not; an AssertionError otherwise."""
    if check.__name__ in specimen.unable:
        return f"impossible unpruned: {specimen.unable[check.__name__]}"
    try:
        return check(specimen, model) or EXACT
    except ValueError as error:
        return refusal(error)


def refusal(error: ValueError) -> str:
    """What the engine said; any other error is passed on."""
    message = " ".join(str(error).split())
    if not re.match(r"prune: expected .* got ", message):
        raise error
    return f"refused: {message.removeprefix('prune: ')}"
