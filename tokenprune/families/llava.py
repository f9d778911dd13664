"""LLaVA 1.5 and its kin: one square grid an image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from tokenprune.families.adapter import Adapter, Places, register_adapter
from tokenprune.families.places import raster


def layout(
    config: Any, inputs: Mapping[str, Any], num_visual: Sequence[int]
) -> list[Places] | None:
    """One raster of patches after another; None where the count is not a multiple of theirs."""
    vision = config.vision_config
    if not isinstance(getattr(vision, "image_size", None), int):
        return None
    side = vision.image_size // vision.patch_size
    rows = []
    for count in num_visual:
        images, rest = divmod(count, side * side)
        if rest:
            return None
        grids = [raster(image, 0, side, side) for image in range(images)]
        rows.append(torch.cat(grids) if grids else torch.empty(0, 4, dtype=torch.int64))
    return rows


for _model_type in ("llava", "vipllava", "deepseek_vl", "deepseek_vl_hybrid", "janus"):
    register_adapter(_model_type, Adapter(layout=layout))
