"""Where each visual token sits in its image.

A model hands out its features in order: the first of an image to the first placeholder, and so on,
whatever text stands between. So places follow from the shapes of the images, in order.

Shape suffixes: B batch rows, T sequence positions, V visual tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tokenprune.families.adapter import Layout, Places, Run

Bools = npt.NDArray[np.bool_]
#: Rows and columns of a grid.
Shape = tuple[int, int]
#: The images of a run of visual tokens; none where it holds no whole ones.
Shaped = Callable[[Run], list[Places]]


def find_runs(visual_BT: Bools, video_BT: Bools | None = None) -> list[list[Run]]:
    """The runs of visual tokens of each row.

    Args:
        visual_BT: Which tokens are visual.
        video_BT: Which of them are of videos, if that is known.
    """
    kind_BT = visual_BT.astype(np.int8)
    if video_BT is not None:
        kind_BT += video_BT
    rows = []
    for kinds in kind_BT:
        ends = np.append(np.flatnonzero(np.diff(kinds)) + 1, len(kinds))
        starts = np.append(0, ends[:-1])
        rows.append(
            [
                Run(end - start, None if video_BT is None else bool(kinds[start] == 2))
                for start, end in zip(starts.tolist(), ends.tolist(), strict=True)
                if end > start and kinds[start]
            ]
        )
    return rows


def nowhere(count: int) -> Places:
    """Places of tokens of an image that sit in no grid, or in none that is known."""
    return torch.full((count, 4), -1)


def raster(grid: int, rows: int, columns: int) -> Places:
    """Places of a grid of image 0 in raster order, (rows * columns, 4)."""
    places = torch.zeros(rows, columns, 4, dtype=torch.int64)
    places[..., 1] = grid
    places[..., 2] = torch.arange(rows)[:, None]
    places[..., 3] = torch.arange(columns)
    return places.flatten(0, 1)


def of_shapes(shapes: Iterable[Shape]) -> Places:
    """An image that is one grid after another."""
    return torch.cat([nowhere(0), *(raster(grid, *shape) for grid, shape in enumerate(shapes))])


# ---------------------------------------------------------------------- where the call says shapes


def in_order(
    images: Sequence[Places], videos: Sequence[Places], runs: Sequence[Sequence[Run]]
) -> list[Places] | None:
    """Hands images and videos, in order, to the visual tokens, and numbers them within the row.

    Generation repeats rows (beams, several returned sequences), and shows each the same images.

    Returns:
        None where these are not the call's images: too few, too many, or in parts.
    """
    kinds = {run.is_video for row in runs for run in row}
    mixed = bool(images) and bool(videos)
    if None in kinds if mixed else len(kinds) > 1:
        return None
    times, rest = divmod(
        sum(run.length for row in runs for run in row), sum(map(len, [*images, *videos])) or 1
    )
    if rest or not times or any(row != runs[n - n % times] for n, row in enumerate(runs)):
        return None
    # Images and videos have placeholders of their own, but for a GLM, which takes no call of both.
    both = iter([*images, *videos])
    left = dict.fromkeys(kinds, both)
    if mixed:
        left = {False: iter(images), True: iter(videos)}
    rows = []
    for row in runs[::times]:
        if (places := _of_row(row, left)) is None:
            return None
        rows.append(places)
    return [rows[number // times] for number in range(len(runs))]


def _of_row(row: Sequence[Run], left: Mapping[bool | None, Iterator[Places]]) -> Places | None:
    """The next images, by kind, that fill a row; None where the last is not a whole one."""
    parts, count = [nowhere(0)], 0
    begun: dict[bool | None, Places] = {}
    for length, kind in row:
        missing = length
        while missing:
            own = begun.pop(kind, nowhere(0))
            if not len(own):
                if (image := next(left[kind], None)) is None:
                    return None
                own, count = numbered(image, count), count + 1
            parts.append(own[:missing])
            begun[kind] = own[missing:]
            missing -= len(parts[-1])
    return None if any(map(len, begun.values())) else torch.cat(parts)


def with_videos(
    images: Sequence[Places], shaped: Shaped, runs: Sequence[Sequence[Run]]
) -> list[Places] | None:
    """The same where calls do not say how long videos are: each run of theirs is one."""
    shown = sum(run.length for row in runs for run in row if not run.is_video)
    times = max(1, shown // max(1, sum(map(len, images))))
    own = (run for row in runs[::times] for run in row if run.is_video)
    videos = [video for run in own for video in shaped(run) or [nowhere(run.length)]]
    return in_order(images, videos, runs)


def numbered(image: Places, number: int) -> Places:
    """An image's places with its number in them."""
    return torch.cat([torch.full_like(image[:, :1], number), image[:, 1:]], 1)


