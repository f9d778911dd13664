"""Answers of a model, pruned or not, and the time to their first token.

Shape suffixes: B batch rows, T positions.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

import tokenprune as tp
from tokenprune.runs.compose import Pruning
from tokenprune.runs.models import LoadedModel


class FirstToken(LogitsProcessor):
    """Notes when the first token's logits are there; changes nothing."""

    def __init__(self) -> None:
        self.time: float | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if self.time is None:
            self.time = now(scores.device)
        return scores


def now(device: torch.device) -> float:
    """Seconds, once the device has done its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def pruned(
    loaded: LoadedModel,
    pruning: Pruning | None,
    logits: str = "all",
    graphs: tp.Graphs | None = None,
) -> AbstractContextManager[tp.Trace | None]:
    """Prunes the model inside the `with`, or leaves it alone; captures its prefills, if asked."""
    if pruning is None:
        return nullcontext() if graphs is None else _captured(loaded, graphs)
    return tp.prune(
        loaded.model,
        pruning.strategy,
        pruning.schedule,
        pruning.positions,
        logits=logits,
        graphs=graphs,
    )


@contextmanager
def _captured(loaded: LoadedModel, graphs: tp.Graphs) -> Iterator[None]:
    """The unpruned model with its prefills captured: no cuts, whoever would choose at them."""
    strategy = tp.build_strategy("random")
    with tp.prune(loaded.model, strategy, tp.Schedule(), graphs=graphs):
        yield


def generate(
    loaded: LoadedModel,
    inputs: Mapping[str, Any],
    max_new_tokens: int,
    clock: FirstToken,
    **options: Any,
) -> list[str]:
    """Answers to a batch of prompts padded on the left: greedy ones, unless `options` say else."""
    tokenizer = loaded.processor.tokenizer
    model: Any = loaded.model
    output_BT = model.generate(
        **inputs,
        max_new_tokens=max_new_tokens,
        pad_token_id=tokenizer.pad_token_id,
        logits_processor=LogitsProcessorList([clock]),
        **{"do_sample": False, "num_beams": 1} | options,
    )
    answers: list[str] = tokenizer.batch_decode(
        output_BT[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True
    )
    return [answer.strip() for answer in answers]
