"""Qwen-VL: the processor hands patches over in runs of those that are merged into one token."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from tokenprune.families.adapter import Adapter, register_adapter
from tokenprune.families.tower import Patches, Tower


def patches(model: Any, named: Mapping[str, Any], index: Tensor) -> Patches:
    """Runs of patches."""
    return Patches(index.view(-1, model.visual.spatial_merge_size**2))


def windowed_patches(model: Any, named: Mapping[str, Any], index: Tensor) -> Patches:
    """Runs of patches, which the tower sorts by window, and its features back again."""
    visual = model.visual
    find = getattr(visual, "get_window_index", None)  # a method up to transformers 5.17
    if find is not None:
        order, _ = find(_grid(named))
    else:
        order, _ = sys.modules[type(visual).__module__].get_vision_window_index(
            _grid(named),
            spatial_merge_size=visual.spatial_merge_size,
            window_size=visual.window_size,
            patch_size=visual.patch_size,
        )
    runs = patches(model, named, index).index
    return Patches(runs[torch.as_tensor(order).cpu().argsort()])


def frames(named: Mapping[str, Any]) -> Tensor:
    """The frame of each patch; the order of windows does not cross frames."""
    time, height, width = _grid(named).cpu().T
    sizes = (height * width).repeat_interleave(time)
    return torch.arange(len(sizes)).repeat_interleave(sizes)


def _grid(named: Mapping[str, Any]) -> Tensor:
    grid: Tensor = named["image_grid_thw" if "image_grid_thw" in named else "video_grid_thw"]
    return grid


ORDINARY = Tower("visual", patches, "attn", "qkv", "qkv", frames)
WINDOWED = replace(ORDINARY, patches=windowed_patches)

for _model_type in ("qwen2_vl", "qwen3_vl", "qwen3_vl_moe"):
    register_adapter(_model_type, Adapter(tower=ORDINARY))
register_adapter("qwen2_5_vl", Adapter(tower=WINDOWED))
