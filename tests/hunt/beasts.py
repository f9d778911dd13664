"""One call, or a short conversation, of any model type of the zoo.

Held against the unmodified model whose layers are given masks that hide what the trace says was
dropped, and whose survivors are mixed as it says (`zoo.checks.masked`), and against each row alone.
"""

from __future__ import annotations

import copy
import functools
import random
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from oracles import EVERY
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from zoo import ZOO, Prompt, Specimen
from zoo.checks import generate, masked, refusal, survivors
from zoo.flash import stand_in
from zoo.specimen import NUM_LAYERS, TEXT

import tokenprune as tp
from tokenprune.families.adapter import adapter_of
from tokenprune.strategy import DecoderKeys, vision_needs

CLOSE = {"atol": 3e-4, "rtol": 1e-3}
TYPES = sorted(name for name in ZOO if hasattr(transformers, ZOO[name].model_class))
WAYS = ("forward", "forward", "labels", "train", "greedy", "beams", "lookup", "static", "turns")
#: Types that flash's stand-in can run, whose masks are plain.
FLASH = ("llava", "llava_next", "qwen2_vl", "qwen2_5_vl", "smolvlm", "internvl", "llava_onevision",
         "idefics3", "mistral3", "got_ocr2", "vipllava", "glm4v")  # fmt: skip
#: Types whose tower has a class token.
CLASS_TOKEN = ("llava", "llava_next", "internvl")
#: Entries of `Specimen.unable` that a way needs.
CHECKED = {"beams": "beams", "lookup": "prompt_lookup", "static": "static_cache"}
STRATEGIES = (
    *EVERY,
    tp.build_strategy("fastv", queries="all", source="next"),
    tp.build_strategy("pyramiddrop", queries="all", source="previous"),
    tp.build_strategy("sparsevlm", version="2.0"),
    tp.build_strategy("dart", exact_budget=True),
    *(tp.build_strategy(name, queries="all") for name in ("fastervlm", "vispruner")),
    tp.build_strategy("visionzip", queries="all", space="decoder"),
    tp.build_strategy("vscan", shallow=0, window=2, queries="all"),
)


@dataclass
class Beast:
    """A case.

    Attributes:
        seed: What it is drawn from.
        model_type: Of the zoo.
        attention: The implementation.
        prompts: Of each row.
        side: Of the pads.
        policy: Positions of the survivors.
        logits: As for `prune`.
        strategy: Chooses.
        schedule: How many.
        way: What is done.
        after: Between two turns, what is done to the cache.
    """

    seed: str
    model_type: str
    attention: str
    prompts: list[Prompt]
    side: str
    policy: str
    logits: str
    strategy: tp.PruningStrategy
    schedule: tp.Schedule
    way: str
    after: str

    @property
    def specimen(self) -> Specimen:
        return ZOO[self.model_type]

    @property
    def strategies(self) -> list[tp.PruningStrategy]:
        return [self.strategy.at(cut) for cut in range(len(self.schedule.stages))]

    def __str__(self) -> str:
        return "\n".join(f"{key}={value}" for key, value in vars(self).items())


@functools.cache
def model_of(model_type: str, attention: str) -> PreTrainedModel:
    flash = attention.startswith("flash")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = ZOO[model_type].build("eager" if flash else attention)
    for module in model.modules() if flash else ():  # a stand-in, which transformers cannot check
        if hasattr(module, "config"):
            module.config._attn_implementation_internal = attention
    return model


