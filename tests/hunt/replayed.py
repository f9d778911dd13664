"""The same call by `tp.Graphs`: bit for bit what it gives without, replayed or refused.

Graphs are the tape of `far.py`, which works on the host as well.
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import torch
from far import capture
from torch import Tensor

import tokenprune as tp
from hunt.cases import Case
from hunt.witness import Witness
from tokenprune.engine.graphs import Graphs


def draw_replayed(case: Case, often: float) -> Case | None:
    """What of a case is tried; None if nothing is. What will be refused mostly is not.

    Args:
        case: The case.
        often: As a share of what can be.
    """
    rng, first = random.Random(f"{case.seed}:replayed"), case.turns[0]
    if case.training != "no" or case.turns[-1].labelled or rng.random() >= often:
        return None
    holes = any(token.hidden for row in first.rows for token in row)
    counts = any(isinstance(own, Witness) or not own.keeps_exactly for own in case.strategies)
    refused = holes or counts or case.cache == "static" or first.mask in ("bool", "float")
    if refused and rng.random() < 0.8:
        return None
    if len({len(row) for row in first.rows}) == 1 or rng.random() < 0.1:
        return case
    # A row that says something in each turn, and has an image.
    found = [
        number
        for number in range(len(case.turns[0].rows))
        if all(turn.rows[number] for turn in case.turns)
        and any(token.visual for turn in case.turns for token in turn.rows[number])
    ]
    if not found:
        return None
    row = slice(found[0], found[0] + 1)
    turns = [replace(own, rows=own.rows[row], images=own.images[row]) for own in case.turns]
    return replace(case, turns=turns)


def other_numbers(case: Case) -> Case:
    """A case of the same kind, with other pictures, and other words where no ids say which.

    On the host ids are at hand, and so of the kind; on a device they are not.
    """
    turns = []
    for turn in case.turns:
        rows = turn.rows
        if case.words == "embeds":
            rows = [[replace(token, id=token.id % 89 + 1) for token in row] for row in rows]
        images = [[((seed + 1) % 6, size) for seed, size in own] for own in turn.images]
        turns.append(replace(turn, rows=rows, images=images))
    return replace(case, turns=turns)


def replayed(
    expected: Sequence[Tensor],
    run: Callable[[Graphs], Sequence[Tensor]],
    other: Callable[[Graphs], Any],
) -> str:
    """`replayed`, or why not.

    Args:
        expected: What a call gives without graphs.
        run: What it gives with them.
        other: A call of the same kind with other numbers, which is the one that is recorded.
    """
    graphs = tp.Graphs(2)
    with patch.object(Graphs, "_capture", capture), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="prune: expected prefills that can be captured")
        for call in (run, other, run):
            found = call(graphs)
            if call is other:
                continue
            assert len(found) == len(expected), "another number of results by graphs"
            for number, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
                assert _is_same(ours, theirs), f"result {number} by graphs"
            if graphs.told and not graphs._met:
                break  # what cannot be recorded is not recorded the next time
    if graphs.replays:
        return "replayed"
    reason = graphs.told[0] if graphs.told else "nothing to prune"
    strategy, comma, words = reason.partition(", which ")
    return "not replayed: " + (words if comma else strategy.partition(" (")[0])


def _is_same(ours: Tensor, theirs: Tensor) -> bool:
    """Whether all numbers are, and what is no number."""
    if torch.equal(ours, theirs):
        return True
    return ours.shape == theirs.shape and torch.equal(ours.nan_to_num(0.5), theirs.nan_to_num(0.5))


def traced(stages: Sequence[tp.TracedStage]) -> list[Tensor]:
    """All that a trace says."""
    tables = [own for stage in stages for own in (stage.kept, stage.scores, stage.weights)]
    return [row for own in tables for row in own or []]


def held(cache: object) -> list[Tensor]:
    """Keys and values of a cache."""
    layers = getattr(cache, "layers", [])
    return [own for layer in layers for own in (layer.keys, layer.values) if own is not None]
