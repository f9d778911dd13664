"""One call, or a short conversation, of any model type of the zoo, drawn from a seed."""

from __future__ import annotations

import functools
import random
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import transformers
from oracles import EVERY
from transformers import PreTrainedModel
from zoo import ZOO, Prompt, Specimen
from zoo.specimen import NUM_LAYERS
from zoo.tower import CLASS_TOKENS

import tokenprune as tp
from tokenprune.families.adapter import adapter_of
from tokenprune.strategy import vision_needs

TYPES = sorted(name for name in ZOO if hasattr(transformers, ZOO[name].model_class))
WAYS = ("forward", "forward", "labels", "train", "greedy", "beams", "lookup", "static", "turns")
#: Types that flash's stand-in can run, whose masks are plain.
FLASH = ("llava", "llava_next", "qwen2_vl", "qwen2_5_vl", "smolvlm", "internvl", "llava_onevision",
         "idefics3", "mistral3", "got_ocr2", "vipllava", "glm4v")  # fmt: skip
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


@functools.cache
def assistant_of(model_type: str) -> PreTrainedModel:
    """A model of the same weights that is never pruned."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return ZOO[model_type].build("eager")


def draw_beast(seed: str, types: Sequence[str] = TYPES) -> Beast:
    rng = random.Random(seed)
    pick = rng.choice
    model_type = pick(types)
    layers = sorted(rng.sample(range(NUM_LAYERS), pick([1, 2, 2, 3])))
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
    unable = unable or (model_type not in CLASS_TOKENS and _asks_class(own))
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
    lengths = [
        case.specimen.batch(model, [prompt])["input_ids"].shape[1] for prompt in case.prompts
    ]
    longest = max(lengths)
    return [
        (int(prompt[0]) + longest - length, *prompt[1:])
        for prompt, length in zip(case.prompts, lengths, strict=True)
    ]
