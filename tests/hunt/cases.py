"""What a case is: a conversation; and what of it may be refused."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field

import tokenprune as tp
from tokenprune.strategy import vision_needs

NEW_TOKENS = 3
#: Ways to generate that try out guesses; a placeholder is a guess like any other, unpruned too.
GUESSING = ("lookup", "assisted")
FIXED = 400  # entries of a cache of fixed size


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
        way: `"forward"`, or of a `generate`: `"greedy"`, `"beams"`, `"lookup"`, `"chunks"`,
            `"sample"` or `"assisted"`.
        to_keep: Of how many last columns logits are asked; 0 for all.
        chunk: Columns of a chunk of the prefill.
        after: What is done to the cache afterwards.
        layerwise: Whether that is done to its layers one by one.
        assistant: The model that guesses: `"same"`, `"other"` or `"llama"`.
    """

    rows: list[list[Token]]
    images: list[list[tuple[int, tuple[int, int]]]]
    side: str
    mask: str = "none"
    pads: str = "eye"
    labelled: bool = False
    way: str = "forward"
    to_keep: int = 0
    chunk: int = 0
    after: str = "nothing"
    layerwise: bool = False
    assistant: str = ""

    @property
    def generates(self) -> bool:
        return self.way != "forward"

    @property
    def new_tokens(self) -> int:
        """How many are generated; a few rounds where they are guessed."""
        return 3 * NEW_TOKENS if self.way == "assisted" else NEW_TOKENS

    @property
    def width(self) -> int:
        return max(map(len, self.rows))

    def columns(self, row: int) -> range:
        """Columns of a row's tokens."""
        left = self.side == "left" or (self.side == "mixed" and row % 2 == 0)
        start = self.width - len(self.rows[row]) if left else 0
        return range(start, start + len(self.rows[row]))

    def calls(self) -> list[list[list[Token]]]:
        """The rows' tokens in each call of the decoder that reads them."""
        if self.way != "chunks":
            return [self.rows]
        starts = range(0, self.width, self.chunk)
        return [
            [
                [t for t, c in zip(row, self.columns(number), strict=True)
                 if start <= c < start + self.chunk]
                for number, row in enumerate(self.rows)
            ]
            for start in starts
        ]  # fmt: skip


@dataclass
class Case:
    """A conversation.

    Attributes:
        seed: What it is drawn from.
        family: `"llava"`, `"llava_next"`, or `"llama"`, which is told what is visual.
        attention: The implementation.
        policy: Positions of the survivors.
        positions: `"none"`, or `"counted"` or with `"gaps"`, as they are given.
        cache: `"none"`, `"dynamic"` or `"static"`.
        logits: As for `prune`.
        strategy: Chooses.
        schedule: How many.
        precision: `"float32"`, or `"bfloat16"` by autocast.
        training: `"no"`, or how the backward pass runs: `"plain"`, `"checkpoint"`, `"reentrant"`.
        told: Who says what is visual: the `"call"`, or `prune` at the `"start"`.
        words: Whether a language model is given `"ids"` or `"embeds"`.
        turns: The calls.
    """

    seed: str
    family: str
    attention: str
    policy: str
    positions: str
    cache: str
    logits: str
    strategy: tp.PruningStrategy
    schedule: tp.Schedule
    precision: str = "float32"
    training: str = "no"
    told: str = "call"
    words: str = "ids"
    turns: list[Turn] = field(default_factory=list)

    @property
    def cuts(self) -> list[int]:
        return [stage.layer for stage in self.schedule.stages]

    @property
    def strategies(self) -> list[tp.PruningStrategy]:
        return [self.strategy.at(cut) for cut in range(len(self.cuts))]

    def __str__(self) -> str:
        lines = [f"{key}={value}" for key, value in vars(self).items() if key != "turns"]
        for turn in self.turns:
            own = {k: v for k, v in vars(turn).items() if k not in ("rows", "images")}
            lines.append("  turn: " + " ".join(f"{key}={value}" for key, value in own.items()))
            for row in turn.rows:
                letters = "".join("v" if token.visual else "t" for token in row)
                marks = ["h" if t.hidden else "L" if t.label != -100 else "." for t in row]
                lines.append(f"    {letters or '(pads alone)'}\n    {''.join(marks)}")
        return "\n".join(lines)


def asks_before(strategy: tp.PruningStrategy) -> bool:
    """Whether the layer before a cut is asked."""
    return any(getattr(need, "source", "") == "previous" for need in strategy.needs())


def lacks_words(case: Case, row: list[Token]) -> bool:
    """Whether a row of a call would lose tokens by what words say of them, and has none."""
    count = sum(token.visual for token in row)
    last = max((place for place, token in enumerate(row) if token.visual), default=-1)
    text = [n for n, own in enumerate(row) if not (own.visual or own.hidden or own.label != -100)]
    for stage, strategy in enumerate(case.strategies):
        for need in strategy.needs():
            first = last if isinstance(need, tp.Words) and need.follow else -1
            loses = isinstance(need, tp.Words) and case.schedule.count(stage, count) < count
            if loses and not any(place > first for place in text):
                return True
    return False


def reasons(case: Case) -> list[str]:
    """What may be refused in this case, as patterns of the error."""
    found = []
    calls = [call for turn in case.turns for call in turn.calls()]
    rows = [row for call in calls for row in call if row]
    if any(turn.side == "mixed" for turn in case.turns):
        found.append("expected rows padded on one side")
    if any(row[-1].hidden or row[0].hidden for row in rows):
        found.append("expected rows padded on one side")
    if any(
        cut == 0 and asks_before(own) for cut, own in zip(case.cuts, case.strategies, strict=True)
    ):
        found.append("expected cuts at layer 1 or later")
    exact = all(own.keeps_exactly for own in case.strategies)
    for call in calls:
        alone = all(token.visual or token.hidden for row in call for token in row)
        counts = [sum(token.visual for token in row) for row in call]
        stages = range(len(case.cuts))
        left = min(sum(case.schedule.count(stage, n) for n in counts) for stage in stages)
        if alone and any(counts) and (left == 0 or not exact):
            found.append("expected at least one token to be left")
    for call, following in itertools.pairwise(calls):
        pairs = zip(call, following, strict=True)
        if any(a and b and a[-1].visual and b[0].visual for a, b in pairs):
            found.append("expected an image in one call")
    shows = [any(token.visual for row in call for token in row) for call in calls]
    if any(lacks_words(case, row) for row in rows):
        found.append("expected text of the prompt")
    if case.cache == "static" and any(shows[1:]):
        found.append("expected a cache that grows, for images of a later turn")
    if case.turns[-1].way == "chunks" and any(map(vision_needs, case.strategies)):
        found.append("expected images that the vision tower encodes")
    if case.turns[-1].way in GUESSING:
        found.append("Image features and image tokens do not match")
    return found
