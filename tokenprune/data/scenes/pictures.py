"""What a scene shows, and how it is drawn: coloured symbols in clutter, and a sign to read."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from functools import cache

from PIL import Image, ImageDraw, ImageFont

from tokenprune.data.sample import Turn

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


@dataclass(frozen=True)
class Style:
    """How scenes of a level look; ranges are (least, most), lengths in pixels."""

    grid: int  # cells per side; one cell is one patch of the level's model
    cell: int  # pixels per side of a cell
    strokes: tuple[int, int]
    dots: tuple[int, int]
    distractors: tuple[int, int]
    font: tuple[int, int]
    radius: tuple[float, float]  # of shapes
    jitter: float  # of a symbol about the middle of its cell
    fade: int = 0  # by so much a sign gets darker from each glyph to the next

    @property
    def size(self) -> int:
        """Pixels per side."""
        return self.grid * self.cell


@dataclass(frozen=True)
class Item:
    """A coloured symbol in a cell of the grid."""

    symbol: str
    colour: str
    row: int
    column: int


@dataclass(frozen=True)
class Sign:
    """A plate over neighbouring cells with one glyph on each; (row, column) is the left one."""

    text: tuple[str, ...]
    row: int
    column: int

    @property
    def cells(self) -> tuple[tuple[int, int], ...]:
        """(row, column) of each glyph."""
        return tuple((self.row, self.column + offset) for offset in range(len(self.text)))


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


def draw_scene(rng: random.Random, scene: Scene, style: Style) -> Image.Image:
    """Paints a scene over clutter: dim strokes, dots, and grey glyphs that mean nothing."""
    size = style.size
    ground = (rng.randint(15, 55), rng.randint(15, 55), rng.randint(15, 55))
    image = Image.new("RGB", (size, size), ground)
    draw = ImageDraw.Draw(image)
    for _ in range(rng.randint(*style.strokes)):
        ends = [rng.randrange(size) for _ in range(4)]
        dim = (rng.randint(40, 120), rng.randint(40, 120), rng.randint(40, 120))
        draw.line(ends, fill=dim, width=rng.randint(1, 2))
    for _ in range(rng.randint(*style.dots)):
        x, y = rng.randrange(size), rng.randrange(size)
        grey = rng.randint(60, 200)
        draw.rectangle((x, y, x + 1, y + 1), fill=(grey, grey, grey))

    taken = {(item.row, item.column) for item in scene.items}
    for sign in scene.signs:
        taken |= {*sign.cells}
    for _ in range(rng.randint(*style.distractors)):
        row, column = rng.randrange(style.grid), rng.randrange(style.grid)
        grey = rng.randint(95, 150)
        if (row, column) not in taken:
            _draw_glyph(rng, draw, style, rng.choice(DISTRACTORS), row, column, (grey,) * 3)

    for sign in scene.signs:
        _draw_sign(rng, draw, style, sign)
    for item in scene.items:
        red, green, blue = (
            max(0, min(255, channel + rng.randint(-12, 12))) for channel in COLOURS[item.colour]
        )
        if item.symbol in SHAPES:
            _draw_shape(rng, draw, style, item, (red, green, blue))
        else:
            _draw_glyph(rng, draw, style, item.symbol, item.row, item.column, (red, green, blue))
    return image


@cache
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def _centre(
    rng: random.Random, cell: int, row: int, column: int, jitter: float
) -> tuple[float, float]:
    x = column * cell + cell / 2 + rng.uniform(-jitter, jitter)
    y = row * cell + cell / 2 + rng.uniform(-jitter, jitter)
    return x, y


def _draw_glyph(
    rng: random.Random,
    draw: ImageDraw.ImageDraw,
    style: Style,
    glyph: str,
    row: int,
    column: int,
    colour: tuple[int, ...],
    jitter: float | None = None,
) -> None:
    font = _font(rng.randint(*style.font))
    jitter = style.jitter if jitter is None else jitter
    centre = _centre(rng, style.cell, row, column, jitter)
    draw.text(centre, glyph, fill=colour, font=font, anchor="mm")


def _draw_shape(
    rng: random.Random,
    draw: ImageDraw.ImageDraw,
    style: Style,
    item: Item,
    colour: tuple[int, int, int],
) -> None:
    x, y = _centre(rng, style.cell, item.row, item.column, style.jitter)
    r = rng.uniform(*style.radius)
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


def _draw_sign(rng: random.Random, draw: ImageDraw.ImageDraw, style: Style, sign: Sign) -> None:
    cell = style.cell
    left, top = sign.column * cell, sign.row * cell
    plate = (left + 1, top + 1, left + len(sign.text) * cell - 2, top + cell - 2)
    draw.rectangle(plate, fill=(232, 228, 205), outline=(120, 90, 50))
    for number in range(1, len(sign.text)) if style.fade else ():
        ground = tuple(channel - number * style.fade for channel in (232, 228, 205))
        right = left + (number + 1) * cell
        draw.rectangle((left + number * cell, top + 2, right - 3, top + cell - 3), fill=ground)
    for (row, column), glyph in zip(sign.cells, sign.text, strict=True):
        _draw_glyph(rng, draw, style, glyph, row, column, (20, 20, 20), jitter=0.8)
