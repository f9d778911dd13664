"""Kept-token pictures: the image with the patches whose tokens are still alive at each stage.

Pure functions from an image, the places of its visual tokens and the kept indices to a picture.
A place is (image, grid, row, column), as `trace.places` has it; a token without a place in a grid
(-1, such as LLaVA-NeXT's newlines) is alive or not but cannot be drawn.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image, ImageDraw, ImageFont, ImageOps

# What a dropped patch keeps of its own brightness; the rest is a plain tone.
GHOST = 0.16
LIGHT, DARK = 242, 26
GAP = 8  # pixels between panels and between the grids of a panel
PADDING = (127, 127, 127)  # what processors fill up with is nearly that
INK, PAPER = (32, 32, 30), (255, 255, 255)
#: Of tokens that were mixed; people who see few colours can tell them apart (Okabe and Ito, 2008).
TINTS = ((230, 159, 0), (86, 180, 233), (0, 158, 115), (213, 94, 0), (204, 121, 167), (0, 114, 178))
TINT = 0.55  # share of the colour in a patch that went into another

Cell = tuple[int, int]
Colour = tuple[int, int, int]


@dataclass(frozen=True)
class Panel:
    """One column of the strip: what it shows in words, and one picture per grid."""

    title: str
    images: tuple[Image.Image, ...]


def drawing(kept: Mapping[str, Any], cuts: slice = slice(None)) -> dict[str, Any]:
    """Arguments of `panels` and `stages`: what a sample's entry of kept.json says of some cuts."""
    shown = kept["stages"][cuts]
    return {
        "grids": kept["grids"],
        "places": kept["places"],
        "stages": [(int(stage["layer"]), stage["kept"]) for stage in shown],
        "into": [stage.get("into") for stage in shown],
        "framing": kept.get("framing"),
    }


