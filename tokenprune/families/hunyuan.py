"""HunYuan-VL: squares become tokens, with one after each row and one at each end of an image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from tokenprune.families.adapter import Adapter, Places, Run, register_adapter
from tokenprune.families.attending import captured
from tokenprune.families.patches import frames, grids, squares, times_rows_columns
from tokenprune.families.places import in_order, nowhere, raster, told
from tokenprune.families.tower import Patches, Tower


def layout(
    config: Any, inputs: Mapping[str, Any], runs: Sequence[Sequence[Run]]
) -> list[Places] | None:
    """A grid of squares with the token after each row as its last column; the ends are nowhere."""
    edge, images = config.vision_config.spatial_merge_size, []
    for _, rows, columns in told(inputs, "image_grid_thw"):
        own = raster(0, rows // edge, columns // edge + 1)
        images.append(torch.cat([nowhere(1), own, nowhere(1)]))
    return in_order(images, [], runs)


def patches(model: Any, named: Mapping[str, Any], index: Tensor) -> Patches:
    """Squares of each image; what stands around them is no patch."""
    edge, parts = model.config.vision_config.spatial_merge_size, []
    for grid in grids(index, times_rows_columns(named)[:, 1:]):
        rows = squares(grid, edge).view(len(grid) // edge, -1, edge**2)
        own = pad(rows, (0, 0, 0, 1), value=-1).flatten(0, 1)
        parts.append(pad(own, (0, 0, 1, 1), value=-1))
    return Patches(torch.cat(parts))


_TOWER = Tower("vision_tower", patches, frames=frames, form=captured)
register_adapter("hunyuan_vl", Adapter(layout=layout, framing="whole", newlines=(0,), tower=_TOWER))
