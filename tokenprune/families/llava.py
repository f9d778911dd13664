"""LLaVA 1.5 and its kin: one square grid an image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from tokenprune.families.adapter import Adapter, Places, register_adapter
from tokenprune.families.places import raster
from tokenprune.families.tower import Patches, Tower


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


def patches(model: Any, named: Mapping[str, Any], index: Tensor) -> Patches:
    """A token a patch."""
    return Patches(selected(model, named, index).reshape(-1, 1))


def selected(model: Any, named: Mapping[str, Any], index: Tensor) -> Tensor:
    """What of each tile's positions (N, L) becomes tokens.

    `"default"` drops the tower's first position, be it a class token or not; `"full"` drops none.
    """
    given = named.get("vision_feature_select_strategy")
    strategy = model.config.vision_feature_select_strategy if given is None else given
    return index[:, 1:] if strategy == "default" else index


TOWER = Tower("vision_tower", patches, projector="multi_modal_projector")

register_adapter("llava", Adapter(layout=layout, tower=TOWER))
for _model_type in ("vipllava", "deepseek_vl", "deepseek_vl_hybrid", "janus"):
    register_adapter(_model_type, Adapter(layout=layout))
