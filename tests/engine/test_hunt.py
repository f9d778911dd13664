"""A hunt over whole conversations: whatever a call brings, each row is what it is alone.

A case is drawn from a seed: a family, rows of text and images over several turns, pads and holes,
masks, positions, labels, a cache and what is done to it, a strategy and its cuts. The reference
knows no batch, no pads and no cache: it is the unmodified model run over one row's tokens, each
layer with a mask over what the trace says was dropped, and with its own positions. Attention scores
are those of its eager layers. What is refused must be refused for a reason that the case gives.

By hand: `PYTHONPATH=tests python tests/engine/test_hunt.py --cases 10000 --seed 1`.
"""

from __future__ import annotations

import argparse
import collections
import copy
import functools
import random
import re
import time
import traceback
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from models import IMAGE, NUM_LAYERS, PAD, build
from oracles import DROPPING, runnable
from torch import Tensor, nn
from transformers import DynamicCache, StaticCache

import tokenprune as tp
from tokenprune.strategy import decoder_rows
from tokenprune.tensors import top_k

CASES = 200
CLOSE = {"atol": 3e-4, "rtol": 1e-3}
NEW_TOKENS = 3
FIXED = 400  # entries of a cache of fixed size
SIZES = ((30, 60), (50, 20), (64, 64))
#: Those that a mask can be held against, that keep all they may, and whose attention is checked.
STRATEGIES = (
    *(
        strategy
        for strategy in DROPPING
        if strategy.keeps_exactly
        and all(request.queries != "text" for request in decoder_rows(strategy))
    ),
    *(
        tp.build_strategy(name, queries=queries, source=source)
        for name in ("fastv", "pyramiddrop")
        for queries in ("last", "all")
        for source in ("next", "previous")
    ),
)


@dataclass(frozen=True)
class Token:
    """One token of a row: its id, whether it is visual, whether the mask hides it, its label."""

    id: int
    visual: bool = False
    hidden: bool = False
    label: int = -100


@dataclass
class Turn:
    """One call: the rows' tokens and images, and how they are handed over.

    Attributes:
        rows: Tokens of each row.
        images: Of each row: (seed, size).
        side: Of the pads: `"left"`, `"right"`, or `"mixed"`.
        mask: `"none"`, `"2d"`, `"bool"` or `"float"`.
        pads: What a pad sees under a mask over pairs: `"eye"`, `"open"`, or `"row"`.
        labelled: Whether labels are given.
        generates: Whether the call is a `generate`.
        after: What is done to the cache afterwards.
    """

    rows: list[list[Token]]
    images: list[list[tuple[int, tuple[int, int]]]]
    side: str
    mask: str = "none"
    pads: str = "eye"
    labelled: bool = False
    generates: bool = False
    after: str = "nothing"


@dataclass
class Case:
    """A conversation."""

    seed: str
    family: str
    attention: str
    policy: str
    positions: str
    cache: str
    logits: str
    strategy: tp.PruningStrategy
    schedule: tp.Schedule
    turns: list[Turn] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [f"{key}={value}" for key, value in vars(self).items() if key != "turns"]
        for turn in self.turns:
            lines.append(
                f"  turn: side={turn.side} mask={turn.mask} pads={turn.pads} "
                f"labelled={turn.labelled} generates={turn.generates} after={turn.after}"
            )
            for row in turn.rows:
                letters = "".join("v" if token.visual else "t" for token in row)
                marks = ["h" if t.hidden else "L" if t.label != -100 else "." for t in row]
                lines.append(f"    {letters or '(pads alone)'}\n    {''.join(marks)}")
        return "\n".join(lines)


# ---------------------------------------------------------------------------------------- drawing


@functools.cache
def model_of(family: str, attention: str) -> Any:
    return build(family, attention)


