"""Procedural visual question answering: small coloured symbols in clutter, and a sign to read.

Every object fills about one patch of the shipped model's 12 x 12 grid, so a dropped patch takes
its evidence along; the questions differ in how much evidence they need and of which sort.

| kind       | question                  | answer     | evidence                                |
|------------|---------------------------|------------|-----------------------------------------|
| `read`     | Which symbol is red?      | K          | one patch                               |
| `colour`   | Which colour is K?        | red        | one patch                               |
| `exist`    | Is there a red K?         | yes, no    | one patch; "no" needs the right one too |
| `relation` | Is red left of blue?      | yes, no    | two patches and where they are          |
| `text`     | What does the sign say?   | K 7        | two patches, two answer tokens          |

A scene depends on (seed, split, index) alone.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from PIL import Image, ImageDraw, ImageFont
from torch.utils.data import Dataset

from tokenprune.data.sample import Sample, Turn

GRID = 12  # cells per side; one cell is one patch of the shipped model
CELL = 16  # pixels per side of a cell
SIZE = GRID * CELL

LETTERS = ("A", "B", "C", "E", "H", "K", "M", "R", "T", "X")
DIGITS = ("2", "3", "4", "5", "7", "9")
SHAPES = ("circle", "square", "triangle", "star")
GLYPHS = LETTERS + DIGITS
SYMBOLS = GLYPHS + SHAPES
COLOURS = {
    "red": (235, 45, 45),
    "green": (45, 190, 65),
    "blue": (70, 105, 255),
    "yellow": (245, 225, 50),
    "pink": (250, 120, 205),
    "cyan": (60, 220, 235),
    "orange": (250, 135, 20),
    "white": (245, 245, 245),
}
# Grey glyphs that no question asks for: they look like evidence and are none.
DISTRACTORS = "GJLPQSUVWYZ68%&?#"
KINDS = ("read", "colour", "exist", "relation", "text")
SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Item:
    """A coloured symbol in a cell of the grid."""

    symbol: str
    colour: str
    row: int
    column: int


@dataclass(frozen=True)
class Sign:
    """A plate over two neighbouring cells with one glyph on each; (row, column) is the left one."""

    text: tuple[str, str]
    row: int
    column: int


@dataclass(frozen=True)
class Scene:
    """What a picture shows, apart from clutter."""

    items: tuple[Item, ...]
    signs: tuple[Sign, ...]


@dataclass(frozen=True)
class Question:
    """A turn together with the cells (row, column) that hold its evidence."""

    turn: Turn
    cells: tuple[tuple[int, int], ...]


class SceneDataset(Dataset[Sample]):
    """Scenes with questions, the same for the same (seed, split, index) on every machine.

    Args:
        split: `train`, `validation` or `test`: disjoint streams of scenes.
        num_samples: length of the data set.
        seed: another seed gives other scenes.
        num_turns: questions per image; with one, the kinds take turns and are balanced.
        min_objects: fewest coloured symbols per scene.
        max_objects: most coloured symbols per scene, at most one per colour.
        kinds: the question kinds to ask.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(
        self,
        split: str,
        num_samples: int,
        seed: int = 0,
        num_turns: int = 1,
        min_objects: int = 6,
        max_objects: int = 8,
        kinds: Sequence[str] = KINDS,
    ) -> None:
        if split not in SPLITS:
            raise ValueError(
                f"SceneDataset.split: expected one of {list(SPLITS)}, got {split!r}. "
                "Each is a stream of scenes of its own."
            )
        counts = {"num_samples": num_samples, "num_turns": num_turns, "seed": seed}
        counts |= {"min_objects": min_objects, "max_objects": max_objects}
        for name, value in counts.items():
            if not isinstance(value, int):
                raise ValueError(
                    f"SceneDataset.{name}: expected an integer, got {value!r}. Write it in digits."
                )
        if num_samples < 1 or num_turns < 1:
            raise ValueError(
                "SceneDataset: expected num_samples and num_turns >= 1, "
                f"got {num_samples} and {num_turns}. Ask for at least one of each."
            )
        if not 1 <= min_objects <= max_objects <= len(COLOURS):
            raise ValueError(
                f"SceneDataset: expected 1 <= min_objects <= max_objects <= {len(COLOURS)} (one "
                f"object per colour), got {min_objects} and {max_objects}. Change one of them."
            )
        unknown = [kind for kind in kinds if kind not in KINDS]
        if unknown or not kinds:
            raise ValueError(
                f"SceneDataset.kinds: expected some of {list(KINDS)}, got {list(kinds)}. "
                "Name at least one, and only these."
            )
        self.split = split
        self.num_samples = num_samples
        self.seed = seed
        self.num_turns = num_turns
        self.min_objects = min_objects
        self.max_objects = max_objects
        self.kinds = tuple(kinds)

    def __len__(self) -> int:
        return self.num_samples

    def __getitem__(self, index: int) -> Sample:
        scene, questions, rng = self._make(index)
        image = draw_scene(rng, scene)
        turns = tuple(question.turn for question in questions)
        return Sample(id=f"{self.split}-{self.seed}-{index}", images=(image,), turns=turns)

    def scene(self, index: int) -> tuple[Scene, list[Question]]:
        """What sample `index` shows and asks, without drawing it."""
        scene, questions, _ = self._make(index)
        return scene, questions

    def _make(self, index: int) -> tuple[Scene, list[Question], random.Random]:
        if not 0 <= index < self.num_samples:
            raise IndexError(f"SceneDataset: expected 0 <= index < {self.num_samples}, got {index}")
        rng = random.Random(f"{self.seed}/{self.split}/{index}")
        scene = make_scene(rng, rng.randint(self.min_objects, self.max_objects))
        if self.num_turns == 1:
            kinds = [self.kinds[index % len(self.kinds)]]
        else:
            # Every kind once, then more of those that can ask something new; a scene has one sign.
            again = [kind for kind in self.kinds if kind != "text"] or list(self.kinds)
            kinds = list(self.kinds) + [rng.choice(again) for _ in range(self.num_turns)]
            kinds = kinds[: self.num_turns]
            rng.shuffle(kinds)
        return scene, [ask(rng, scene, kind) for kind in kinds], rng


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
    free = {(row, column) for row in range(GRID) for column in range(GRID)}
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
        return Question(turn, ((sign.row, sign.column), (sign.row, sign.column + 1)))
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


