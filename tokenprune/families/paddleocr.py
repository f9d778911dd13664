"""PaddleOCR-VL: squares of a raster-ordered grid become tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from tokenprune.families.adapter import Adapter, register_adapter
from tokenprune.families.attending import captured
from tokenprune.families.patches import frames, grids, squares, times_rows_columns
from tokenprune.families.places import by_times
from tokenprune.families.tower import Patches, Tower


def patches(model: Any, named: Mapping[str, Any], index: Tensor) -> Patches:
    """Squares of each frame."""
    edge = model.config.vision_config.spatial_merge_size
    own = grids(index, times_rows_columns(named))
    return Patches(torch.cat([squares(grid, edge) for grid in own]))


_TOWER = Tower("visual", patches, frames=frames, form=captured)
_LAYOUT = by_times(lambda config: config.vision_config.spatial_merge_size)
register_adapter("paddleocr_vl", Adapter(layout=_LAYOUT, framing="whole", tower=_TOWER))
