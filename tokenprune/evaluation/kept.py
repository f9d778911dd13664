"""Which tokens a sample kept, and where they are in its image: entries of kept.json."""

from __future__ import annotations

from typing import Any

import tokenprune as tp


def kept_tokens(trace: tp.Trace | None, row: int, num_visual: int) -> dict[str, Any]:
    """Kept tokens of one sample, for kept.json."""
    places = trace.places[row].tolist() if trace is not None and trace.places else []
    sizes: dict[tuple[int, int], list[int]] = {}
    for image, grid, grid_row, column in places:
        if image == 0 and grid >= 0:  # pictures show the first image
            size = sizes.setdefault((image, grid), [0, 0])
            size[:] = [max(size[0], grid_row + 1), max(size[1], column + 1)]
    stages = trace.stages if trace is not None else []
    return {
        "grids": list(sizes.values()),
        "places": places,
        "num_visual": num_visual,
        "stages": [{"layer": stage.layer, "kept": stage.kept[row].tolist()} for stage in stages],
    }
