"""What a case is: a conversation, drawn from a seed."""

from __future__ import annotations

import functools
import random
from dataclasses import dataclass, field
from typing import Any

import torch
from models import IMAGE, NUM_LAYERS, build
from oracles import EVERY, runnable
from torch import Tensor

import tokenprune as tp
from hunt.witness import DECODER, TOWER, Witness
from tokenprune.strategy import BeforeProjector, vision_needs

NEW_TOKENS = 3
FIXED = 400  # entries of a cache of fixed size
SIZES = ((30, 60), (50, 20), (64, 64))
#: Mixed before the projector: at a cut before the decoder alone.
BEFORE = tuple(tp.build_strategy(name) for name in ("visionzip", "prumerge", "prumerge_plus"))
STRATEGIES = (
    *EVERY,
    *BEFORE,
    *(
        tp.build_strategy(name, queries=queries, source=source)
        for name in ("fastv", "pyramiddrop")
        for queries in ("last", "all")
        for source in ("next", "previous")
    ),
    tp.build_strategy("sparsevlm", version="2.0"),
    tp.build_strategy("vscan", shallow=0, window=2, exact_budget=True),
    tp.build_strategy("dart", exact_budget=True),
    *(tp.build_strategy(name, queries="all") for name in ("fastervlm", "vispruner")),
    tp.build_strategy("visionzip", contextual=0.5, space="decoder"),
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
        way: `"forward"`, or of a `generate`: `"greedy"`, `"beams"`, `"lookup"`, or `"chunks"`.
        to_keep: Of how many last columns logits are asked; 0 for all.
        chunk: Columns of a chunk of the prefill.
        after: What is done to the cache afterwards.
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

    @property
    def generates(self) -> bool:
        return self.way != "forward"

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


@functools.cache
def model_of(family: str, attention: str) -> Any:
    if not attention.startswith("flash"):
        return build(family, attention)
    model = build(family, "eager")  # a stand-in, which no check of transformers knows
    for module in model.modules():
        if hasattr(module, "config"):
            module.config._attn_implementation_internal = attention
    return model


# ---------------------------------------------------------------------------------------- pictures


@dataclass
class Picture:
    """An image, and what the decoder is given for it.

    Attributes:
        pixels: (1, 3, 32, 32), or (1, tiles, 3, 32, 32).
        features: (V, D).
        given: (V, C), what the projector is given of each token; NaN for newlines.
        patch: int64 (V,), the tower's patch of each token, tile after tile; -1 for newlines.
    """

    pixels: Tensor
    features: Tensor
    given: Tensor
    patch: Tensor


@functools.cache
def picture(family: str, seed: int, size: tuple[int, int]) -> Picture:
    model = model_of(family, "eager")
    own = torch.Generator().manual_seed(seed)
    seen = []
    hook = model.model.multi_modal_projector.register_forward_pre_hook(
        lambda module, args: seen.append(args[0])
    )
    if family == "llava":
        pixels = torch.randn(1, 3, 32, 32, generator=own)
        more: dict[str, Tensor] = {}
    else:
        num_tiles = 1 + (4 if size == (64, 64) else 2)
        pixels = torch.randn(1, num_tiles, 3, 32, 32, generator=own)
        more = {"image_sizes": torch.tensor([size])}
    with torch.no_grad():
        features = model.get_image_features(pixels, **more).pooler_output[0]
        hook.remove()
        (given,) = seen
        patch = torch.arange(given.shape[0] * given.shape[1]).view(*given.shape[:2], 1)
        if family == "llava":
            return Picture(pixels, features, given[0], patch.flatten())
        placed = [
            model.model.pack_image_features(
                [values], more["image_sizes"], "default", image_newline=newline
            )[0][0]
            for values, newline in (
                (given, torch.full(given.shape[2:], torch.nan)),
                (patch.float(), torch.tensor([-1.0])),
            )
        ]
    return Picture(pixels, features, placed[0], placed[1][:, 0].long())


@functools.cache
def signals(family: str, seed: int, size: tuple[int, int]) -> dict[Any, Tensor]:
    """What the tower, run eager, says of an image's tokens, by need; zeros for newlines."""
    model, image = model_of(family, "eager"), picture(family, seed, size)
    layers = [m for m in model.modules() if type(m).__name__ == "CLIPEncoderLayer"]
    heard: dict[tuple[int, str], Tensor] = {}
    hooks = []
    for number, layer in enumerate(layers):
        for what, module in (
            ("keys", layer.self_attn.k_proj),
            ("queries", layer.self_attn.q_proj),
            ("hidden", layer),
        ):

            def note(module: Any, args: Any, output: Any, key: Any = (number, what)) -> None:
                heard[key] = output[0] if isinstance(output, tuple) else output

            hooks.append(module.register_forward_hook(note))
    with torch.no_grad():
        model.model.vision_tower(image.pixels.view(-1, 3, 32, 32))
    for hook in hooks:
        hook.remove()
    found: dict[Any, Tensor] = {}
    for need in TOWER:
        number = need.layer % len(layers)
        if isinstance(need, tp.VisionStates):
            values = heard[number, need.what][:, 1:].flatten(0, 1)
        else:
            heads = 1 if need.heads == "one" else layers[number].self_attn.num_heads
            queries, keys = (
                heard[number, what].unflatten(-1, (heads, -1)).transpose(1, 2)
                for what in ("queries", "keys")
            )
            weights = (queries @ keys.mT / keys.shape[-1] ** 0.5).softmax(-1)
            rows = weights[:, :, :1] if need.queries == "class" else weights[:, :, 1:]
            values = rows.mean(2)[:, :, 1:].transpose(1, 2).flatten(0, 1)
        taken = values[image.patch.clamp_min(0)]
        found[need] = taken.masked_fill((image.patch < 0)[:, None], 0)
    return found


# ----------------------------------------------------------------------------------------- drawing


def draw_case(seed: str) -> Case:
    rng = random.Random(seed)
    pick = rng.choice
    family = pick(["llava", "llava", "llava", "llama", "llama", "llava_next"])
    num_rows, num_turns = pick([1, 2, 2, 3]), pick([1, 1, 1, 2, 2, 3])
    layers = sorted(rng.sample(range(NUM_LAYERS), pick([1, 2, 2, 3])))
    if rng.random() < 0.2:
        layers = sorted({0, *layers[1:]})
    keeps = sorted((pick([0.0, 0.2, 0.4, 0.5, 0.7, 0.9, 1.0]) for _ in layers), reverse=True)
    case = Case(
        seed=seed,
        family=family,
        attention=pick(["eager", "eager", "sdpa", "sdpa", "sdpa", "sdpa", "flash_attention_2"]),
        policy=pick(["original", "renumbered"]),
        positions=pick(["none", "none", "counted", "gaps"]),
        cache=pick(["dynamic", "dynamic", "static"]),
        logits=pick(["all", "all", "full", "supervised"]),
        strategy=_draw_strategy(rng, family, layers),
        schedule=tp.Schedule(
            tuple(tp.Stage(layer, keep) for layer, keep in zip(layers, keeps, strict=True)),
            pick(["floor", "nearest"]),
        ),
        precision=pick(["float32"] * 15 + ["bfloat16"]),
    )
    if num_turns == 1 and rng.random() < 0.4:
        case.cache = "none"
    if case.attention.startswith("flash"):  # unpruned too, it reads what a fixed cache has not
        # filled, and takes gaps for packed sequences.
        case.cache = "dynamic" if case.cache == "static" else case.cache
        case.positions = "none" if case.positions == "gaps" else case.positions
    if case.cache == "static":
        case.precision = "float32"  # a fixed cache wants keys and values of one precision
    side = pick(["left", "right"])
    holes = rng.random() < 0.2
    for number in range(num_turns):
        case.turns.append(_draw_turn(rng, case, number, num_rows, side, holes))
    last = case.turns[-1]
    roll = rng.random()
    if roll < 0.3 and not holes:
        _draw_labels(rng, last)
        if num_turns == 1 and rng.random() < 0.4:
            case.training = pick(["plain", "checkpoint", "reentrant"])
            case.cache, case.precision = "none", "float32"
    elif roll < 0.55 and (family != "llama" or num_turns == 1):
        _draw_generation(rng, case)
    for turn in case.turns[:-1]:
        turn.after = pick(["nothing", "nothing", "copy", "select", "repeat", "crop", "length"])
        if case.cache == "static":
            turn.after = pick(["nothing", "copy"])
    if family == "llama":
        moves = any(turn.after not in ("nothing", "length") for turn in case.turns)
        if last.generates or (not moves and rng.random() < 0.2):
            case.told = "start"
        elif rng.random() < 0.2:
            case.words = "embeds"
    uneven = any(_is_ragged(turn) for turn in case.turns)
    if last.generates:  # it counts positions by the mask
        if num_turns > 1:
            case.positions = "counted"
    elif case.policy == "renumbered" and num_turns > 1:
        # Between turns the model's own gaps stay; the reference counts none.
        case.positions = "counted" if uneven else pick(["none", "counted"])
    unpadded = True
    for turn in case.turns:
        unpadded = unpadded and not _is_ragged(turn)
        if turn.generates or last.generates:
            continue
        _draw_mask(rng, case, turn, unpadded)
        if not turn.labelled and all(turn.rows) and rng.random() < 0.1:
            turn.to_keep = pick([1, 2, 5])
    return case


def _draw_strategy(rng: random.Random, family: str, layers: list[int]) -> tp.PruningStrategy:
    """One for all cuts, one for each, or a witness among them."""
    roll = rng.random()
    if roll < 0.2 and len(layers) > 1:
        parts = [_draw_strategy(rng, family, [layer]) for layer in layers]
        return tp.PerStage(tuple(parts))
    if roll > 0.8:
        known = DECODER if family == "llama" else (*DECODER, *TOWER)
        wants = rng.sample(known, min(len(known), rng.choice([2, 4, 8])))
        if layers[0] == 0:
            wants = [need for need in wants if getattr(need, "source", "") != "previous"]
        return Witness(tuple(wants))
    first = [own for own in STRATEGIES if layers == [0] or BeforeProjector() not in own.needs()]
    own = rng.choice([own for _, own in runnable([family], first)])
    # Most of those that cannot be asked before the first layer are not.
    if layers[0] == 0 and _asks_before(own) and rng.random() < 0.9:
        return _draw_strategy(rng, family, layers)
    return own


def _asks_before(strategy: tp.PruningStrategy) -> bool:
    return any(getattr(need, "source", "") == "previous" for need in strategy.needs())


def _is_ragged(turn: Turn) -> bool:
    """Whether some tokens of a turn are no tokens."""
    lengths = {len(row) for row in turn.rows}
    return len(lengths) > 1 or any(token.hidden for row in turn.rows for token in row)


def _draw_generation(rng: random.Random, case: Case) -> None:
    last, num_turns = case.turns[-1], len(case.turns)
    ways = ["greedy"] * 4
    if num_turns == 1:
        ways += ["beams"] * 2
        if case.cache != "none":
            ways += ["chunks"] * 2
    elif case.cache == "none":
        case.cache = "dynamic"
    if len(last.rows) == num_turns == 1 and case.cache != "static":
        ways += ["lookup"] * 4  # with a cache from before, transformers looks up wrong, unpruned too
    last.way, case.precision = rng.choice(ways), "float32"
    for turn in case.turns:
        turn.side, turn.mask = "left", "2d"
    case.positions = "none"
    for row in last.rows:  # it asks after the last token
        if not row:
            row.append(Token(rng.randrange(1, 90)))
        row[-1] = Token(row[-1].id, row[-1].visual)
    if last.way == "lookup":
        words = [token for token in last.rows[0] if not token.visual]
        last.rows[0] += words[:3] + words[:2]  # something to look up
        last.rows[0][-1] = Token(last.rows[0][-1].id)
    last.chunk = rng.choice([1, 3, 20, 30, 40, 60])


def _draw_mask(rng: random.Random, case: Case, turn: Turn, unpadded: bool) -> None:
    forms = ["2d", "float"] + ["bool"] * (case.attention == "sdpa")
    if case.attention.startswith("flash"):
        forms = ["2d"]
    forms += ["none", "none"] * unpadded
    turn.mask = rng.choice(forms)
    if turn.mask in ("bool", "float") and _says_little(turn):
        turn.mask = "2d"
    if case.positions == "gaps" and case.cache == "none":
        turn.mask = "2d"  # without a mask, transformers takes gaps for packed sequences
    turn.pads = rng.choice(["eye", "open", "row"])
    if turn.mask == "bool" and turn.pads == "row":
        turn.pads = "eye"  # rows that see nothing are no numbers, unpruned too
    if turn.mask == "float" and case.precision == "bfloat16":
        turn.mask = "2d"  # sdpa wants a mask in the precision of what it is given


def _says_little(turn: Turn) -> bool:
    """Whether a mask over pairs looks the same as that of another batch.

    A lone pad on the right sees what a token there would see; two of them see the row, and not each
    other, as a last token after a hidden one.
    """
    return any(
        (turn.side != "left" and len(row) == turn.width - 1)
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
                    count = len(picture(case.family, seed, size).features)
                    row += [Token(IMAGE, True)] * count
                    images.append((seed, size))
        if holes and row:
            row = [Token(t.id, t.visual, not t.visual and rng.random() < 0.15) for t in row]
            if rng.random() < 0.9:
                row[-1] = Token(row[-1].id, row[-1].visual)
        turn.rows.append(row)
        turn.images.append(images)
    if rng.random() < 0.15:  # no pads, though rows have different numbers of images
        for row in turn.rows:
            row[:0] = [Token(rng.randrange(1, 90)) for _ in range(turn.width - len(row))]
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


def reasons(case: Case) -> list[str]:
    """What may be refused in this case, as patterns of the error."""
    found = []
    rows = [row for turn in case.turns for row in turn.rows if row]
    if any(turn.side == "mixed" for turn in case.turns):
        found.append("expected rows padded on one side")
    if any(row[-1].hidden or row[0].hidden for row in rows):
        found.append("expected rows padded on one side")
    if any(
        cut == 0 and _asks_before(own) for cut, own in zip(case.cuts, case.strategies, strict=True)
    ):
        found.append("expected cuts at layer 1 or later")
    calls = [call for turn in case.turns for call in turn.calls()]
    exact = all(own.keeps_exactly for own in case.strategies)
    for call in calls:
        alone = all(token.visual or token.hidden for row in call for token in row)
        counts = [sum(token.visual for token in row) for row in call]
        stages = range(len(case.cuts))
        left = min(sum(case.schedule.count(stage, n) for n in counts) for stage in stages)
        if alone and any(counts) and (left == 0 or not exact):
            found.append("expected at least one token to be left")
    for call, following in zip(calls, calls[1:], strict=False):
        pairs = zip(call, following, strict=True)
        if any(a and b and a[-1].visual and b[0].visual for a, b in pairs):
            found.append("expected an image in one call")
    shows = [any(token.visual for row in call for token in row) for call in calls]
    if case.cache == "static" and any(shows[1:]):
        found.append("expected a cache that grows, for images of a later turn")
    if case.turns[-1].way == "chunks" and any(map(vision_needs, case.strategies)):
        found.append("expected images that the vision tower encodes")
    if case.turns[-1].way == "lookup":  # a placeholder is a guess like any other, unpruned too
        found.append("Image features and image tokens do not match")
    return found
