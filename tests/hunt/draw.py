"""Draws a conversation from a seed."""

from __future__ import annotations

import random
from dataclasses import replace

from models import IMAGE, NUM_LAYERS
from oracles import EVERY, runnable

import tokenprune as tp
from hunt.cases import Case, Token, Turn, asks_before
from hunt.pictures import picture
from hunt.witness import DECODER, TOWER, Witness
from tokenprune.strategy import BeforeProjector

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
        turn.layerwise = rng.random() < 0.3
    if family == "llama":
        moves = any(turn.after not in ("nothing", "length") for turn in case.turns)
        if last.generates or (not moves and rng.random() < 0.2):
            case.told = "start"
        if last.way in ("forward", "greedy", "beams") and rng.random() < 0.2:
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


def draw_ways(case: Case, often: float) -> list[Case]:
    """A case whose last turn generates, in other ways: sampled, or with an assistant.

    Args:
        case: The case.
        often: As a share of the usual.
    """
    rng, last = random.Random(f"{case.seed}:ways"), case.turns[-1]
    found = []
    if last.way == "greedy" and rng.random() < 0.4 * often:
        found.append(replace(last, way="sample"))
    lone = len(case.turns) == len(last.rows) == 1 and case.cache != "static"
    guesses = lone and last.way in ("greedy", "lookup") and case.words == "ids"
    if guesses and rng.random() < often:
        assistant = rng.choice(["same", "same", "other", "llama"])
        found.append(replace(last, way="assisted", assistant=assistant))
    return [replace(case, turns=[*case.turns[:-1], own]) for own in found]


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
    if layers[0] == 0 and asks_before(own) and rng.random() < 0.9:
        return _draw_strategy(rng, family, layers)
    return own


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
        ways += [
            "lookup"
        ] * 4  # with a cache from before, transformers looks up wrong, unpruned too
    last.way, case.precision = rng.choice(ways), "float32"
    for turn in case.turns:
        turn.side, turn.mask = "left", "2d"
    case.positions = "none"
    for turn in case.turns[:-1]:
        if rng.random() < 0.4:
            turn.way = "greedy"
    for turn in case.turns:
        for row in turn.rows if turn.generates else ():  # it asks after the last token
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