def draw_beast(seed: str, types: Sequence[str] = TYPES) -> Beast:
    rng = random.Random(seed)
    pick = rng.choice
    model_type = pick(types)
    layers = sorted(rng.sample(range(NUM_LAYERS), pick([1, 2, 2, 3])))
    if rng.random() < 0.5:  # some add features to visual tokens in their first layers
        layers = sorted({max(layer, ZOO[model_type].cuts[0]) for layer in layers})
    keeps = sorted((pick([0.0, 0.2, 0.4, 0.5, 0.7, 0.9, 1.0]) for _ in layers), reverse=True)
    way = pick(WAYS)
    num_rows = 1 if way == "lookup" else pick([1, 2, 2, 3])
    case = Beast(
        seed=seed,
        model_type=model_type,
        attention=pick(["eager", "eager", "sdpa", "sdpa", "sdpa", "flash_attention_2"]),
        prompts=[_draw_prompt(rng, ZOO[model_type]) for _ in range(num_rows)],
        side="left" if way not in ("forward", "labels", "train") else pick(["left", "right"]),
        policy=pick(["original", "original", "renumbered"]),
        logits=pick(["all", "all", "full", "supervised"]),
        strategy=_draw_strategy(rng, model_type, layers),
        schedule=tp.Schedule(
            tuple(tp.Stage(layer, keep) for layer, keep in zip(layers, keeps, strict=True)),
            pick(["floor", "nearest"]),
        ),
        way=way,
        after=pick(["nothing", "copy", "crop", "repeat"]),
    )
    if case.attention.startswith("flash") and model_type not in FLASH:
        case.attention = "sdpa"
    if not any(isinstance(part, str) for prompt in case.prompts for part in prompt):
        case.prompts[0] = (*case.prompts[0], next(iter(ZOO[model_type].pictures)), 2)
    if rng.random() < 0.15:
        case.prompts = _of_one_length(case)
    if way == "turns" and rng.random() < 0.5:  # some count positions by a mask that is whole
        case.prompts = case.prompts[:1] * num_rows
    if way == "lookup":
        case.prompts[0] = (*case.prompts[0][:-1], 6)
    return case


def _draw_strategy(rng: random.Random, model_type: str, layers: list[int]) -> tp.PruningStrategy:
    """One for all cuts, or one for each; mostly one that the type can run."""
    if len(layers) > 1 and rng.random() < 0.2:
        parts = [_draw_strategy(rng, model_type, [layer]) for layer in layers]
        return tp.PerStage(tuple(parts))
    own = rng.choice(STRATEGIES)
    unable = (layers[0] == 0 and _source(own) == "previous") or (
        vision_needs(own) and adapter_of(model_type).tower is None
    )
    unable = unable or (model_type not in CLASS_TOKEN and _asks_class(own))
    if unable and rng.random() < 0.95:
        return _draw_strategy(rng, model_type, layers)
    return own


def _asks_class(strategy: tp.PruningStrategy) -> bool:
    needs = vision_needs(strategy)
    return any(isinstance(need, tp.VisionRows) and need.queries == "class" for need in needs)


def _source(strategy: tp.PruningStrategy) -> str:
    sources = [getattr(need, "source", "") for need in strategy.needs()]
    return next(iter(filter(None, sources)), "")


def _draw_prompt(rng: random.Random, specimen: Specimen) -> Prompt:
    """Text, then up to two pictures of one kind, each with text after it."""
    parts: list[int | str] = [rng.choice([1, 2, 4])]
    kind = rng.choice(list(specimen.pictures))
    for _ in range(rng.choice([0, 1, 1, 1, 2])):
        parts += [kind, rng.choice([1, 2, 5])]
    if len(parts) > 3 and rng.random() < 0.1:
        parts.pop(2)  # two side by side
    return tuple(parts)


def _of_one_length(case: Beast) -> list[Prompt]:
    """The prompts with so much text before them that no row has pads."""
    model = model_of(case.model_type, "eager")
    lengths = [case.specimen.batch(model, [prompt])["input_ids"].shape[1] for prompt in case.prompts]
    longest = max(lengths)
    return [
        (int(prompt[0]) + longest - length, *prompt[1:])
        for prompt, length in zip(case.prompts, lengths, strict=True)
    ]


# ----------------------------------------------------------------------------------------- checking


class Impossible(Exception):
    """The unmodified model cannot do it."""


def check(case: Beast) -> str:
    """`exact`, or why it was refused or is impossible; an error otherwise."""
    with stand_in() if case.attention.startswith("flash") else nullcontext():
        return _check(case)


def _check(case: Beast) -> str:
    model = model_of(case.model_type, case.attention)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # models warn of much that is their own affair
        if CHECKED.get(case.way) in case.specimen.unable:
            return "impossible unpruned"
        try:
            inputs = case.specimen.batch(model, case.prompts, case.side)
            with torch.no_grad():
                model(**inputs, use_cache=False)
        except (RuntimeError, ValueError, IndexError, TypeError):
            return "impossible unpruned"
        does = {"forward": _forward, "labels": _labels, "train": _train, "turns": _turns}
        try:
            does.get(case.way, _generates)(case, model, inputs)
        except Impossible:
            return "impossible unpruned"
        except ValueError as error:
            return refusal(error).split(", got")[0].split(", for a strategy")[0]
    return "exact"