@functools.cache
def picture(family: str, seed: int, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Pixels of an image, and what the decoder is given for it."""
    model = model_of(family, "eager")
    own = torch.Generator().manual_seed(seed)
    if family == "llava":
        pixels = torch.randn(1, 3, 32, 32, generator=own)
        more: dict[str, Tensor] = {}
    else:
        num_tiles = 1 + (4 if size == (64, 64) else 2)
        pixels = torch.randn(1, num_tiles, 3, 32, 32, generator=own)
        more = {"image_sizes": torch.tensor([size])}
    with torch.no_grad():
        features = model.get_image_features(pixels, **more).pooler_output[0]
    return pixels, features


def draw_case(seed: str) -> Case:
    rng = random.Random(seed)
    pick = rng.choice
    family = pick(["llava", "llava", "llava", "llama", "llama", "llava_next"])
    num_rows, num_turns = pick([1, 2, 2, 3]), pick([1, 1, 1, 2, 2, 3])
    layers = sorted(rng.sample(range(NUM_LAYERS), pick([1, 2, 2, 3])))
    keeps = sorted((pick([0.0, 0.2, 0.4, 0.5, 0.7, 0.9, 1.0]) for _ in layers), reverse=True)
    case = Case(
        seed=seed,
        family=family,
        attention=pick(["eager", "sdpa", "sdpa"]),
        policy=pick(["original", "renumbered"]),
        positions=pick(["none", "none", "counted", "gaps"]),
        cache=pick(["dynamic", "dynamic", "static"]),
        logits=pick(["all", "all", "full", "supervised"]),
        strategy=pick([own for _, own in runnable([family], STRATEGIES)]),
        schedule=tp.Schedule(
            tuple(tp.Stage(layer, keep) for layer, keep in zip(layers, keeps, strict=True)),
            pick(["floor", "nearest"]),
        ),
    )
    if num_turns == 1 and rng.random() < 0.4:
        case.cache = "none"
    side = pick(["left", "right"])
    holes = rng.random() < 0.2
    for number in range(num_turns):
        case.turns.append(_draw_turn(rng, case, number, num_rows, side, holes))
    last = case.turns[-1]
    roll = rng.random()
    if roll < 0.3 and not holes:
        _draw_labels(rng, last)
    elif roll < 0.55 and case.family != "llama" and case.cache != "none":
        last.generates = True
        for turn in case.turns:
            turn.side, turn.mask = "left", "2d"
        case.positions = "none"
        for row in last.rows:  # it asks after the last token
            if not row:
                row.append(Token(rng.randrange(1, 90)))
            row[-1] = Token(row[-1].id, row[-1].visual)
    for turn in case.turns[:-1]:
        turn.after = pick(["nothing", "nothing", "copy", "select", "repeat", "crop", "length"])
        if case.cache == "static":
            turn.after = pick(["nothing", "copy"])
    ragged = any(len({len(row) for row in turn.rows}) > 1 for turn in case.turns)
    uneven = ragged or any(token.hidden for t in case.turns for row in t.rows for token in row)
    if last.generates:  # it counts positions by the mask
        if num_turns > 1:
            case.positions = "counted"
    elif case.policy == "renumbered" and num_turns > 1:
        # Between turns the model's own gaps stay; the reference counts none.
        case.positions = "counted" if uneven else pick(["none", "counted"])
    unpadded = True
    for turn in case.turns:
        plain = len({len(row) for row in turn.rows}) == 1
        plain = plain and not any(token.hidden for row in turn.rows for token in row)
        unpadded = unpadded and plain
        if turn.generates or last.generates:
            continue
        forms = ["2d", "float"] + ["bool"] * (case.attention == "sdpa")
        forms += ["none", "none"] * unpadded
        turn.mask = pick(forms)
        if turn.mask in ("bool", "float") and _says_little(turn):
            turn.mask = "2d"
        if case.positions == "gaps" and case.cache == "none":
            turn.mask = "2d"  # without a mask, transformers takes gaps for packed sequences
        turn.pads = pick(["eye", "open", "row"])
        if turn.mask == "bool" and turn.pads == "row":
            turn.pads = "eye"  # rows that see nothing are no numbers, unpruned too
    return case


def _says_little(turn: Turn) -> bool:
    """Whether a mask over pairs looks the same as that of another batch.

    A lone pad on the right sees what a token there would see; two of them see the row, and not each
    other, as a last token after a hidden one.
    """
    width = max(map(len, turn.rows))
    return any(
        (turn.side != "left" and len(row) == width - 1)
        or (row and row[-1].hidden)
        or (len(row) > 1 and row[-2].hidden)
        for row in turn.rows
    )


def _draw_turn(
    rng: random.Random, case: Case, number: int, num_rows: int, side: str, holes: bool
) -> Turn:
    turn = Turn([], [], "mixed" if rng.random() < 0.02 else side)
    shows = number == 0 or (rng.random() < 0.4 and case.cache != "static")
    if number and rng.random() < 0.02:
        shows = True
    lone = number > 0 and not shows and rng.random() < 0.4
    even = rng.random() < 0.3  # rows of one length
    for _ in range(num_rows):
        row: list[Token] = []
        images: list[tuple[int, tuple[int, int]]] = []
        if lone:
            turn.rows.append([Token(rng.randrange(1, 90))])
            turn.images.append([])
            continue
        if even and turn.rows:
            turn.rows.append(
                [token if token.visual else Token(rng.randrange(1, 90)) for token in turn.rows[0]]
            )
            turn.images.append(list(turn.images[0]))
            continue
        empty = num_rows > 1 and rng.random() < 0.08
        num_images = rng.choice([0, 1, 1, 2]) if shows and not empty else 0
        lengths = [rng.choice([0, 1, 3, 5]) for _ in range(num_images + 1)]
        if number == 0 or rng.random() < 0.9:
            lengths[0] = max(lengths[0], 0 if empty or rng.random() < 0.1 else 1)
        if not empty and rng.random() < 0.93:
            lengths[-1] = max(lengths[-1], rng.choice([1, 2, 4]))
        for place, length in enumerate([0] * (num_images + 1) if empty else lengths):
            row += [Token(rng.randrange(1, 90)) for _ in range(length)]
            if place < num_images:
                seed, size = rng.randrange(6), rng.choice(SIZES)
                if case.family == "llama":
                    row += [Token(rng.randrange(1, 90), True) for _ in range(12)]
                else:
                    count = len(picture(case.family, seed, size)[1])
                    row += [Token(IMAGE, True)] * count
                    images.append((seed, size))
        if holes and row:
            row = [Token(t.id, t.visual, not t.visual and rng.random() < 0.15) for t in row]
            if rng.random() < 0.9:
                row[-1] = Token(row[-1].id, row[-1].visual)
        turn.rows.append(row)
        turn.images.append(images)
    if not any(turn.rows):
        turn.rows[0].append(Token(7))
    return turn


def _draw_labels(rng: random.Random, turn: Turn) -> None:
    turn.labelled = True
    for row in turn.rows:
        form = rng.choice(["answer", "answer", "spans", "all", "none"])
        for index in range(1, len(row)):  # a first token would be predicted by a pad
            chosen = {
                "answer": index >= len(row) - 3,
                "spans": rng.random() < 0.4,
                "all": True,
                "none": False,
            }[form]
            if chosen and not row[index].visual:
                row[index] = Token(row[index].id, label=row[index].id)


# -------------------------------------------------------------------------------------- running it


@dataclass
class Told:
    """What the pruned model gave for a row in one turn.

    Attributes:
        tokens: Its tokens of the turn, without hidden ones.
        images: Its images of the turn.
        positions: What the model was given, or would count.
        stages: Kept tokens and scores of each cut, in the turn's own numbers.
        logits: One per survivor, or None where none were given.
        counts: Survivors that the trace counts in the last layer, or None.
    """

    tokens: list[Token]
    images: list[tuple[int, tuple[int, int]]]
    positions: list[int]
    stages: list[tuple[list[int], Tensor | None]]
    logits: Tensor | None
    counts: int | None


class Conversation:
    """A case under way."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.model = model_of(case.family, case.attention)
        self.cache: Any = None
        config = self.model.config.get_text_config()
        if case.cache == "dynamic":
            self.cache = DynamicCache(config=config)
        elif case.cache == "static":
            self.cache = StaticCache(config=config, max_cache_len=FIXED)
        num_rows = len(case.turns[0].rows)
        self.told: list[list[Told]] = [[] for _ in range(num_rows)]
        self.ids = torch.zeros(num_rows, 0, dtype=torch.int64)
        self.real = torch.zeros(num_rows, 0, dtype=torch.bool)
        self.visual = torch.zeros(num_rows, 0, dtype=torch.bool)
        self.order = list(range(num_rows))
        self.losses: list[Tensor] = []

    def run(self) -> None:
        case = self.case
        with (
            torch.no_grad(),
            tp.prune(self.model, case.strategy, case.schedule, case.policy, case.logits) as trace,
        ):
            for turn in case.turns:
                self._turn(turn, trace)
                self._after(turn)

    def _lay_out(self, turn: Turn) -> tuple[list[list[Token]], list[Any], list[list[int]]]:
        rows = [turn.rows[row] for row in self.order]
        images = [turn.images[row] for row in self.order]
        width = max(map(len, rows))
        columns = []
        for number, row in enumerate(rows):
            left = turn.side == "left" or (turn.side == "mixed" and number % 2 == 0)
            start = width - len(row) if left else 0
            columns.append(list(range(start, start + len(row))))
        return rows, images, columns

    def _turn(self, turn: Turn, trace: tp.Trace) -> None:
        case = self.case
        rows, images, columns = self._lay_out(turn)
        num_rows, width, offset = len(rows), max(map(len, rows)), self.ids.shape[1]
        ids = torch.full((num_rows, width), PAD)
        real = torch.zeros(num_rows, width, dtype=torch.bool)
        visual, labels = real.clone(), torch.full((num_rows, width), -100)
        for row, (tokens, own) in enumerate(zip(rows, columns, strict=True)):
            for token, column in zip(tokens, own, strict=True):
                ids[row, column], labels[row, column] = token.id, token.label
                real[row, column], visual[row, column] = not token.hidden, token.visual
        self.ids = torch.cat([self.ids, ids], 1)
        self.real = torch.cat([self.real, real], 1)
        self.visual = torch.cat([self.visual, visual], 1)
        call: dict[str, Any] = {"input_ids": ids}
        shown = [picture(case.family, *image)[0] for own in images for image in own]
        if shown and case.family == "llava":
            call["pixel_values"] = torch.cat(shown)
        elif shown:
            most = max(tiles.shape[1] for tiles in shown)
            call["pixel_values"] = torch.cat(
                [
                    nn.functional.pad(tiles, (0, 0) * 3 + (0, most - tiles.shape[1]))
                    for tiles in shown
                ]
            )
            call["image_sizes"] = torch.tensor([image[1] for own in images for image in own])
        if turn.mask == "2d":
            call["attention_mask"] = self.real.long()
        elif turn.mask != "none":
            call["attention_mask"] = self._pairs(turn, offset, width)
        positions = self._positions(turn, offset, width)
        if case.positions in ("counted", "gaps") and not turn.generates:
            call["position_ids"] = positions
        if case.family == "llama":
            call["visual_mask"] = self.visual
        if turn.labelled:
            call["labels"] = labels
        if turn.generates:
            output = self._generate(call)
        else:
            cache = {} if self.cache is None else {"past_key_values": self.cache}
            output = self.model(**call, **cache, use_cache=self.cache is not None)
        self._note(turn, rows, images, columns, positions, trace, output)

    def _positions(self, turn: Turn, offset: int, width: int) -> Tensor:
        """What the model counts, or is given."""
        if self.case.positions == "counted" or turn.generates:
            return (self.real.long().cumsum(1) - 1).clamp_min(0)[:, offset:]
        columns = torch.arange(offset, offset + width).expand(len(self.real), -1)
        if self.case.positions == "none":
            return columns
        # Gaps that differ between rows; no two columns share a position.
        return columns * 2 + torch.arange(len(self.real))[:, None] + (columns > 4).long()

    def _pairs(self, turn: Turn, offset: int, width: int) -> Tensor:
        """A mask over pairs of tokens."""
        total = offset + width
        queries, keys = torch.arange(offset, total), torch.arange(total)
        allowed = (keys <= queries[:, None]) & self.real[:, None, :]
        pads = ~self.real[:, offset:, None]
        if turn.pads == "open":
            allowed = allowed | pads
        elif turn.pads == "eye":
            allowed = allowed | (keys == queries[:, None])
        allowed = allowed[:, None]
        if self.case.cache == "static":
            allowed = nn.functional.pad(allowed, (0, FIXED - total), value=False)
        if turn.mask == "bool":
            return allowed
        return torch.zeros(allowed.shape).masked_fill(~allowed, torch.finfo(torch.float32).min)

    def _generate(self, call: dict[str, Any]) -> Any:
        call["input_ids"], call["attention_mask"] = self.ids, self.real.long()
        return self.model.generate(
            **call,
            past_key_values=self.cache,
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            return_dict_in_generate=True,
            output_logits=True,
            **({"disable_compile": True} if self.case.cache == "static" else {}),
        )

    def _note(
        self,
        turn: Turn,
        rows: list[list[Token]],
        images: list[Any],
        columns: list[list[int]],
        positions: Tensor,
        trace: tp.Trace,
        output: Any,
    ) -> None:
        shows = any(token.visual for row in rows for token in row)
        width = max(map(len, rows))
        own = [[(t, c) for t, c in zip(*pair, strict=True) if not t.hidden]
               for pair in zip(rows, columns, strict=True)]  # fmt: skip
        ends = all(not row or row[-1][1] == width - 1 for row in own)
        if not turn.generates and turn.labelled:
            self.losses.append(output.loss)
        seen = [
            sum(t.visual for told in self.told[row] for t in told.tokens)
            for row in range(len(rows))
        ]
        stages: list[list[tuple[list[int], Tensor | None]]] = [[] for _ in rows]
        lost = False
        if shows:
            assert [s.layer for s in trace.stages] == [s.layer for s in self.case.schedule.stages]
            for stage in trace.stages:
                for row in range(len(rows)):
                    kept = (stage.kept[row] - seen[row]).tolist()
                    scores = None if stage.scores is None else stage.scores[row]
                    stages[row].append((kept, scores))
                    lost = lost or len(kept) < sum(token.visual for token, _ in own[row])
        for row in range(len(rows)):
            alive = [column for token, column in own[row] if not token.visual]
            visual = [column for token, column in own[row] if token.visual]
            kept = stages[row][-1][0] if stages[row] else range(len(visual))
            alive = sorted(alive + [visual[number] for number in kept])
            logits = None
            if turn.generates:
                logits = output.logits[0][row][None]
            elif output.logits is not None:
                logits = output.logits[row]
                if self.case.logits == "full" or not lost:
                    assert len(logits) == width
                    logits = logits[alive]
                else:
                    logits = logits[len(logits) - len(alive) :] if ends else logits[: len(alive)]
            self.told[row].append(
                Told(
                    tokens=[token for token, _ in own[row]],
                    images=images[row],
                    positions=[int(positions[row, column]) for _, column in own[row]],
                    stages=stages[row],
                    logits=logits,
                    # A pad that sees itself may pass for a token, where there are no others.
                    counts=int(trace.lengths[-1, row]) if shows and len(own[row]) > 1 else None,
                )
            )
            if not turn.generates:
                continue
            before = self.told[row][-1].positions[-1]
            for step in range(NEW_TOKENS - 1):
                token = int(output.sequences[row, self.ids.shape[1] + step])
                self.told[row].append(
                    Told([Token(token)], [], [before + step + 1], [],
                         output.logits[step + 1][row][None], None))  # fmt: skip

    def _after(self, turn: Turn) -> None:
        if turn.after == "copy":
            left = self.cache
            self.cache = copy.deepcopy(self.cache)
            self._mutter(left, 2)  # which must not be heard in the copy
        elif turn.after == "crop":
            self._mutter(self.cache, 3)
            self.cache.crop(-3)
        elif turn.after == "length":
            assert self.cache.get_seq_length() == self.ids.shape[1]
        elif turn.after == "repeat":
            self.cache.batch_repeat_interleave(2)
            self._reorder(torch.arange(len(self.order)).repeat_interleave(2))
        elif turn.after == "select":
            picked = torch.arange(len(self.order) - 1, -1, -1)
            left = [self.order[row] for row in picked[:2].tolist()]
            spoken = all(any(turn.rows[row] for row in left) for turn in self.case.turns)
            if len(picked) > 2 and spoken:
                self.cache.batch_select_indices(picked[:2])
                picked = picked[:2]
            else:
                self.cache.reorder_cache(picked)
            self._reorder(picked)

    def _reorder(self, rows: Tensor) -> None:
        self.ids, self.real, self.visual = self.ids[rows], self.real[rows], self.visual[rows]
        self.told = [list(self.told[row]) for row in rows.tolist()]
        self.order = [self.order[row] for row in rows.tolist()]

    def _mutter(self, cache: Any, length: int) -> None:
        """Says something that is forgotten again."""
        more = nn.functional.pad(self.real.long(), (0, length), value=1)
        self.model(
            input_ids=torch.full((len(self.order), length), 5),
            attention_mask=more,
            past_key_values=cache,
        )


# ------------------------------------------------------------------------------------ the reference


def check_row(case: Case, told: Sequence[Told]) -> tuple[float, int]:
    """Holds a row against the unmodified model; returns its loss, summed, and over how many."""
    tokens = [token for turn in told for token in turn.tokens]
    if not tokens:
        return 0.0, 0
    turns = torch.tensor([number for number, turn in enumerate(told) for _ in turn.tokens])
    visual = torch.tensor([token.visual for token in tokens])
    given = torch.tensor([position for turn in told for position in turn.positions])
    cuts = [stage.layer for stage in case.schedule.stages]
    alive = _alive(case, told, turns, visual)
    # The conversation as it went, and for each cut and turn with images as the cut saw it.
    shown = [number for number, turn in enumerate(told) if turn.stages and any(
        token.visual for token in turn.tokens)]  # fmt: skip
    reads = bool(decoder_rows(case.strategy))
    views = [(s, t) for s in range(len(cuts)) for t in shown] if reads else []
    levels = [sum(cut <= layer for cut in cuts) for layer in range(NUM_LAYERS)]
    hidden, positions = [], []
    for layer in range(NUM_LAYERS):
        at = [alive[levels[layer]]]
        for stage, turn in views:
            seen = alive[stage] if cuts[stage] == layer else alive[levels[layer]]
            at.append(torch.where(turns == turn, seen, alive[levels[layer]]))
        hidden.append(~torch.stack(at))
        counted = hidden[-1].logical_not().long().cumsum(1) - 1
        loses = hidden[-1].any(1, keepdim=True) & (case.policy == "renumbered")
        positions.append(torch.where(loses, counted.clamp_min(0), given))
    logits, attentions = _unmodified(case, told, tokens, hidden, positions)
    for number, turn in enumerate(told):
        own = (turns == number) & alive[-1]
        if turn.logits is not None and own.any():
            expected = logits[own]
            expected = expected[-1:] if len(turn.logits) == 1 else expected
            torch.testing.assert_close(turn.logits, expected, **CLOSE)
        if turn.counts is not None:
            assert turn.counts == int(own.sum()), "trace.lengths"
    for turn in shown:
        _check_choice(case, told[turn], turns == turn, visual, alive, views, turn, attentions)
    final = told[-1]
    if not case.turns[-1].labelled or not final.tokens:
        return 0.0, 0
    own = ((turns == len(told) - 1) & alive[-1]).nonzero()[:, 0]
    labels = torch.tensor([tokens[index].label for index in own.tolist()])
    loss = nn.functional.cross_entropy(
        logits[own][:-1], labels[1:], ignore_index=-100, reduction="sum"
    )
    return float(loss), int((labels[1:] != -100).sum())


def _alive(case: Case, told: Sequence[Told], turns: Tensor, visual: Tensor) -> list[Tensor]:
    """Which tokens are left at each level, by the trace; and that their number is right."""
    alive = [torch.ones_like(visual)]
    for stage in range(len(case.schedule.stages)):
        now = alive[-1].clone()
        for number, turn in enumerate(told):
            own = ((turns == number) & visual).nonzero()[:, 0]
            if not turn.stages or not len(own):
                continue
            kept = turn.stages[stage][0]
            marked = torch.zeros(len(own), dtype=torch.bool)
            marked[kept] = True
            assert kept == sorted(set(kept)), "kept is not ascending"
            assert (marked <= alive[-1][own]).all(), "a dropped token came back"
            count = case.schedule.count(stage, len(own))
            if case.turns[-1].labelled and number == len(case.turns) - 1 and not _asking(turn):
                count = len(own)
            assert len(kept) == min(count, int(alive[-1][own].sum())), "budget"
            now[own] = marked
        alive.append(now)
    return alive


def _asking(turn: Told) -> list[int]:
    """The tokens whose attention chooses, where labels say so."""
    labels = [token.label for token in turn.tokens]
    return [i for i in range(len(labels) - 1) if labels[i] == -100 and labels[i + 1] != -100]


def _unmodified(
    case: Case,
    told: Sequence[Told],
    tokens: Sequence[Token],
    hidden: list[Tensor],
    positions: list[Tensor],
) -> tuple[Tensor, Sequence[Tensor]]:
    """Logits (T, C) of the first view, and eager attention (views, H, T, T) of each layer."""
    model = model_of(case.family, "eager")
    decoder = model.get_decoder()
    embeds = model.get_input_embeddings()(torch.tensor([[token.id for token in tokens]]))
    images = [image for turn in told for image in turn.images]
    if images:
        features = torch.cat([picture(case.family, *image)[1] for image in images])
        embeds[0, torch.tensor([token.visual for token in tokens])] = features
    num_views, length = hidden[0].shape
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    eye = torch.eye(length, dtype=torch.bool)

    def hook(layer: int) -> Any:
        def before(module: nn.Module, args: Any, kwargs: Any) -> Any:
            allowed = (causal & ~hidden[layer][:, None]) | eye
            low = torch.finfo(torch.float32).min
            mask = torch.zeros(num_views, 1, length, length).masked_fill(~allowed[:, None], low)
            kwargs["attention_mask"] = mask
            kwargs["position_embeddings"] = decoder.rotary_emb(args[0], positions[layer])
            return args, kwargs

        return before

    hooks = [
        module.register_forward_pre_hook(hook(layer), with_kwargs=True)
        for layer, module in enumerate(decoder.layers)
    ]
    try:
        with torch.no_grad():
            output = decoder(
                inputs_embeds=embeds.expand(num_views, -1, -1),
                use_cache=False,
                output_attentions=num_views > 1,
            )
            return model.lm_head(output.last_hidden_state[0]), output.attentions
    finally:
        for handle in hooks:
            handle.remove()


def _check_choice(
    case: Case,
    told: Told,
    own: Tensor,
    visual: Tensor,
    alive: list[Tensor],
    views: list[tuple[int, int]],
    turn: int,
    attentions: Sequence[Tensor],
) -> None:
    """Attention scores are those of the unmodified layers, and the highest are kept."""
    columns = own.nonzero()[:, 0]
    asking = [int(columns[i]) for i in _asking(told)]
    if not case.turns[-1].labelled or turn != len(case.turns) - 1:
        asking = [int(columns[-1])]
    for stage, (cut, (kept, scores)) in enumerate(
        zip(case.schedule.stages, told.stages, strict=True)
    ):
        before = own & visual & alive[stage]
        if scores is not None:
            numbers = (own & visual).nonzero()[:, 0].tolist()
            candidates = [numbers.index(column) for column in before.nonzero()[:, 0].tolist()]
            chosen = top_k(scores[None], None, torch.tensor([len(kept)]))[0]
            assert [n for n, yes in zip(candidates, chosen, strict=True) if yes] == kept, "top k"
        for request in decoder_rows(case.strategy):
            if not asking or not before.any():
                continue
            if case.policy == "renumbered" and turn and request.source == "next":
                continue  # held keys stand where the cut left them, new ones as before it
            view, layer = 0, cut.layer - 1
            if request.source == "next":
                view, layer = 1 + views.index((stage, turn)), cut.layer
            rows = [column for column in asking if alive[stage][column]]
            rows = rows or [int((own & alive[stage]).nonzero()[-1, 0])]
            if request.queries == "all":
                rows = (own & alive[stage]).nonzero()[:, 0].tolist()
            weights = attentions[layer][view].mean(0)[rows].mean(0)[before]
            torch.testing.assert_close(scores, weights, atol=2e-5, rtol=2e-3)


# ---------------------------------------------------------------------------------------- verdicts


def reasons(case: Case) -> list[str]:
    """What may be refused in this case, as patterns of the error."""
    found = []
    rows = [row for turn in case.turns for row in turn.rows if row]
    if any(turn.side == "mixed" for turn in case.turns):
        found.append("expected rows padded on one side")
    if any(row[-1].hidden or row[0].hidden for row in rows):
        found.append("expected rows padded on one side")
    requests = decoder_rows(case.strategy)
    if case.schedule.stages[0].layer == 0 and any(r.source == "previous" for r in requests):
        found.append("expected cuts at layer 1 or later")
    if case.schedule.stages[-1].keep < 0.1 and any(
        all(token.visual or token.hidden for row in turn.rows for token in row)
        for turn in case.turns
    ):
        found.append("expected at least one token to be left")
    for turn, following in zip(case.turns, case.turns[1:], strict=False):
        pairs = zip(turn.rows, following.rows, strict=True)
        if any(a and b and a[-1].visual and b[0].visual for a, b in pairs):
            found.append("expected an image in one call")
    if case.cache == "static" and any(
        token.visual for turn in case.turns[1:] for row in turn.rows for token in row
    ):
        found.append("expected a cache that grows, for images of a later turn")
    return found


def check(case: Case) -> str:
    """`exact`, or why it was refused; an AssertionError, or another error, otherwise."""
    conversation = Conversation(case)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="prune: expected labels on answers alone")
            conversation.run()
    except ValueError as error:
        message = str(error)
        if not re.match("prune: expected", message) or not any(
            re.search(reason, message) for reason in reasons(case)
        ):
            raise
        return message.split(", got")[0]
    sums = [check_row(case, told) for told in conversation.told]
    loss, count = (sum(part) for part in zip(*sums, strict=True))
    for ours in conversation.losses if count else []:
        torch.testing.assert_close(float(ours), loss / count, atol=3e-4, rtol=1e-3)
    return "exact"


