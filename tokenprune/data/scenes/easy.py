"""Scenes of a dozen cells a side: no colour and no symbol twice, one or two patches of evidence."""

from __future__ import annotations

import random
from collections.abc import Sequence

from tokenprune.data.sample import Turn
from tokenprune.data.scenes.pictures import (
    COLOURS,
    GLYPHS,
    SYMBOLS,
    Item,
    Question,
    Scene,
    Sign,
    Style,
)

STYLE = Style(
    grid=12,
    cell=16,
    strokes=(6, 14),
    dots=(20, 60),
    distractors=(6, 14),
    font=(14, 17),
    radius=(4.5, 6.0),
    jitter=1.5,
)
KINDS = ("read", "colour", "exist", "relation", "text")


def make_scene(
    rng: random.Random, num_items: int, num_signs: int = 1, distinct: bool = True
) -> Scene:
    """Places items and signs on free cells.

    Args:
        rng: source of all choices.
        num_items: number of coloured symbols.
        num_signs: number of two-glyph plates.
        distinct: no colour and no symbol twice, so that a question has one answer. Without it
            scenes can be as dense as the grid allows (training the vision tower alone).
    """
    free = {(row, column) for row in range(STYLE.grid) for column in range(STYLE.grid)}
    signs = []
    for _ in range(num_signs):
        row, column = rng.choice(
            [(row, column) for row, column in sorted(free) if (row, column + 1) in free]
        )
        free -= {(row, column), (row, column + 1)}
        signs.append(Sign((rng.choice(GLYPHS), rng.choice(GLYPHS)), row, column))
    cells = rng.sample(sorted(free), num_items)
    if distinct:
        symbols = rng.sample(SYMBOLS, num_items)
        colours = rng.sample(list(COLOURS), num_items)
    else:
        symbols = rng.choices(SYMBOLS, k=num_items)
        colours = rng.choices(list(COLOURS), k=num_items)
    items = [
        Item(symbol, colour, *cell)
        for symbol, colour, cell in zip(symbols, colours, cells, strict=True)
    ]
    return Scene(tuple(items), tuple(signs))


def ask(rng: random.Random, scene: Scene, kind: str) -> Question:
    """A question of `kind` that `scene` answers; `relation` needs two items, else asks `exist`."""
    items = scene.items
    if kind == "relation" and len(items) > 1:
        question = _ask_relation(rng, items)
        if question is not None:
            return question
    if kind == "text":
        sign = scene.signs[0]
        turn = Turn("What does the sign say?", " ".join(sign.text), kind)
        return Question(turn, sign.cells)
    item = rng.choice(items)
    cell = ((item.row, item.column),)
    if kind == "read":
        return Question(Turn(f"Which symbol is {item.colour}?", item.symbol, kind), cell)
    if kind == "colour":
        return Question(Turn(f"Which colour is {item.symbol}?", item.colour, kind), cell)
    return _ask_exist(rng, items, item)


def _ask_exist(rng: random.Random, items: Sequence[Item], item: Item) -> Question:
    """Half "yes". Three of four "no" ask for a colour and a symbol that both occur, apart."""
    cells = [(item.row, item.column)]
    if rng.random() < 0.5:
        return Question(
            Turn(f"Is there a {item.colour} {item.symbol}?", "yes", "exist"), tuple(cells)
        )
    others = [other for other in items if other is not item]
    symbol, colour = item.symbol, item.colour
    if others and rng.random() < 0.75:
        other = rng.choice(others)
        symbol = other.symbol
        cells.append((other.row, other.column))
    elif rng.random() < 0.5:
        symbol = rng.choice([s for s in SYMBOLS if all(s != i.symbol for i in items)])
    else:
        absent = [c for c in COLOURS if all(c != i.colour for i in items)]
        # With every colour in use, any other colour is a wrong one.
        colour = rng.choice(absent or [c for c in COLOURS if c != item.colour])
    return Question(Turn(f"Is there a {colour} {symbol}?", "no", "exist"), tuple(cells))


def _ask_relation(rng: random.Random, items: Sequence[Item]) -> Question | None:
    """Compares two items that lie at least two cells apart along the axis asked for."""
    pairs = [
        (a, b, word)
        for a in items
        for b in items
        for word, gap in (("left of", b.column - a.column), ("above", b.row - a.row))
        if a is not b and abs(gap) >= 2
    ]
    if not pairs:
        return None
    a, b, word = rng.choice(pairs)
    holds = a.column < b.column if word == "left of" else a.row < b.row
    turn = Turn(f"Is {a.colour} {word} {b.colour}?", "yes" if holds else "no", "relation")
    return Question(turn, ((a.row, a.column), (b.row, b.column)))