def told(inputs: Mapping[str, Any], name: str) -> list[Any]:
    """What a call says of its images or videos under a name: an entry of each, if anything."""
    said: Tensor | None = inputs.get(name)
    return [] if said is None else said.tolist()


def of_times(sizes: Iterable[Sequence[int]], edge: int) -> list[Places]:
    """Images or videos by their (times, rows, columns) of patches: a grid a time, of squares."""
    return [of_shapes([(rows // edge, columns // edge)] * times) for times, rows, columns in sizes]


def by_times(edge: Callable[[Any], int]) -> Layout:
    """The layout of families whose calls say (times, rows, columns) of patches.

    Args:
        edge: Of the config: how many patches a token is high and wide.
    """

    def layout(
        config: Any, inputs: Mapping[str, Any], runs: Sequence[Sequence[Run]]
    ) -> list[Places] | None:
        kinds = ("image_grid_thw", "video_grid_thw")
        images, videos = (of_times(told(inputs, kind), edge(config)) for kind in kinds)
        return in_order(images, videos, runs)

    return layout


# ------------------------------------------------------------------------- where runs are of a size


def by_runs(runs: Sequence[Sequence[Run]], shaped: Shaped) -> list[Places]:
    """The images of each row by the lengths of its runs."""
    rows = []
    for row in runs:
        images = [image for run in row for image in shaped(run) or [nowhere(run.length)]]
        parts = [numbered(image, number) for number, image in enumerate(images)]
        rows.append(torch.cat([nowhere(0), *parts]))
    return rows


def tiles(run: Run, side: int) -> list[Places]:
    """A run of square grids as one image: its tiles, where these are several."""
    count = whole(run, side**2)
    return [of_shapes([(side, side)] * count)] if count else []


def whole(run: Run, size: int) -> int:
    """How many tiles of a size a run is; 0 where it is no whole ones."""
    return run.length // size if size and run.length % size == 0 else 0


def by_squares(side: Callable[[Any], int]) -> Layout:
    """The layout of families whose runs are tiles of one size.

    Args:
        side: Of the config: how many tokens a tile is high and wide.
    """

    def layout(
        config: Any, inputs: Mapping[str, Any], runs: Sequence[Sequence[Run]]
    ) -> list[Places] | None:
        return by_runs(runs, lambda run: tiles(run, side(config)))

    return layout


def patches_across(config: Any) -> int:
    """How many patches the tower's images are high and wide; 0 where they are of many sizes."""
    sizes = (getattr(config.vision_config, name, None) for name in ("image_size", "patch_size"))
    edges = [{size} if isinstance(size, int) else set(size or ()) for size in sizes]
    if any(len(edge) != 1 for edge in edges):
        return 0
    (edge,), (step,) = edges
    across: int = edge // step
    return across


# -------------------------------------------------------------------------------------- of one call


def places(
    layout: Layout | None,
    config: Any,
    inputs: Mapping[str, Any],
    runs: Sequence[Sequence[Run]],
) -> list[Places]:
    """Place of every visual token in its image, one (V, 4) tensor per row.

    Where the grid is unknown, a run of visual tokens counts as an image, and grid, row and column
    are -1.
    """
    known = None if layout is None else layout(config, inputs, runs)
    return by_runs(runs, lambda run: []) if known is None else known
