"""What a validation by teacher forcing counts: right answers by kind, and the loss.

Shape suffixes: B batch rows, T positions, V vocabulary.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

import tokenprune as tp
from tokenprune.data.collate import IGNORED
from tokenprune.data.sample import Sample


class Tally:
    """Counts of one validation, on one process; `numbers` are of all processes."""

    def __init__(self) -> None:
        #: Turns answered right and all turns, by kind.
        self.turns: dict[str, list[int]] = {}
        #: The loss over all supervised tokens, and their number.
        self.loss: tuple[float, int] = (0.0, 0)

    def add_loss(self, mean: float, num_labels: int) -> None:
        """Counts a batch's loss, the mean over its supervised tokens."""
        total, number = self.loss
        self.loss = (total + mean * num_labels, number + num_labels)

    def add_answers(self, samples: Sequence[Sample], labels_BT: Tensor, right_BT: Tensor) -> None:
        """Counts the turns of a batch.

        Args:
            samples: One per row.
            labels_BT: Which tokens are answers'.
            right_BT: Which tokens were guessed right.
        """
        for row, sample in enumerate(samples):
            for kind, right in turns(sample, labels_BT[row], right_BT[row]):
                counts = self.turns.setdefault(kind, [0, 0])
                counts[0] += right
                counts[1] += 1

    def numbers(self, world_size: int) -> dict[str, float]:
        """Loss and accuracy over all processes, each of which must ask."""
        parts: list[Any] = [(self.turns, self.loss)]
        if world_size > 1:
            mine, parts = parts[0], [None] * world_size
            torch.distributed.all_gather_object(parts, mine)
        tally: dict[str, list[int]] = defaultdict(lambda: [0, 0])
        for own, _ in parts:
            for kind, counts in own.items():
                tally[kind] = [a + b for a, b in zip(tally[kind], counts, strict=True)]
        num_labels = sum(number for _, (_, number) in parts)
        right, total = (sum(counts[i] for counts in tally.values()) for i in (0, 1))
        found = {
            "val_loss": sum(loss for _, (loss, _) in parts) / max(1, num_labels),
            "val_accuracy": right / max(1, total),
        }
        return found | {f"val_accuracy_{kind}": tally[kind][0] / tally[kind][1] for kind in tally}


def guesses(
    model: Any, inputs: Mapping[str, Any], logits_BTV: Tensor, trace: tp.Trace | None
) -> Tensor:
    """The most likely token at each position of the unpruned rows, int64 (B, T).

    A token is guessed at the survivor before it; what is guessed at dropped ones is no matter.

    Args:
        model: What made the logits.
        inputs: Its inputs.
        logits_BTV: At the survivors.
        trace: Who they are; None for the unpruned model.
    """
    alive_BT = inputs["attention_mask"].bool()
    if trace is not None and trace.stages:
        alive_BT = alive_BT.clone()
        visual_BT = tp.visual_mask(model, inputs["input_ids"])
        for row, kept in enumerate(trace.stages[-1].kept):
            places = visual_BT[row].nonzero()[:, 0]
            alive_BT[row, places] = False
            alive_BT[row, places[kept.to(places.device)]] = True
    before_BT = (alive_BT.cumsum(1) - 2).clamp_min(0)
    return logits_BTV.argmax(-1).gather(1, before_BT)


def turns(sample: Sample, labels_T: Tensor, right_T: Tensor) -> list[tuple[str, bool]]:
    """Kind of each turn, and whether all tokens of its answer are right; answers lie apart.

    Returns:
        Empty where nothing is labelled.
    """
    answers: list[tuple[int, list[int]]] = []
    for place in (labels_T != IGNORED).nonzero()[:, 0].tolist():
        if not answers or answers[-1][1][-1] != place - 1:
            answers.append((place, []))
        answers[-1][1].append(place)
    if not answers:
        return []
    return [
        (turn.kind, bool(right_T[places].all()))
        for turn, (_, places) in zip(sample.turns, answers, strict=True)
    ]
