"""Muse: the tower sorts patches by window and back; a pixel shuffle makes tokens of squares."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from tokenprune.families.adapter import Adapter, register_adapter
from tokenprune.families.attending import captured
from tokenprune.families.patches import frames, times_rows_columns
from tokenprune.families.places import by_times
from tokenprune.families.tower import Patches, Tower


def patches(model: Any, named: Mapping[str, Any], index: Tensor) -> Patches:
    """The tower's own pixel shuffle, of numbers that are sorted back, instead of features."""
    tower, sizes = model.vision_tower, times_rows_columns(named)
    order, _ = sys.modules[type(tower).__module__].get_vision_window_index(
        sizes,
        spatial_merge_size=tower.spatial_merge_size,
        window_size=tower.window_size,
        patch_size=tower.patch_size,
    )
    back = torch.as_tensor(order).cpu().argsort()
    return Patches(tower.pixel_shuffle(index.flatten()[back, None], sizes))


_TOWER = Tower("vision_tower", patches, "attn", frames=frames, form=captured)
_LAYOUT = by_times(lambda config: config.vision_config.merge_size)
for _model_type in ("muse_glimmer", "muse_spark"):
    register_adapter(_model_type, Adapter(layout=_LAYOUT, framing="whole", tower=_TOWER))
