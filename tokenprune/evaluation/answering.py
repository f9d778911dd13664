"""A batch of questions answered under pruning, and what each answer cost.

Shape suffixes: B batch rows, T prompt positions, L decoder layers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
        costs: What each row cost, see `costs`.
        trace: What was pruned; None for the unpruned model.
        rows: Where in the trace each row is: beams of a prompt are rows there, and alike.
    """

    texts: list[str]
    seconds: float
    costs: list[dict[str, Any]]
    trace: tp.Trace | None
    rows: Sequence[int]


def answer(
    loaded: LoadedModel,
    pruning: Pruning | None,
    inputs: Mapping[str, Any],
    max_new_tokens: int,
    whole_ids: Tensor | None = None,
    graphs: tp.Graphs | None = None,
    **options: Any,
) -> Answers:
    """Answers a batch of prompts padded on the left.

    Args:
        loaded: Model and processor.
        pruning: Strategy, schedule and positions; None for the unpruned model.
        inputs: On the model's device.
        max_new_tokens: Longest answer.
        whole_ids: The prompts with whole images, where `inputs` has smaller ones: int64 (B, T').
        graphs: Captures prefills on a GPU, if any.
        options: Of `generate`, where it is not to be greedy.
    """
    clock = FirstToken()
    with pruned(loaded, pruning, graphs=graphs) as trace:
        start = now(loaded.model.device)
        texts = generate(loaded, inputs, max_new_tokens, clock, **options)
    assert clock.time is not None
    told = costs(loaded, inputs, trace, whole_ids)
    return Answers(texts, clock.time - start, told, trace, _rows(inputs, trace))


def costs(
    loaded: LoadedModel,
    inputs: Mapping[str, Any],
    trace: tp.Trace | None,
    whole_ids: Tensor | None = None,
) -> list[dict[str, Any]]:
    """What each row of a batch cost, as `summarise` reads it.

    Args:
        loaded: Model and processor.
        inputs: As the model was given them.
        trace: What was pruned; None for the unpruned model.
        whole_ids: As for `answer`.

    Returns:
        Of each row `num_visual`, the visual tokens of its prompt with whole images, `given`, those
        that it had, and of every layer `visual` and `real`, the tokens processed without pads.
    """
    visual_BL, real_BL = _lengths(loaded, inputs, trace)
    given_B = whole_B = tp.visual_mask(loaded.model, inputs["input_ids"]).sum(1).tolist()
    if whole_ids is not None:  # what a smaller image saves is told against a whole one
        whole_B = tp.visual_mask(loaded.model, whole_ids).sum(1).tolist()
    return [
        {"num_visual": whole, "given": given, "visual": visual, "real": real}
        for whole, given, visual, real in zip(whole_B, given_B, visual_BL, real_BL, strict=True)
    ]


def _lengths(
    loaded: LoadedModel, inputs: Mapping[str, Any], trace: tp.Trace | None
) -> tuple[list[list[int]], list[list[int]]]:
    """Visual and real tokens that each layer processed, (B, L) each."""
    if trace is not None:
        rows = _rows(inputs, trace)
        return trace.visual_lengths.T[rows].tolist(), trace.lengths.T[rows].tolist()
    ids_BT = inputs["input_ids"]
    visual_B = tp.visual_mask(loaded.model, ids_BT).sum(1).tolist()
    mask_BT = inputs.get("attention_mask")
    real_B = (torch.ones_like(ids_BT) if mask_BT is None else mask_BT).sum(1).tolist()
    layers = tp.cost.DecoderShape.from_config(loaded.model.config).num_layers
    return [[count] * layers for count in visual_B], [[count] * layers for count in real_B]


def _rows(inputs: Mapping[str, Any], trace: tp.Trace | None) -> list[int]:
    """Of each row of a batch, the first that it has in the trace."""
    num_rows = len(inputs["input_ids"])
    num_beams = 1 if trace is None else trace.lengths.shape[1] // num_rows
    return [row * num_beams for row in range(num_rows)]
