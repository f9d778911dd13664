"""ERNIE 4.5 VL: its experts are told which tokens are visual; two frames of a video become one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from tokenprune.families.adapter import Adapter, Places, Run, register_adapter
from tokenprune.families.patches import frames, runs, times_rows_columns
from tokenprune.families.places import in_order, of_times, told
from tokenprune.families.tower import Patches, Tower


def layout(
    config: Any, inputs: Mapping[str, Any], runs: Sequence[Sequence[Run]]
) -> list[Places] | None:
    """A grid of squares each two frames of a video; of an odd number, the last is left out."""
    edge = config.vision_config.spatial_merge_size
    videos = [(max(1, times // 2), *size) for times, *size in told(inputs, "video_grid_thw")]
    images = told(inputs, "image_grid_thw")
    return in_order(of_times(images, edge), of_times(videos, edge), runs)


def patches(model: Any, named: Mapping[str, Any], index: Tensor) -> Patches:
    """Runs of patches, of every second frame with those of the next; an image is its own next."""
    own, sizes = runs(index, model.resampler_model.spatial_merge_size), times_rows_columns(named)
    parts = torch.split(own, (sizes.prod(1) // own.shape[1]).tolist())
    pairs = []
    for part, time in zip(parts, sizes[:, 0].tolist(), strict=True):
        of_frame = part.view(time, -1, own.shape[1])
        first, second = of_frame[::2], of_frame[int(time > 1) :: 2]
        both = min(len(first), len(second))  # of an odd number, the last frame is left out
        pairs.append(torch.cat([first[:both], second[:both]], 2).flatten(0, 1))
    return Patches(torch.cat(pairs))


_TOWER = Tower("vision_tower", patches, "attn", "qkv", "qkv", frames)
register_adapter(
    "ernie4_5_vl_moe",
    Adapter(
        layout=layout,
        framing="whole",
        token_arguments={"moe_mm_token_type_ids": 1},
        tower=_TOWER,
    ),
)
