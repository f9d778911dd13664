"""Where each visual token sits in its image.

Shape suffixes: B batch rows, T sequence positions, V visual tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tokenprune.families.adapter import Layout, Places


def raster(image: int, grid: int, rows: int, columns: int) -> Places:
    """Places of a raster-ordered grid, (rows * columns, 4)."""
    places = torch.empty(rows, columns, 4, dtype=torch.int64)
    places[..., 0], places[..., 1] = image, grid
    places[..., 2] = torch.arange(rows)[:, None]
    places[..., 3] = torch.arange(columns)
    return places.flatten(0, 1)


def number_images(images: Sequence[list[Places]], num_visual: Sequence[int]) -> list[Places] | None:
    """Hands the images of a batch, in order, to its rows, and numbers them within the row."""
    rows, queue = [], [torch.cat(grids) for grids in images]
    for count in num_visual:
        row: list[Places] = []
        while sum(map(len, row)) < count and queue:
            places = queue.pop(0)
            places[:, 0] = len(row)
            row.append(places)
        rows.append(torch.cat(row) if row else torch.empty(0, 4, dtype=torch.int64))
    fits = not queue and [len(row) for row in rows] == list(num_visual)
    return rows if fits else None


def places(
    layout: Layout,
    config: Any,
    inputs: Mapping[str, Any],
    visual_BT: Tensor,
    num_visual: Sequence[int],
) -> list[Places]:
    """Place of every visual token in its image, one (V, 4) tensor per row.

    Where the family's grid is unknown, a run of visual tokens counts as an image, and grid, row and
    column are -1.
    """
    known = layout(config, inputs, num_visual)
    if known is not None:
        return known
    starts_BT = visual_BT & ~nn.functional.pad(visual_BT, (1, 0))[:, :-1]
    image_BT = (starts_BT.cumsum(1) - 1).cpu()
    rows = []
    for row, mask in enumerate(visual_BT.cpu()):
        place = torch.full((num_visual[row], 4), -1, dtype=torch.int64)
        place[:, 0] = image_BT[row][mask]
        rows.append(place)
    return rows
