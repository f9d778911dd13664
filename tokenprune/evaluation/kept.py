"""Which tokens a sample kept, and where they are in its image: entries of kept.json."""

from __future__ import annotations

from typing import Any

import tokenprune as tp


def kept_tokens(trace: tp.Trace | None, row: int, num_visual: int) -> dict[str, Any]:
    """Kept tokens of one sample, for kept.json.

    Where survivors were mixed, a stage's `into` says of each of the sample's tokens in which
    survivor it is from there on, -1 for those in none. Without `grids` nothing can be drawn.
    """
    framing = None if trace is None else trace.framing
    places = []
    if trace is not None and trace.places:
        places = _of_patches(trace.places[row].tolist(), trace.newlines)
    sizes: dict[tuple[int, int], list[int]] = {}
    for image, grid, grid_row, column in places:
        if image == 0 and grid >= 0:  # pictures show the first image
            size = sizes.setdefault((image, grid), [0, 0])
            size[:] = [max(size[0], grid_row + 1), max(size[1], column + 1)]
    stages = trace.stages if trace is not None else []
    entries = []
    seat, mixed = list(range(num_visual)), False  # of each token, where it is now
    alive = seat
    for stage in stages:
        kept = stage.kept[row].tolist()
        into = None if stage.into is None else stage.into[row].tolist()
        mixed |= into is not None
        if into is None:
            moved = {token: token for token in kept}
        else:
            moved = {token: kept[i] for token, i in zip(alive, into, strict=True) if i >= 0}
            moved |= {token: token for token in kept}
        seat, alive = [moved.get(own, -1) for own in seat], kept
        entries.append({"layer": stage.layer, "kept": kept} | ({"into": seat} if mixed else {}))
    return {
        "grids": [] if framing is None else list(sizes.values()),
        "framing": framing,
        "places": places,
        "num_visual": num_visual,
        "stages": entries,
    }


def _of_patches(places: list[list[int]], newlines: tuple[int, ...]) -> list[list[int]]:
    """Places in which tokens of no patch, at the ends of rows, are in no column."""
    last: dict[tuple[int, int], int] = {}
    for image, grid, _, column in places:
        if grid in newlines:
            last[image, grid] = max(column, last.get((image, grid), -1))
    return [[*own[:3], -1] if own[3] == last.get((own[0], own[1])) else own for own in places]