@pytest.mark.parametrize("number", range(CASES))
def test_hunt(number: int) -> None:
    case = draw_case(f"0:{number}")
    try:
        check(case)
    except Exception as error:
        error.add_note(str(case))
        raise


def main() -> None:
    parser = argparse.ArgumentParser(description="Hunts for silent wrong answers of the engine.")
    parser.add_argument("--cases", type=int, default=10000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--show", action="store_true", help="print cases that go wrong")
    options = parser.parse_args()
    torch.set_num_threads(1)
    outcomes: collections.Counter[str] = collections.Counter()
    faults, start = [], time.monotonic()
    for number in range(options.first, options.first + options.cases):
        seed = f"{options.seed}:{number}"
        try:
            outcomes[check(draw_case(seed))] += 1
        except Exception as error:
            words = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
            faults.append(seed)
            outcomes["FAULT"] += 1
            print(f"fault {seed}: {words}", flush=True)
            if options.show:
                print(draw_case(seed), traceback.format_exc(limit=-3), sep="\n", flush=True)
        if (number + 1) % 500 == 0:
            print(f"{number + 1} cases, {time.monotonic() - start:.0f} s", flush=True)
    for outcome, count in outcomes.most_common():
        print(f"{count:6d}  {outcome}")
    print(f"seed {options.seed}: {options.cases} cases, {len(faults)} faults {faults[:50]}")
    raise SystemExit(bool(faults))


if __name__ == "__main__":
    main()
