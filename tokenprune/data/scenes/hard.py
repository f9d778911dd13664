"""Scenes of 24 cells a side: colours and symbols occur several times, and evidence is scattered.

Two colours occur once, two twice, and the other four any number of times up to six. Symbols of the
first four colours occur nowhere else, so that a question may name an object by its symbol alone.
"""

from __future__ import annotations

import random
from collections import Counter

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
    grid=24,
    cell=14,
    strokes=(12, 28),
    dots=(60, 160),
    distractors=(20, 50),
    font=(13, 15),
    radius=(4.2, 5.5),
    jitter=1.0,
    fade=22,
)
KINDS = ("read", "colour", "exist", "relation", "count", "compare", "steps", "text")
NUMBERS = ("none", "one", "two", "three", "four", "five", "six")
MAX_ALIKE = len(NUMBERS) - 1
SIGN_LENGTHS = (4, 5, 6)
NAMED = 6  # objects of the colours that occur once or twice


def make_scene(rng: random.Random, max_alike: int = MAX_ALIKE) -> Scene:
    """A sign of four to six glyphs, and objects in free cells.

    Args:
        rng: Source of all choices.
        max_alike: Most objects of each of the four colours that may occur any number of times.
    """
    colours = rng.sample(list(COLOURS), len(COLOURS))
    symbols = rng.sample(SYMBOLS, len(SYMBOLS))
    named = [colours[i] for i in (0, 1, 2, 2, 3, 3)]
    things = list(zip(symbols, named, strict=False))
    for colour in colours[4:]:
        # Of one colour no symbol twice.
        alike = rng.sample(symbols[NAMED:], rng.randint(0, max_alike))
        things += [(symbol, colour) for symbol in alike]
    free = {(row, column) for row in range(STYLE.grid) for column in range(STYLE.grid)}
    sign = _put_sign(rng, free)
    cells = rng.sample(sorted(free), len(things))
    items = [Item(*thing, *cell) for thing, cell in zip(things, cells, strict=True)]
    return Scene(tuple(items), (sign,))


def make_crowd(rng: random.Random, num_items: int, num_signs: int) -> Scene:
    """Any symbols in any colours, as dense as asked for: to train a vision tower alone."""
    free = {(row, column) for row in range(STYLE.grid) for column in range(STYLE.grid)}
    signs = [_put_sign(rng, free) for _ in range(num_signs)]
    cells = rng.sample(sorted(free), num_items)
    items = [Item(rng.choice(SYMBOLS), rng.choice(list(COLOURS)), *cell) for cell in cells]
    return Scene(tuple(items), tuple(signs))


def _put_sign(rng: random.Random, free: set[tuple[int, int]]) -> Sign:
    """A sign whose cells are taken out of `free`."""
    text = tuple(rng.choice(GLYPHS) for _ in range(rng.choice(SIGN_LENGTHS)))
    while True:
        sign = Sign(text, rng.randrange(STYLE.grid), rng.randrange(STYLE.grid - len(text) + 1))
        if free.issuperset(sign.cells):
            free.difference_update(sign.cells)
            return sign


def ask(rng: random.Random, scene: Scene, kind: str) -> Question:
    """A question of `kind` that `scene` answers."""
    return _ASK[kind](rng, scene)


def _read(rng: random.Random, scene: Scene) -> Question:
    item = rng.choice([i for i in scene.items if len(_of_colour(scene, i.colour)) == 1])
    return _question(f"Which symbol is {item.colour}?", item.symbol, "read", [item])


def _colour(rng: random.Random, scene: Scene) -> Question:
    item = rng.choice(_named_by_symbol(scene))
    return _question(f"Which colour is {item.symbol}?", item.colour, "colour", [item])