def _prune(case: Beast, model: PreTrainedModel) -> Any:
    return tp.prune(model, case.strategy, case.schedule, case.policy, case.logits)


def _known(case: Beast, trace: tp.Trace) -> bool:
    """Whether masks and mixtures say all that a cut does."""
    before = any(getattr(own, "space", "") == "vision" for own in case.strategies)
    return case.policy == "original" and not before


def _forward(case: Beast, model: PreTrainedModel, inputs: dict[str, Tensor]) -> None:
    with torch.no_grad(), _prune(case, model) as trace:
        ours = model(**inputs, use_cache=False).logits
        stages = list(trace.stages)
    seen = tp.Trace(stages=stages)
    columns = [survivors(model, inputs, seen, row) for row in range(len(case.prompts))]
    rows = [_of_row(case, inputs, ours[row], own) for row, own in enumerate(columns)]
    if _known(case, trace):
        with torch.no_grad(), masked(model, inputs, seen):
            theirs = model(**inputs, use_cache=False).logits
        for row, own in enumerate(columns):
            torch.testing.assert_close(rows[row], theirs[row, own], **CLOSE)
    _check_scores(case, model, inputs, stages)
    _each_alone(case, model, stages, rows)


def _of_row(case: Beast, inputs: dict[str, Tensor], logits: Tensor, columns: Tensor) -> Tensor:
    """Logits of a row's survivors."""
    if case.logits == "full" or len(logits) == inputs["input_ids"].shape[1]:
        return logits[columns]
    return logits[-len(columns) :] if case.side == "left" else logits[: len(columns)]


def _check_scores(
    case: Beast, model: PreTrainedModel, inputs: dict[str, Tensor], stages: list[tp.TracedStage]
) -> None:
    """Of the first cut, attention scores are those of the model's own attention."""
    strategy, real = case.strategies[0], inputs["attention_mask"].bool()
    if not hasattr(strategy, "source") or "scores" in case.specimen.unable:
        return
    if case.attention != "eager":  # its model has the same weights
        model = model_of(case.model_type, "eager")
    with torch.no_grad():
        weights = model(**inputs, use_cache=False, output_attentions=True).attentions
    layer = case.schedule.stages[0].layer - (strategy.source == "previous")
    visual = tp.visual_mask(model, inputs["input_ids"])
    for row, ours in enumerate(stages[0].scores):
        own = real[row].nonzero()[:, 0]
        rows = own if strategy.queries == "all" else own[-1:]
        theirs = weights[layer][row].mean(0)[rows].mean(0)[visual[row]]
        torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=2e-3)


def _each_alone(
    case: Beast, model: PreTrainedModel, stages: list[tp.TracedStage], rows: list[Tensor]
) -> None:
    """Each row of a batch is what it is alone, as far as the unmodified model's are."""
    if "batch_is_alone" in case.specimen.unable or len(case.prompts) == 1:
        return
    if _by_position(case) and case.side == "left":
        return  # keys are turned by positions that count the pads
    with torch.no_grad(), _prune(case, model) as trace:
        for row, prompt in enumerate(case.prompts):
            inputs = case.specimen.batch(model, [prompt], case.side)
            try:
                alone = model(**inputs, use_cache=False).logits[0]
            except ValueError as error:
                if "expected at least one token to be left" in str(error):
                    continue  # text of another row spared the batch that
                raise
            theirs = list(trace.stages)
            if not theirs or not _same_choice(stages, theirs, row):
                continue
            own = survivors(model, inputs, tp.Trace(stages=theirs), 0)
            torch.testing.assert_close(rows[row], _of_row(case, inputs, alone, own), **CLOSE)


def _by_position(case: Beast) -> bool:
    """Whether a choice depends on where pads stand, if they are counted."""
    return any(isinstance(need, DecoderKeys) for own in case.strategies for need in own.needs())


def _same_choice(
    ours: list[tp.TracedStage], theirs: list[tp.TracedStage], row: int, other: int = 0
) -> bool:
    """Whether a row kept the same alone; False where rounding may have decided."""
    for a, b in zip(ours, theirs, strict=True):
        kept, alone = a.kept[row].tolist(), b.kept[other].tolist()
        if a.scores is not None and b.scores is not None:
            torch.testing.assert_close(a.scores[row], b.scores[other], atol=2e-5, rtol=2e-3)
            if kept != alone:
                order = b.scores[other].sort(descending=True).values
                assert order[len(kept) - 1] - order[len(kept)] < 1e-5, f"{kept}, alone {alone}"
                return False
        assert kept == alone, f"kept {kept}, alone {alone}"
    return True