def seen(
    image: Image.Image, grids: Sequence[Sequence[int]], framing: str | None = None
) -> Image.Image:
    """The part of `image` that the grids cover.

    CLIP's processor (LLaVA-1.5) resizes the shortest edge and crops the centre, so a single square
    grid on an oblong image covers the central square, unless `framing` is `"whole"`, or `"padded"`:
    then it covers the square around the image (DeepSeek-VL). Several grids (LLaVA-NeXT: the whole
    image squeezed into a square, and the mosaic of its tiles without padding) and oblong grids
    cover the whole image.
    """
    rgb = image.convert("RGB")
    if (
        framing == "whole"
        or len(grids) != 1
        or grids[0][0] != grids[0][1]
        or rgb.width == rgb.height
    ):
        return rgb
    side = max(rgb.size)
    if framing == "padded":
        around = Image.new("RGB", (side, side), PADDING)
        around.paste(rgb, ((side - rgb.width) // 2, (side - rgb.height) // 2))
        return around
    side = min(rgb.size)
    left, top = (rgb.width - side) // 2, (rgb.height - side) // 2
    return rgb.crop((left, top, left + side, top + side))


def box(
    size: tuple[int, int], grid: Sequence[int], row: int, column: int
) -> tuple[int, int, int, int]:
    """Pixels (left, top, right, bottom) of a cell; neighbours share an edge, none overlap."""
    (width, height), (rows, columns) = size, grid
    return (
        column * width // columns,
        row * height // rows,
        (column + 1) * width // columns,
        (row + 1) * height // rows,
    )


def overlay(
    image: Image.Image, grid: Sequence[int], cells: Collection[tuple[int, int]]
) -> Image.Image:
    """`image` with every cell (row, column) of `grid` faded but those in `cells`.

    Args:
        image: What the grid covers, see `seen`.
        grid: Number of rows and columns.
        cells: The cells that keep their pixels, exactly.

    Raises:
        ValueError: If a cell lies outside the grid.
    """
    rows, columns = grid
    rgb = image.convert("RGB")
    picture = ghost(rgb)
    for row, column in cells:
        if not (0 <= row < rows and 0 <= column < columns):
            raise ValueError(
                f"pictures.overlay: expected cells inside {rows} x {columns}, got row {row}, "
                f"column {column}. Check that places and grids come from the same image."
            )
        cell = box(rgb.size, grid, row, column)
        picture.paste(rgb.crop(cell), cell)
    return picture


def tint(
    picture: Image.Image,
    grid: Sequence[int],
    joined: Mapping[Cell, Colour],
    framed: Mapping[Cell, Colour],
) -> None:
    """Colours patches that went into others, and frames those that took them in.

    Args:
        picture: From `overlay`; changed in place.
        grid: Number of rows and columns.
        joined: Cells that are coloured, and how.
        framed: Cells that are framed, and how.
    """
    for cell, colour in joined.items():
        place = box(picture.size, grid, *cell)
        own = picture.crop(place)
        picture.paste(Image.blend(own, Image.new("RGB", own.size, colour), TINT), place)
    draw = ImageDraw.Draw(picture)
    for cell, colour in framed.items():
        left, top, right, bottom = box(picture.size, grid, *cell)
        line = max(1, min(right - left, bottom - top) // 6)
        draw.rectangle((left, top, right - 1, bottom - 1), outline=colour, width=line)


def ghost(image: Image.Image) -> Image.Image:
    """A colourless trace of `image`: light where the image is dark and the other way round.

    Faded patches must differ from kept ones on a night scene as well as on a white document.
    """
    grey = ImageOps.grayscale(image)
    counts = grey.histogram()
    mean = sum(level * count for level, count in enumerate(counts)) / max(1, sum(counts))
    tone = LIGHT if mean < 128 else DARK
    faded = Image.blend(Image.new("L", grey.size, tone), grey, GHOST)
    return faded.convert("RGB")


def panels(
    image: Image.Image,
    grids: Sequence[Sequence[int]],
    places: Sequence[Sequence[int]],
    stages: Sequence[tuple[int, Iterable[int]]],
    size: int = 256,
    into: Sequence[Sequence[int] | None] = (),
    framing: str | None = None,
) -> list[Panel]:
    """The whole image, then one panel per stage with the dropped patches faded.

    Where tokens were mixed, patches of one colour are in the token whose patch is framed in it.

    Args:
        image: The sample's image, as it was given to the processor.
        grids: (rows, columns) of each grid of the image.
        places: (image, grid, row, column) of each visual token; -1 where unknown.
        stages: (layer, kept indices into `places`) of each cut.
        size: Width of a panel in pixels.
        into: Of each stage, of each visual token, the token that it is in; -1 for none. None, or
            left out, where no tokens were mixed.
        framing: See `seen`.

    Raises:
        ValueError: If no token has a known place, or a kept index lies outside `places`.
    """
    # Several images share one index space; this picture shows the first.
    drawable = [
        (place[1], place[2], place[3]) if place[0] == 0 and min(place) >= 0 else None
        for place in places
    ]
    if not grids or not any(drawable):
        raise ValueError(
            "pictures.panels: expected visual tokens with a known place in a grid, got "
            f"{len(grids)} grids and {sum(place is not None for place in drawable)} placed tokens. "
            "This model's tokens cannot be drawn on its image."
        )
    view = seen(image, grids, framing)
    scale = size / view.width
    view = view.resize((size, max(1, round(view.height * scale))), Image.Resampling.LANCZOS)

    result = [Panel(f"all {len(places)}", (view,))]
    for number, (layer, kept) in enumerate(stages):
        indices = list(kept)
        cells: list[set[tuple[int, int]]] = [set() for _ in grids]
        for index in indices:
            if not 0 <= index < len(drawable):
                raise ValueError(
                    f"pictures.panels: expected kept indices below {len(drawable)}, got {index}. "
                    "Kept indices count the sample's own visual tokens."
                )
            place = drawable[index]
            if place is not None and place[0] < len(grids):
                cells[place[0]].add((place[1], place[2]))
        drawn = tuple(overlay(view, grid, alive) for grid, alive in zip(grids, cells, strict=True))
        mixed = into[number] if number < len(into) else None
        if mixed is not None:
            joined, framed = _colours(drawable, mixed, len(grids))
            for picture, grid, *own in zip(drawn, grids, joined, framed, strict=True):
                tint(picture, grid, *own)
        result.append(Panel(f"layer {layer}: {len(indices)}", drawn))
    return result


def _colours(
    drawable: Sequence[tuple[int, int, int] | None], into: Sequence[int], num_grids: int
) -> tuple[list[dict[Cell, Colour]], list[dict[Cell, Colour]]]:
    """Of each grid, colours of cells that went into other tokens, and of those that took some."""
    joined: list[dict[Cell, Colour]] = [{} for _ in range(num_grids)]
    framed: list[dict[Cell, Colour]] = [{} for _ in range(num_grids)]
    takes = sorted({seat for token, seat in enumerate(into) if seat not in (-1, token)})
    colours = {seat: TINTS[number % len(TINTS)] for number, seat in enumerate(takes)}
    for token, seat in enumerate(into):
        place = drawable[token] if token < len(drawable) else None
        if place is None or place[0] >= num_grids or seat not in colours:
            continue
        cells = framed if seat == token else joined
        cells[place[0]][place[1], place[2]] = colours[seat]
    return joined, framed


def stages(
    image: Image.Image,
    grids: Sequence[Sequence[int]],
    places: Sequence[Sequence[int]],
    stages: Sequence[tuple[int, Iterable[int]]],
    size: int = 256,
    into: Sequence[Sequence[int] | None] = (),
    framing: str | None = None,
) -> Image.Image:
    """A strip of titled panels: "all N", then "layer k: n" with the n tokens alive from k on.

    Several grids are drawn below each other. Arguments and errors as `panels`.
    """
    drawn = panels(image, grids, places, stages, size, into, framing)
    columns = [stack(panel.images) for panel in drawn]
    bar = max(20, size // 10)
    width = len(drawn) * (size + GAP) + GAP
    height = bar + max(column.height for column in columns) + 2 * GAP
    strip = Image.new("RGB", (width, height), PAPER)
    draw = ImageDraw.Draw(strip)
    font = ImageFont.load_default(round(bar * 0.6))
    for number, (panel, column) in enumerate(zip(drawn, columns, strict=True)):
        left = GAP + number * (size + GAP)
        draw.text((left, GAP + bar // 2 - 2), panel.title, fill=INK, font=font, anchor="lm")
        strip.paste(column, (left, GAP + bar))
    return strip


def stack(images: Sequence[Image.Image]) -> Image.Image:
    """Pictures of one width below each other."""
    height = sum(image.height + GAP for image in images) - GAP
    column = Image.new("RGB", (images[0].width, height), PAPER)
    top = 0
    for image in images:
        column.paste(image, (0, top))
        top += image.height + GAP
    return column
