"""Qwen-VL, and others with its tower: processors give patches in runs of what becomes a token."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from tokenprune.families.adapter import Adapter, register_adapter
from tokenprune.families.attending import captured
from tokenprune.families.patches import frames, runs, times_rows_columns
from tokenprune.families.places import by_times
from tokenprune.families.tower import Patches, Tower


def patches(model: Any, named: Mapping[str, Any], index: Tensor) -> Patches:
    """Runs of patches."""
    return Patches(runs(index, model.config.vision_config.spatial_merge_size))


def windowed_patches(model: Any, named: Mapping[str, Any], index: Tensor) -> Patches:
    """Runs of patches, which the tower sorts by window, and its features back again."""
    visual = getattr(model, "visual", None) or model.vision_model
    find = getattr(visual, "get_window_index", None)  # a method up to transformers 5.17
    if find is not None:
        order, _ = find(times_rows_columns(named))
    else:
        order, _ = sys.modules[type(visual).__module__].get_vision_window_index(
            times_rows_columns(named),
            spatial_merge_size=visual.spatial_merge_size,
            window_size=visual.window_size,
            patch_size=visual.patch_size,
        )
    own = patches(model, named, index).index
    return Patches(own[torch.as_tensor(order).cpu().argsort()])


#: Windows do not cross frames, so that frames are in order where patches are sorted by window.
ORDINARY = Tower("visual", patches, "attn", "qkv", "qkv", frames)
WINDOWED = replace(ORDINARY, patches=windowed_patches)
NORMED = replace(ORDINARY, form=captured)

_TOWERS = {
    "qwen2_vl": ORDINARY,
    "qwen2_5_vl": WINDOWED,
    "qwen2_5_omni_thinker": replace(WINDOWED, queries="q", keys="k", form=captured),
    "qwen3_vl": ORDINARY,
    "qwen3_vl_moe": ORDINARY,
    "qwen3_omni_moe_thinker": ORDINARY,
    "cosmos3_omni": ORDINARY,
    "cohere_compass": ORDINARY,
    "glm4v": ORDINARY,
    "glm46v": ORDINARY,
    "glmga": ORDINARY,
    "glm4v_moe": ORDINARY,
    "glm_ocr": NORMED,
    "exaone4_5": replace(WINDOWED, form=captured),
    "hyperclovax_vision_v2": replace(WINDOWED, path="vision_model"),
    "cosmos3_edge": Tower("visual", patches, frames=frames, form=captured),
    "minimax_m3_vl": Tower("vision_tower", patches, frames=frames, form=captured),
}
_LAYOUT = by_times(lambda config: config.vision_config.spatial_merge_size)
for _model_type, _tower in _TOWERS.items():
    register_adapter(_model_type, Adapter(layout=_LAYOUT, framing="whole", tower=_tower))