# ----------------------------------------------------------------------------------------- learning


def _answers(case: Beast, inputs: dict[str, Tensor]) -> Tensor:
    """Labels of the last token or two of each row; of a row that ends so, it asks for itself."""
    labels = torch.full_like(inputs["input_ids"], -100)
    for row, prompt in enumerate(case.prompts):
        # A first token would be predicted by a pad.
        columns = inputs["attention_mask"][row].nonzero()[1:, 0][-min(2, int(prompt[-1])) :]
        labels[row, columns] = inputs["input_ids"][row, columns]
    return labels


def _labels(case: Beast, model: PreTrainedModel, inputs: dict[str, Tensor]) -> None:
    labels = _answers(case, inputs)
    with torch.no_grad(), _prune(case, model) as trace:
        ours = model(**inputs, labels=labels, use_cache=False).loss
        seen = tp.Trace(stages=list(trace.stages))
    if not _known(case, trace):
        return
    with torch.no_grad(), masked(model, inputs, seen):
        logits = model(**inputs, use_cache=False).logits
    torch.testing.assert_close(ours, _loss(model, inputs, labels, logits, seen), **CLOSE)


def _loss(
    model: PreTrainedModel, inputs: dict[str, Tensor], labels: Tensor, logits: Tensor,
    trace: tp.Trace,
) -> Tensor:  # fmt: skip
    """Of each label, as the survivor before it predicts it."""
    total, count = torch.zeros(()), 0
    for row in range(len(labels)):
        own = survivors(model, inputs, trace, row)
        given = labels[row, own]
        total = total + nn.functional.cross_entropy(
            logits[row, own][:-1].float(), given[1:], ignore_index=-100, reduction="sum"
        )
        count += int((given[1:] != -100).sum())
    return total / count


def _train(case: Beast, model: PreTrainedModel, inputs: dict[str, Tensor]) -> None:
    """Gradients, with and without checkpoints, are those of the unmodified model."""
    labels = _answers(case, inputs)
    found, ways = [], [None, False, True]
    model.train()
    try:
        if not _takes_reentrant(model, inputs, labels):
            ways.pop()
        for checkpointing in ways:
            if checkpointing is not None:
                model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
            model.zero_grad()
            with _prune(case, model) as trace:
                loss = model(**inputs, labels=labels, use_cache=False).loss
                loss.backward()
                seen = tp.Trace(stages=list(trace.stages))
            found.append(_gradients(model))
            model.gradient_checkpointing_disable()
        for other in found[1:]:  # reentrant ones stop at the tower, whose input needs no gradient
            _near(other, {name: found[0][name] for name in other}, "checkpoints: ")
        if not _known(case, trace):
            return
        model.zero_grad()
        with masked(model, inputs, seen):
            logits = model(**inputs, use_cache=False).logits
            expected = _loss(model, inputs, labels, logits, seen)
        torch.testing.assert_close(loss, expected, **CLOSE)
        expected.backward()
        _near(found[0], _gradients(model))
    finally:
        model.gradient_checkpointing_disable()
        model.zero_grad()
        model.eval()


def _takes_reentrant(
    model: PreTrainedModel, inputs: dict[str, Tensor], labels: Tensor
) -> bool:
    """Whether the unmodified model can be trained so: some hand one tensor to several layers."""
    model.gradient_checkpointing_enable({"use_reentrant": True})
    try:
        model(**inputs, labels=labels, use_cache=False).loss.backward()
    except RuntimeError:
        return False
    finally:
        model.gradient_checkpointing_disable()
    return True


def _gradients(model: PreTrainedModel) -> dict[str, Tensor]:
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def _near(ours: dict[str, Tensor], theirs: dict[str, Tensor], what: str = "") -> None:
    largest = max(float(gradient.abs().max()) for gradient in theirs.values())
    for name, gradient in theirs.items():
        apart = float((ours[name] - gradient).abs().max())
        assert apart <= 2e-3 * float(gradient.abs().max()) + 1e-5 * largest, what + name


# --------------------------------------------------------------------------------------- generation


