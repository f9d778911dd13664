"""Checks that pruning is exact on a given checkpoint: `tokenprune verify`.

Two facts decide whether pruned numbers can be trusted on a model. *Identity*: keeping everything
changes no bit. *Drop = mask*: dropping tokens gives what the unmodified model gives when every
layer is handed a mask that hides the same tokens.

Half precision rounds the same sum differently with and without the hidden keys, by as much as a
wrong token makes. So a model in half precision is held to what rounding does to itself, and once
more with its weights as float32, which rounding explains nothing of.

Shape suffixes: B batch rows, T positions, S new tokens, V vocabulary, L decoder layers.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image, ImageDraw
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

import tokenprune as tp
from tokenprune.evaluation.reference import HALVES, float32, hidden, why_not_float32
from tokenprune.runs.compose import Pruning
from tokenprune.runs.models import LoadedModel

# Largest difference of logits, relative to the largest logit.
_LIMIT, _LIMIT_OF_DOUBLES = 1e-4, 1e-6
#: In half precision: so often what moving what enters each layer by half a unit in the last place
#: does to the unmodified model.
_TIMES_NOISE = 2
_NUM_NEW = 8


@dataclass(frozen=True)
class Check:
    """One line of the report: `value` passes while it is at most `limit`."""

    name: str
    value: float
    limit: float

    @property
    def passed(self) -> bool:
        return self.value <= self.limit


def made_image() -> Image.Image:
    """A picture with something in every corner, the same on every machine."""
    rng = random.Random(0)
    image = Image.new("RGB", (224, 224), (40, 44, 52))
    draw = ImageDraw.Draw(image)
    for _ in range(40):
        x, y, size = rng.randrange(224), rng.randrange(224), rng.randrange(8, 40)
        colour = (rng.randrange(256), rng.randrange(256), rng.randrange(256))
        draw.rectangle((x, y, x + size, y + size), fill=colour)
    return image


def verify(loaded: LoadedModel, inputs: Mapping[str, Any], pruning: Pruning) -> list[Check]:
    """Runs both checks on one prompt.

    Args:
        loaded: Model and processor. Of one in half precision, drop = mask is checked as it is and
            with its weights as float32, unless `why_not_float32` says why that cannot be.
        inputs: One prompt with an image (one row), on the model's device.
        pruning: What to check; drop = mask always uses original positions, because renumbering
            has no counterpart in the unmodified model.

    Raises:
        ValueError: If the schedule drops nothing: all checks would pass; or if the strategy mixes
            tokens, which no mask does.
    """
    model = loaded.model
    plain_SV, plain_ids = _generate(model, inputs)
    checks = []
    everything = tp.Schedule(
        tuple(tp.Stage(stage.layer, 1.0) for stage in pruning.schedule.stages),
        pruning.schedule.rounding,
    )
    for positions in dict.fromkeys(("original", pruning.positions)):
        with tp.prune(model, pruning.strategy, everything, positions):
            logits_SV, ids = _generate(model, inputs)
        same = torch.equal(ids, plain_ids) and torch.equal(logits_SV, plain_SV)
        checks.append(Check(f"identity, {positions} positions", 0.0 if same else 1.0, 0.0))
    checks += _drop_is_mask(model, inputs, pruning)
    if model.dtype in HALVES and why_not_float32(model) is None:
        with float32(model):
            checks += _drop_is_mask(model, inputs, pruning)
    return checks


def _drop_is_mask(model: Any, inputs: Mapping[str, Any], pruning: Pruning) -> list[Check]:
    """The check of a prompt and of an answer to it, in the precision that the model has now."""
    inputs = {
        key: value.to(model.dtype)
        if isinstance(value, Tensor) and value.is_floating_point()
        else value
        for key, value in inputs.items()
    }
    with tp.prune(model, pruning.strategy, pruning.schedule, "original") as trace:
        logits_SV, ids = _generate(model, inputs)
    num_visual = int(tp.visual_mask(model, inputs["input_ids"]).sum())
    if not trace.stages or len(trace.stages[-1].kept[0]) == num_visual:
        raise ValueError(
            f"verify: expected a schedule that drops visual tokens, got one that keeps all "
            f"{num_visual}. Choose another schedule."
        )
    if any(stage.weights is not None for stage in trace.stages):
        raise ValueError(
            f"verify: expected a strategy that drops tokens, got {type(pruning.strategy).__name__},"
            " which mixes them: no mask does the same. Choose strategy=pyramiddrop; the engine is "
            "the same."
        )
    masked_SV = _masked_logits(model, inputs, ids, trace)
    scale = max(masked_SV.abs().max().item(), 1e-6)
    limit = _LIMIT_OF_DOUBLES if model.dtype == torch.float64 else _LIMIT
    if model.dtype in HALVES:
        noise = torch.finfo(model.dtype).eps / 2
        moved_SV = _masked_logits(model, inputs, ids, trace, noise)
        limit = _TIMES_NOISE * (moved_SV - masked_SV).abs().max().item() / scale
    difference_S = (logits_SV - masked_SV).abs().amax(-1) / scale
    precision = str(model.dtype).removeprefix("torch.")
    return [
        Check(f"drop = mask, prefill, {precision}", difference_S[0].item(), limit),
        Check(f"drop = mask, decoding, {precision}", difference_S[1:].max().item(), limit),
    ]


class _Forced(LogitsProcessor):
    """Lets a generation say given tokens only."""

    def __init__(self, ids_BT: Tensor) -> None:
        self.ids_BT = ids_BT

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        allowed_B1 = self.ids_BT[:, input_ids.shape[1], None].to(scores.device)
        return torch.full_like(scores, -torch.inf).scatter(1, allowed_B1, 0.0)


def _generate(
    model: Any, inputs: Mapping[str, Any], said_BT: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Logits (S, V) in float32, and the ids (1, T) of prompt and answer.

    Args:
        model: The model, pruned or not.
        inputs: One prompt.
        said_BT: Prompt and answer that it is to say; None for the likeliest.
    """
    # Forced to go on, a model may say its own placeholder, which no image stands behind.
    vocabulary = torch.arange(model.config.get_text_config().vocab_size, device=model.device)
    placeholders = tp.visual_mask(model, vocabulary[None])[0].nonzero()[:, 0].tolist()
    forced = [] if said_BT is None else [_Forced(said_BT)]
    with torch.no_grad():
        output = model.generate(
            **inputs,
            max_new_tokens=_NUM_NEW,
            min_new_tokens=_NUM_NEW,
            do_sample=False,
            num_beams=1,
            suppress_tokens=placeholders,
            logits_processor=LogitsProcessorList(forced),
            output_logits=True,
            return_dict_in_generate=True,
        )
    return torch.stack(output.logits, 1)[0].float(), output.sequences


def _masked_logits(
    model: Any, inputs: Mapping[str, Any], ids_BT: Tensor, trace: tp.Trace, noise: float = 0.0
) -> Tensor:
    """Logits (S, V) of the unmodified model for given tokens, with the dropped ones hidden.

    It is asked as the pruned model was: the prompt, and then each token with its cache.
    """
    visual_T = tp.visual_mask(model, inputs["input_ids"])[0]
    seats = visual_T.nonzero()[:, 0]
    num_layers = tp.cost.DecoderShape.from_config(model.config).num_layers
    hidden_LT = torch.zeros(num_layers, len(visual_T), dtype=torch.bool, device=visual_T.device)
    for stage in trace.stages:
        hidden_LT[stage.layer :] = visual_T
        hidden_LT[stage.layer :, seats[stage.kept[0].to(seats.device)]] = False
    with hidden(model, hidden_LT, noise):
        logits_SV, _ = _generate(model, inputs, ids_BT)
    return logits_SV
