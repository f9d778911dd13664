"""Kept-token pictures: the image with the patches whose tokens are still alive at each stage.

Pure functions from an image, the places of its visual tokens and the kept indices to a picture.
A place is (image, grid, row, column), as `trace.places` has it; a token without a place in a grid
(-1, such as LLaVA-NeXT's newlines) is alive or not but cannot be drawn.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont, ImageOps

# What a dropped patch keeps of its own brightness; the rest is a plain tone.
GHOST = 0.16
LIGHT, DARK = 242, 26
GAP = 8  # pixels between panels and between the grids of a panel
INK, PAPER = (32, 32, 30), (255, 255, 255)


@dataclass(frozen=True)
class Panel:
    """One column of the strip: what it shows in words, and one picture per grid."""

    title: str
    images: tuple[Image.Image, ...]


def seen(image: Image.Image, grids: Sequence[Sequence[int]]) -> Image.Image:
    """The part of `image` that the grids cover.

    CLIP's processor (LLaVA-1.5) resizes the shortest edge and crops the centre, so a single square
    grid on an oblong image covers the central square. Several grids (LLaVA-NeXT: the whole image
    squeezed into a square, and the mosaic of its tiles without padding) and oblong grids cover the
    whole image.
    """
    rgb = image.convert("RGB")
    if len(grids) != 1 or grids[0][0] != grids[0][1] or rgb.width == rgb.height:
        return rgb
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
) -> list[Panel]:
    """The whole image, then one panel per stage with the dropped patches faded.

    Args:
        image: The sample's image, as it was given to the processor.
        grids: (rows, columns) of each grid of the image.
        places: (image, grid, row, column) of each visual token; -1 where unknown.
        stages: (layer, kept indices into `places`) of each cut.
        size: Width of a panel in pixels.

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
    view = seen(image, grids)
    scale = size / view.width
    view = view.resize((size, max(1, round(view.height * scale))), Image.Resampling.LANCZOS)

    result = [Panel(f"all {len(places)}", (view,))]
    for layer, kept in stages:
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
        result.append(Panel(f"layer {layer}: {len(indices)}", drawn))
    return result


def stages(
    image: Image.Image,
    grids: Sequence[Sequence[int]],
    places: Sequence[Sequence[int]],
    stages: Sequence[tuple[int, Iterable[int]]],
    size: int = 256,
) -> Image.Image:
    """A strip of titled panels: "all N", then "layer k: n" with the n tokens alive from k on.

    Several grids are drawn below each other. Arguments and errors as `panels`.
    """
    drawn = panels(image, grids, places, stages, size)
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