def _generates(case: Beast, model: PreTrainedModel, inputs: dict[str, Tensor]) -> None:
    beams = {"num_beams": 3, "num_return_sequences": 2, "output_scores": True}
    options: dict[str, Any] = {"greedy": {}, "beams": beams}.get(case.way, {})
    more: dict[str, Any] = {
        "lookup": {"prompt_lookup_num_tokens": 3},
        "static": {"cache_implementation": "static", "disable_compile": True},
    }.get(case.way, {})
    if case.way == "lookup":  # something to look up
        inputs["input_ids"][:, -2:] = inputs["input_ids"][:, -5:-3]
    try:
        generate(model, inputs, **options, **more)
    except (AttributeError, RuntimeError, ValueError, TypeError, IndexError) as error:
        raise Impossible from error
    with torch.no_grad(), _prune(case, model) as trace:
        model(**inputs, use_cache=False)
        seen = tp.Trace(stages=list(trace.stages))
        got = generate(model, inputs, **options)
        if more:
            other = generate(model, inputs, **more)
    if more:
        _same_words(other, got)
    if not _known(case, trace) or _by_position(case):
        return  # positions that count the pads, where `generate` counts none, turn other keys
    with torch.no_grad(), masked(model, inputs, seen):
        expected = generate(model, inputs, **options)
    if case.way == "beams":
        torch.testing.assert_close(got.sequences_scores, expected.sequences_scores, **CLOSE)
    else:
        _same_words(got, expected)


def _same_words(ours: Any, theirs: Any) -> None:
    """The same logits, step by step, up to where rounding may choose a token."""
    start = ours.sequences.shape[1] - len(ours.logits)
    for step, (a, b) in enumerate(zip(ours.logits, theirs.logits, strict=True)):
        torch.testing.assert_close(a, b, **CLOSE)
        said, expected = ours.sequences[:, start + step], theirs.sequences[:, start + step]
        if not torch.equal(said, expected):
            first, second = b[..., :TEXT].topk(2).values.unbind(-1)
            assert (first - second)[said != expected].max() < 1e-3, "other tokens"
            return


# -------------------------------------------------------------------------------- several turns


def _turns(case: Beast, model: PreTrainedModel, inputs: dict[str, Tensor]) -> None:
    """Text turns go on from the cache of a prompt."""
    num_rows = len(case.prompts)
    words = torch.Generator().manual_seed(len(case.seed))
    plain = bool(inputs["attention_mask"].all())  # then it goes without a mask
    between = functools.partial(_between, case, model, plain)
    says = [torch.randint(1, TEXT, (num_rows, n), generator=words) for n in (1, 4, 1)]

    def talk(does: Callable[[Any, Tensor], tuple[Any, Tensor]]) -> list[Tensor]:
        cache = DynamicCache(config=model.config.get_text_config(decoder=True))
        mask, rows = inputs["attention_mask"], torch.arange(num_rows)
        logits = [model(**inputs, past_key_values=cache, use_cache=True).logits[:, -1]]
        for turn, ids in enumerate(says):
            if turn == 1:
                cache, rows = does(cache, mask)
                mask = mask[rows]
            mask = nn.functional.pad(mask, (0, ids.shape[1]), value=1)
            more = {} if plain else {"attention_mask": mask}
            output = model(input_ids=ids[rows], **more, past_key_values=cache)
            logits.append(output.logits[:, -1])
        return logits

    try:
        with torch.no_grad():
            talk(between)
    except (AttributeError, RuntimeError, ValueError, TypeError, IndexError) as error:
        raise Impossible from error
    with torch.no_grad(), _prune(case, model) as trace:
        ours = talk(between)
        seen = tp.Trace(stages=list(trace.stages))
    if not _known(case, trace):
        return
    with torch.no_grad(), masked(model, inputs, seen, extra=20):
        theirs = talk(between)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, **CLOSE)


def _between(
    case: Beast, model: PreTrainedModel, plain: bool, cache: Any, mask: Tensor
) -> tuple[Any, Tensor]:
    """What is done to a cache, and which rows it holds then."""
    rows = torch.arange(len(mask))
    if case.after in ("copy", "crop"):
        left = cache
        cache = copy.deepcopy(cache) if case.after == "copy" else cache
        more = {} if plain else {"attention_mask": nn.functional.pad(mask, (0, 2), value=1)}
        model(input_ids=torch.full((len(mask), 2), 5), **more, past_key_values=left)
        if case.after == "crop":
            cache.crop(-2)
    elif case.after == "repeat":
        cache.batch_repeat_interleave(2)
        rows = rows.repeat_interleave(2)
    return cache, rows