def draw_scene(rng: random.Random, scene: Scene) -> Image.Image:
    """Paints a scene over clutter: dim strokes, dots, and grey glyphs that mean nothing."""
    ground = (rng.randint(15, 55), rng.randint(15, 55), rng.randint(15, 55))
    image = Image.new("RGB", (SIZE, SIZE), ground)
    draw = ImageDraw.Draw(image)
    for _ in range(rng.randint(6, 14)):
        ends = [rng.randrange(SIZE) for _ in range(4)]
        dim = (rng.randint(40, 120), rng.randint(40, 120), rng.randint(40, 120))
        draw.line(ends, fill=dim, width=rng.randint(1, 2))
    for _ in range(rng.randint(20, 60)):
        x, y = rng.randrange(SIZE), rng.randrange(SIZE)
        grey = rng.randint(60, 200)
        draw.rectangle((x, y, x + 1, y + 1), fill=(grey, grey, grey))

    taken = {(item.row, item.column) for item in scene.items}
    for sign in scene.signs:
        taken |= {(sign.row, sign.column), (sign.row, sign.column + 1)}
    for _ in range(rng.randint(6, 14)):
        row, column = rng.randrange(GRID), rng.randrange(GRID)
        grey = rng.randint(95, 150)
        if (row, column) not in taken:
            _draw_glyph(rng, draw, rng.choice(DISTRACTORS), row, column, (grey, grey, grey))

    for sign in scene.signs:
        _draw_sign(rng, draw, sign)
    for item in scene.items:
        red, green, blue = (
            max(0, min(255, channel + rng.randint(-12, 12))) for channel in COLOURS[item.colour]
        )
        if item.symbol in SHAPES:
            _draw_shape(rng, draw, item, (red, green, blue))
        else:
            _draw_glyph(rng, draw, item.symbol, item.row, item.column, (red, green, blue))
    return image


@cache
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def _centre(rng: random.Random, row: int, column: int, jitter: float) -> tuple[float, float]:
    x = column * CELL + CELL / 2 + rng.uniform(-jitter, jitter)
    y = row * CELL + CELL / 2 + rng.uniform(-jitter, jitter)
    return x, y


def _draw_glyph(
    rng: random.Random,
    draw: ImageDraw.ImageDraw,
    glyph: str,
    row: int,
    column: int,
    colour: tuple[int, int, int],
    jitter: float = 1.5,
) -> None:
    font = _font(rng.randint(14, 17))
    draw.text(_centre(rng, row, column, jitter), glyph, fill=colour, font=font, anchor="mm")


def _draw_shape(
    rng: random.Random, draw: ImageDraw.ImageDraw, item: Item, colour: tuple[int, int, int]
) -> None:
    x, y = _centre(rng, item.row, item.column, 1.5)
    r = rng.uniform(4.5, 6.0)
    if item.symbol == "circle":
        draw.ellipse((x - r, y - r, x + r, y + r), fill=colour)
    elif item.symbol == "square":
        draw.rectangle((x - r, y - r, x + r, y + r), fill=colour)
    else:
        # A triangle has three tips; a star alternates five tips with five notches.
        radii = [r * 1.15] * 3 if item.symbol == "triangle" else [r * 1.2, r * 0.5] * 5
        angles = [2 * math.pi * i / len(radii) - math.pi / 2 for i in range(len(radii))]
        points = [
            (x + radius * math.cos(angle), y + radius * math.sin(angle))
            for radius, angle in zip(radii, angles, strict=True)
        ]
        draw.polygon(points, fill=colour)


def _draw_sign(rng: random.Random, draw: ImageDraw.ImageDraw, sign: Sign) -> None:
    left, top = sign.column * CELL, sign.row * CELL
    plate = (left + 1, top + 1, left + 2 * CELL - 2, top + CELL - 2)
    draw.rectangle(plate, fill=(232, 228, 205), outline=(120, 90, 50))
    for offset, glyph in enumerate(sign.text):
        _draw_glyph(rng, draw, glyph, sign.row, sign.column + offset, (20, 20, 20), jitter=0.8)
