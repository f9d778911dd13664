"""Answers to a batch, and what each cost, however many beams a prompt has."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

import tokenprune as tp
from tokenprune.data.collate import PromptCollator
from tokenprune.data.scenes import SceneDataset
from tokenprune.evaluation.answering import answer
from tokenprune.evaluation.kept import kept_tokens
from tokenprune.runs import models


@pytest.mark.parametrize("strategy", [None, "fastv", "uniform"])
def test_beams_cost_what_their_prompt_does(strategy: str | None) -> None:
    loaded = models.load("tiny")
    samples = [SceneDataset("test", 3)[number] for number in range(3)]
    inputs = PromptCollator(loaded.processor)(samples)["inputs"]
    pruning: Any = None
    if strategy is not None:
        pruning = SimpleNamespace(
            strategy=tp.build_strategy(strategy),
            schedule=tp.Schedule.one_shot(2, 0.5),
            positions="original",
        )
    one = answer(loaded, pruning, inputs, 4)
    two = answer(loaded, pruning, inputs, 4, num_beams=2)
    assert len(two.texts) == len(samples)
    assert two.texts == one.texts  # each is sure of its one word
    assert two.costs == one.costs
    if strategy is None:
        assert two.trace is None
        return
    for row, cost in enumerate(two.costs):
        own = kept_tokens(two.trace, two.rows[row], cost["given"])
        assert own == kept_tokens(one.trace, row, cost["given"])
