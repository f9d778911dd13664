"""The rows of a case end to end in packed rows: each sequence must give what it gives alone."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from models import PAD
from torch import Tensor

from hunt.cases import Case, Token, Turn
from hunt.talk import Conversation
from tokenprune.strategy import DecoderKeys

#: How often a case that can be packed is.
SHARE = 0.4


@dataclass
class Packs:
    """How rows of a case are packed.

    Attributes:
        members: Numbers of the case's rows, of each packed row; the same row may come again.
        form: What keeps sequences apart: `"mask"`, `"positions"` or `"both"`.
        mask: A mask over pairs of tokens: `"bool"` or `"float"`.
        side: Where the pads are.
        pads: Of the longest packed row.
    """

    members: list[list[int]]
    form: str
    mask: str
    side: str
    pads: int


def draw_packs(case: Case, often: float) -> Packs | None:
    """How a case is packed; None if it is not: rows with holes or a cache cannot be.

    Args:
        case: The case.
        often: As a share of `SHARE`.
    """
    rng, turn = random.Random(f"{case.seed}:packed"), case.turns[0]
    fits = len(case.turns) == 1 and not turn.generates and case.precision == "float32"
    holes = any(token.hidden for row in turn.rows for token in row)
    usable = [number for number, row in enumerate(turn.rows) if row]
    # A token that sees nothing but itself is a pad at the end of a row, and by sight at its start.
    ends = [number for number in usable if len(turn.rows[number]) > 1]
    if not fits or holes or not ends or rng.random() >= SHARE * often:
        return None
    flash = case.attention.startswith("flash")
    members = []
    for count in [rng.choice([2, 3])] if flash else rng.choice([[2], [3], [2, 1], [1, 2], [2, 2]]):
        members.append([rng.choice(ends) for _ in range(count)])
        members[-1][1:-1] = [rng.choice(usable) for _ in members[-1][1:-1]]
    forms = ["mask", "positions", "both"]
    if any(isinstance(need, DecoderKeys) for own in case.strategies for need in own.needs()):
        forms.remove("mask")  # keys are turned by the positions given, which go on through the row
    if case.positions == "gaps":
        forms = ["both"]
    form = "positions" if flash else rng.choice(forms)
    return Packs(
        members,
        form,
        mask=rng.choice(["float", "bool"] if case.attention == "sdpa" else ["float"]),
        # Pads on the left are pads by sight alone.
        side="right" if form == "positions" else rng.choice(["left", "right"]),
        pads=0 if flash else rng.choice([0, 0, 1, 3]),
    )


class PackedConversation(Conversation):
    """A case of one call, whose rows are the sequences of packed rows.

    Attributes:
        spans: Of each sequence: packed row, first column, end.
        shape: Packed rows and their columns.
    """

    def __init__(self, case: Case, packs: Packs) -> None:
        turn, order = case.turns[0], [number for own in packs.members for number in own]
        rows, images = [turn.rows[n] for n in order], [turn.images[n] for n in order]
        own = replace(turn, rows=rows, images=images, side="left", mask="none", to_keep=0)
        super().__init__(replace(case, cache="none", turns=[own]))
        self.packs = packs
        lengths = [[len(turn.rows[n]) for n in own] for own in packs.members]
        self.shape = len(lengths), max(map(sum, lengths)) + packs.pads
        self.spans = []
        for row, of_row in enumerate(lengths):
            end = self.shape[1] - sum(of_row) if packs.side == "left" else 0
            for length in of_row:
                self.spans.append((row, end, end + length))
                end += length

    def _marks(self) -> Tensor:
        return self._laid(lambda token: token.visual, False)

    def _laid(self, value: Callable[[Token], Any], pad: Any) -> Tensor:
        """Something of each token, where it stands, (B, T)."""
        table = torch.full(self.shape, pad)
        for tokens, (row, start, end) in zip(self.case.turns[0].rows, self.spans, strict=True):
            table[row, start:end] = torch.tensor([value(token) for token in tokens])
        return table

    def _turn(self, turn: Turn) -> None:
        case, form = self.case, self.packs.form
        positions = torch.zeros(self.shape, dtype=torch.int64)
        of_turn = torch.zeros(len(turn.rows), turn.width, dtype=torch.int64)
        for number, (row, start, end) in enumerate(self.spans):
            own = torch.arange(start, end) if form == "mask" else torch.arange(end - start)
            if case.positions == "gaps":
                own = own * 2 + number + (own > 4)
            positions[row, start:end] = own
            of_turn[number, turn.width - len(own) :] = own
        call: dict[str, Any] = {
            "input_ids": self._laid(lambda token: token.id, PAD),
            **self._pixels(turn),
        }
        if form != "mask":
            call["position_ids"] = positions
        if form != "positions":
            call["attention_mask"] = self._apart()
        if case.family == "llama" and case.told == "call":
            call["visual_mask"] = self._marks()
        if turn.labelled:
            call["labels"] = self._laid(lambda token: token.label, -100)
        if case.words == "embeds":
            call["inputs_embeds"] = self.model.get_input_embeddings()(call.pop("input_ids"))
        self.output = self.model(**call, use_cache=False)
        if turn.labelled:
            self.losses.append(self.output.loss.detach())
        self._note(turn, of_turn, 0, range(turn.width))
        self._note_logits(turn)

    def _apart(self) -> Tensor:
        """The mask over pairs that keeps sequences apart; a pad sees itself."""
        num_rows, width = self.shape
        allowed = torch.eye(width).bool().repeat(num_rows, 1, 1)
        for row, start, end in self.spans:
            allowed[row, start:end, start:end] = torch.ones(end - start, end - start).tril().bool()
        allowed = allowed[:, None]
        if self.packs.mask == "bool":
            return allowed
        return torch.zeros(allowed.shape).masked_fill(~allowed, torch.finfo(torch.float32).min)

    def _note_logits(self, turn: Turn) -> None:
        if self.output.logits is None:
            return
        alive = []
        for tokens, told in zip(turn.rows, self.told, strict=True):
            visual = [number for number, token in enumerate(tokens) if token.visual]
            stages = told[-1].stages
            kept = stages[-1].kept if stages else range(len(visual))
            text = [number for number, token in enumerate(tokens) if not token.visual]
            alive.append(sorted(text + [visual[number] for number in kept]))
        lost = any(len(own) < len(row) for own, row in zip(alive, turn.rows, strict=True))
        ends = [0] * self.shape[0]
        for own, told, (row, start, _) in zip(alive, self.told, self.spans, strict=True):
            places = [start + number for number in own]
            if lost and self.case.logits != "full":  # survivors stand at the start of a row
                places = list(range(ends[row], ends[row] + len(own)))
                ends[row] += len(own)
            told[-1].which = list(range(len(own)))
            told[-1].logits = self.output.logits[row, places].detach()