def _exist(rng: random.Random, scene: Scene) -> Question:
    """Half "yes". Three of four "no" ask for a colour and a symbol that both occur, apart."""
    item = rng.choice(scene.items)
    if rng.random() < 0.5:
        return _question(f"Is there a {item.colour} {item.symbol}?", "yes", "exist", [item])
    shown = {(i.colour, i.symbol) for i in scene.items}
    apart = rng.random() < 0.75
    symbols = sorted({i.symbol for i in scene.items}) if apart else sorted(SYMBOLS)
    symbol = rng.choice([s for s in symbols if (item.colour, s) not in shown])
    same = [i for i in scene.items if i.symbol == symbol or i.colour == item.colour]
    return _question(f"Is there a {item.colour} {symbol}?", "no", "exist", same)


def _relation(rng: random.Random, scene: Scene) -> Question:
    """Compares two objects that lie at least three cells apart along the axis asked for."""
    named = _named_by_symbol(scene)
    pairs = [
        (a, b, word)
        for a in named
        for b in named
        for word, gap in (("left of", b.column - a.column), ("above", b.row - a.row))
        if abs(gap) >= 3
    ]
    if not pairs:  # of six objects in a picture
        return _exist(rng, scene)
    a, b, word = rng.choice(pairs)
    holds = a.column < b.column if word == "left of" else a.row < b.row
    answer = "yes" if holds else "no"
    return _question(f"Is {a.symbol} {word} {b.symbol}?", answer, "relation", [a, b])


def _count(rng: random.Random, scene: Scene) -> Question:
    counts = _counts(scene)
    number = rng.choice(sorted(set(counts.values())))
    colour = rng.choice([c for c in COLOURS if counts[c] == number])
    return _question(f"How many are {colour}?", NUMBERS[number], "count", _of_colour(scene, colour))


def _compare(rng: random.Random, scene: Scene) -> Question:
    """Numbers that differ by two or more; by one where the scene has no such pair."""
    counts = _counts(scene)
    gap = min(2, max(counts.values()) - min(counts.values()))
    pairs = [(a, b) for a in COLOURS for b in COLOURS if counts[a] - counts[b] >= gap]
    more, fewer = rng.choice(pairs)
    first, second, answer = rng.choice([(more, fewer, "yes"), (fewer, more, "no")])
    both = _of_colour(scene, more) + _of_colour(scene, fewer)
    return _question(f"Are there more {first} than {second}?", answer, "compare", both)


def _steps(rng: random.Random, scene: Scene) -> Question:
    """From a symbol to its colour, and to the other object of that colour."""
    pairs = [pair for c in COLOURS if len(pair := _of_colour(scene, c)) == 2]
    one, other = rng.sample(rng.choice([p for p in pairs if _are_named(scene, p)]), 2)
    return _question(
        f"Which symbol shares colour with {one.symbol}?", other.symbol, "steps", [one, other]
    )


def _text(rng: random.Random, scene: Scene) -> Question:
    (sign,) = scene.signs
    return Question(Turn("What does the sign say?", " ".join(sign.text), "text"), sign.cells)


_ASK = {
    "read": _read,
    "colour": _colour,
    "exist": _exist,
    "relation": _relation,
    "count": _count,
    "compare": _compare,
    "steps": _steps,
    "text": _text,
}


def _question(text: str, answer: str, kind: str, evidence: list[Item]) -> Question:
    return Question(Turn(text, answer, kind), tuple((i.row, i.column) for i in evidence))


def _of_colour(scene: Scene, colour: str) -> list[Item]:
    return [item for item in scene.items if item.colour == colour]


def _counts(scene: Scene) -> dict[str, int]:
    """Objects of each colour."""
    return {colour: len(_of_colour(scene, colour)) for colour in COLOURS}


def _named_by_symbol(scene: Scene) -> list[Item]:
    """Objects whose symbol occurs once."""
    times = Counter(item.symbol for item in scene.items)
    return [item for item in scene.items if times[item.symbol] == 1]


def _are_named(scene: Scene, items: list[Item]) -> bool:
    named = _named_by_symbol(scene)
    return all(item in named for item in items)
