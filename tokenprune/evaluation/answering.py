"""A batch of questions answered under pruning, and what each answer cost.

Shape suffixes: B batch rows, T prompt positions, L decoder layers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import tokenprune as tp
from tokenprune.evaluation.generation import FirstToken, generate, now, pruned
from tokenprune.runs.compose import Pruning
from tokenprune.runs.models import LoadedModel


@dataclass(frozen=True)
class Answers:
    """Answers to a batch.

    Attributes:
        texts: One a row.
        seconds: From the start to the first token of all rows.
        visual_BL: Visual tokens that each layer processed.
        real_BL: All tokens that each layer processed, without pads.
        original_B: Visual tokens of the prompts.
        whole_B: The same for whole images, where these were made smaller.
        trace: What was pruned; None for the unpruned model.
    """

    texts: list[str]
    seconds: float
    visual_BL: list[list[int]]
    real_BL: list[list[int]]
    original_B: list[int]
    whole_B: list[int]
    trace: tp.Trace | None

    def cost(self, row: int) -> dict[str, Any]:
        """What a row cost, as `summarise` reads it."""
        return {
            "num_visual": self.whole_B[row],
            "given": self.original_B[row],
            "visual": self.visual_BL[row],
            "real": self.real_BL[row],
        }


def answer(
    loaded: LoadedModel,
    pruning: Pruning | None,
    inputs: Mapping[str, Any],
    max_new_tokens: int,
    whole_ids: Tensor | None = None,
    **options: Any,
) -> Answers:
    """Answers a batch of prompts padded on the left.

    Args:
        loaded: Model and processor.
        pruning: Strategy, schedule and positions; None for the unpruned model.
        inputs: On the model's device.
        max_new_tokens: Longest answer.
        whole_ids: The prompts with whole images, where `inputs` has smaller ones: int64 (B, T').
        options: Of `generate`, where it is not to be greedy.
    """
    clock = FirstToken()
    with pruned(loaded, pruning) as trace:
        start = now(loaded.model.device)
        texts = generate(loaded, inputs, max_new_tokens, clock, **options)
    assert clock.time is not None
    visual_BL, real_BL = lengths(loaded, inputs, trace)
    original_B = whole_B = tp.visual_mask(loaded.model, inputs["input_ids"]).sum(1).tolist()
    if whole_ids is not None:  # what a smaller image saves is told against a whole one
        whole_B = tp.visual_mask(loaded.model, whole_ids).sum(1).tolist()
    return Answers(texts, clock.time - start, visual_BL, real_BL, original_B, whole_B, trace)


def lengths(
    loaded: LoadedModel, inputs: Mapping[str, Any], trace: tp.Trace | None
) -> tuple[list[list[int]], list[list[int]]]:
    """Visual and real tokens that each layer processed, (B, L) each."""
    if trace is not None:
        return trace.visual_lengths.T.tolist(), trace.lengths.T.tolist()
    ids_BT = inputs["input_ids"]
    visual_B = tp.visual_mask(loaded.model, ids_BT).sum(1).tolist()
    mask_BT = inputs.get("attention_mask")
    real_B = (torch.ones_like(ids_BT) if mask_BT is None else mask_BT).sum(1).tolist()
    layers = tp.cost.DecoderShape.from_config(loaded.model.config).num_layers
    return [[count] * layers for count in visual_B], [[count] * layers for count in real_B]
