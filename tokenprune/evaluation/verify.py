"""Checks that pruning is exact on a given checkpoint: `tokenprune verify`.

Two facts decide whether pruned numbers can be trusted on a model. *Identity*: keeping everything
changes no bit. *Drop = mask*: dropping tokens gives what the unmodified model gives when every
layer is handed a mask that hides the same tokens.

Shape suffixes: B batch rows, T positions, S prompt positions, Q query rows, K keys.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image, ImageDraw
from torch import Tensor

import tokenprune as tp
from tokenprune.runs.compose import Pruning
from tokenprune.runs.models import LoadedModel

# Largest difference of logits, relative to the largest logit. Half precision rounds the same sum
# differently with and without the hidden keys.
TOLERANCES = {torch.float32: 1e-4, torch.float64: 1e-6, torch.float16: 2e-2, torch.bfloat16: 8e-2}
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
        loaded: Model and processor.
        inputs: One prompt with an image (one row), on the model's device.
        pruning: What to check; drop = mask always uses original positions, because renumbering
            has no counterpart in the unmodified model.

    Raises:
        ValueError: If the schedule drops nothing: all checks would pass; or if the strategy mixes
            tokens, which no mask does.
    """
    model = loaded.model
    plain_logits, plain_ids = _generate(model, inputs)
    checks = []
    everything = tp.Schedule(
        tuple(tp.Stage(stage.layer, 1.0) for stage in pruning.schedule.stages),
        pruning.schedule.rounding,
    )
    for positions in dict.fromkeys(("original", pruning.positions)):
        with tp.prune(model, pruning.strategy, everything, positions):
            logits, ids = _generate(model, inputs)
        same = torch.equal(ids, plain_ids) and torch.equal(logits, plain_logits)
        checks.append(Check(f"identity, {positions} positions", 0.0 if same else 1.0, 0.0))
    with tp.prune(model, pruning.strategy, pruning.schedule, "original") as trace:
        logits, ids = _generate(model, inputs)
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
    masked = _masked_logits(model, inputs, ids, trace)
    scale = max(masked.abs().max().item(), 1e-6)
    limit = TOLERANCES.get(model.dtype, 1e-4)
    difference = (logits - masked).abs().amax(-1) / scale  # (number of new tokens,)
    checks.append(Check("drop = mask, prefill", difference[0].item(), limit))
    checks.append(Check("drop = mask, decoding", difference[1:].max().item(), limit))
    return checks


def _generate(model: Any, inputs: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """Logits (new tokens, vocabulary) in float32 and the ids (1, T) of a greedy generation."""
    # Forced to go on, a model may say its own placeholder, which no image stands behind.
    vocabulary = torch.arange(model.config.get_text_config().vocab_size, device=model.device)
    placeholders = tp.visual_mask(model, vocabulary[None])[0].nonzero()[:, 0].tolist()
    with torch.no_grad():
        output = model.generate(
            **inputs,
            max_new_tokens=_NUM_NEW,
            min_new_tokens=_NUM_NEW,
            do_sample=False,
            num_beams=1,
            suppress_tokens=placeholders,
            output_logits=True,
            return_dict_in_generate=True,
        )
    return torch.stack(output.logits, 1)[0].float(), output.sequences


def _masked_logits(
    model: Any, inputs: Mapping[str, Any], ids_BT: Tensor, trace: tp.Trace
) -> Tensor:
    """Logits that the unmodified model gives the generated tokens when masks hide the dropped ones.

    One call without a cache over prompt and answer; each decoder layer gets a mask of its own.
    """
    num_prompt = inputs["input_ids"].shape[1]
    visual_T = tp.visual_mask(model, ids_BT)[0]
    visual_T[num_prompt:] = False  # an answer is text
    seats = visual_T.nonzero()[:, 0]
    length = ids_BT.shape[1]
    eye_TT = torch.eye(length, dtype=torch.bool, device=ids_BT.device)
    causal_TT = torch.ones_like(eye_TT).tril()
    hooks = []
    layers = model.get_decoder().layers
    for index, layer in enumerate(layers):
        kept = [stage.kept[0] for stage in trace.stages if stage.layer <= index]
        hidden_T = visual_T.clone()
        hidden_T[seats if not kept else seats[kept[-1].to(seats.device)]] = False
        # A hidden token still sees itself: an empty row would be NaN and spread.
        allowed_TT = causal_TT & (~hidden_T[None] | eye_TT)
        hooks.append(layer.register_forward_pre_hook(_hide(allowed_TT), with_kwargs=True))
    extended = dict(inputs) | {"input_ids": ids_BT}
    for key in ("attention_mask", "token_type_ids", "mm_token_type_ids"):
        if key in inputs:  # the answer is text: attended to, and of type 0
            new = torch.full_like(ids_BT, int(key == "attention_mask"))
            new[:, :num_prompt] = inputs[key]
            extended[key] = new
    try:
        with torch.no_grad():
            logits = model(**extended, use_cache=False).logits
    finally:
        for hook in hooks:
            hook.remove()
    answer: Tensor = logits[0, num_prompt - 1 : -1].float()
    return answer


def _hide(allowed_TT: Tensor) -> Any:
    """Pre-hook that narrows a layer's attention mask, whatever its form."""

    def hook(module: torch.nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        mask = kwargs.get("attention_mask")
        allowed = allowed_TT[None, None]
        if isinstance(mask, Tensor) and mask.dim() == 4:
            allowed = allowed & (mask if mask.dtype == torch.bool else mask == 0)
        dtype = args[0].dtype if args else kwargs["hidden_states"].dtype
        float_mask = torch.zeros(allowed.shape, dtype=dtype, device=allowed.device)
        float_mask = float_mask.masked_fill(~allowed, torch.finfo(dtype).min)
        return args, kwargs | {"attention_mask": float_mask}

    return hook
