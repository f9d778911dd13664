"""Pictures of kept tokens, patch by patch."""

from __future__ import annotations

import pytest
from PIL import Image, ImageChops
from synthetic_sweep import gradient

from tokenprune.report import pictures


def test_overlay_keeps_exactly_the_given_cells() -> None:
    image = gradient((96, 72))
    kept = {(0, 0), (2, 3), (1, 1)}
    picture = pictures.overlay(image, (3, 4), kept)
    for row in range(3):
        for column in range(4):
            box = (column * 24, row * 24, column * 24 + 24, row * 24 + 24)
            before, after = image.crop(box), picture.crop(box)
            same = ImageChops.difference(before, after).getbbox() is None
            assert same == ((row, column) in kept)
            if not same:
                red, green, blue = after.split()
                assert red.tobytes() == green.tobytes() == blue.tobytes()
    with pytest.raises(ValueError, match="expected cells inside 3 x 4, got row 3, column 0"):
        pictures.overlay(image, (3, 4), {(3, 0)})


def test_cells_tile_the_image_when_it_does_not_divide() -> None:
    cells = [
        pictures.box((100, 50), (7, 9), row, column) for row in range(7) for column in range(9)
    ]
    assert sum((right - left) * (low - top) for left, top, right, low in cells) == 100 * 50


@pytest.mark.parametrize("level", [0, 90, 160, 255])
def test_faded_patches_differ_from_any_background(level: int) -> None:
    image = Image.new("RGB", (8, 8), (level, level, level))
    faded = pictures.ghost(image).getpixel((0, 0))
    assert isinstance(faded, tuple)
    assert abs(faded[0] - level) > 80


def test_square_grid_shows_the_central_square_that_clip_sees() -> None:
    image = gradient((200, 100))
    assert pictures.seen(image, [(24, 24)]).tobytes() == image.crop((50, 0, 150, 100)).tobytes()
    assert pictures.seen(image, [(24, 24)], "whole").size == (200, 100)
    assert pictures.seen(image, [(12, 24)]).size == (200, 100)
    assert pictures.seen(image, [(24, 24), (24, 48)]).size == (200, 100)


def test_panels_draw_each_grid_and_ignore_tokens_without_a_place() -> None:
    image = Image.new("RGB", (64, 32), (10, 20, 200))
    base = [(0, 0, row, column) for row in range(2) for column in range(2)]
    tiles = [(0, 1, row, column) for row in range(2) for column in range(4)]
    newline = [(0, 1, 0, -1), (-1, -1, -1, -1)]
    places = base + tiles + newline
    whole, stage = pictures.panels(image, [(2, 2), (2, 4)], places, [(3, [1, 4, 12, 13])], size=64)
    assert (whole.title, stage.title) == ("all 14", "layer 3: 4")
    assert len(stage.images) == 2
    blue = (10, 20, 200)
    above, below = (picture.load() for picture in stage.images)
    assert above is not None
    assert below is not None
    assert [above[x, 8] == blue for x in (8, 40)] == [False, True]
    assert [below[x, 8] == blue for x in (8, 24, 40, 56)] == [True, False, False, False]


def test_strip_has_a_panel_per_stage() -> None:
    places = [(0, 0, row, column) for row in range(4) for column in range(4)]
    strip = pictures.stages(gradient((64, 64)), [(4, 4)], places, [(2, range(8)), (4, [])], 100)
    assert strip.width == 3 * (100 + pictures.GAP) + pictures.GAP
    assert strip.height > 100


def test_patches_of_one_colour_are_in_the_token_framed_in_it() -> None:
    """Two tokens take in others, one stays alone, one is dropped; then one goes into the other."""
    image = Image.new("RGB", (60, 40), (10, 20, 200))
    places = [(0, 0, row, column) for row in range(2) for column in range(3)]
    cuts = [(0, [0, 2, 5]), (4, [2])]
    into = [[0, 0, 2, -1, 2, 5], [2, 2, 2, -1, 2, -1]]
    _, first, second = pictures.panels(image, [(2, 3)], places, cuts, 60, into)
    faded = pictures.ghost(image).getpixel((0, 0))
    (one,), (two,) = (panel.images for panel in (first, second))

    def colour(picture: Image.Image, cell: int, corner: bool = False) -> object:
        left, top, right, bottom = pictures.box(picture.size, (2, 3), *divmod(cell, 3))
        middle = ((left + right) // 2, (top + bottom) // 2)
        return picture.getpixel((left, top) if corner else middle)

    def tinted(number: int) -> object:
        pair = zip(faded, pictures.TINTS[number], strict=True)
        return tuple(int(a + pictures.TINT * (b - a)) for a, b in pair)

    assert [colour(one, cell) for cell in (0, 2, 5)] == [(10, 20, 200)] * 3
    assert [colour(one, cell, True) for cell in (0, 2)] == list(pictures.TINTS[:2])
    assert colour(one, 5, True) == (10, 20, 200)  # it took in none
    assert [colour(one, cell) for cell in (1, 4, 3)] == [tinted(0), tinted(1), faded]
    assert [colour(two, cell) for cell in (0, 1, 4, 3)] == [tinted(0)] * 3 + [faded]
    assert (colour(two, 2, True), colour(two, 2)) == (pictures.TINTS[0], (10, 20, 200))
    plain = pictures.panels(image, [(2, 3)], places, cuts, 60)[1].images[0]
    assert colour(plain, 1) == faded


@pytest.mark.parametrize(
    ("places", "kept", "message"),
    [
        ([(-1, -1, -1, -1)], [0], "expected visual tokens with a known place"),
        ([(0, 0, 0, 0)], [1], "expected kept indices below 1, got 1"),
    ],
)
def test_what_cannot_be_drawn_is_refused(
    places: list[tuple[int, int, int, int]], kept: list[int], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        pictures.panels(gradient(), [(1, 1)], places, [(2, kept)])
