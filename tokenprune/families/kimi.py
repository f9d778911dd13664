"""Kimi K2.5: squares become tokens, those of all frames of a video together; so do they attend."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from tokenprune.families.adapter import Adapter, Places, Run, register_adapter
from tokenprune.families.attending import captured
from tokenprune.families.patches import grids, of_sizes, times_rows_columns
from tokenprune.families.places import in_order, of_shapes, told
from tokenprune.families.tower import Patches, Tower


def layout(
    config: Any, inputs: Mapping[str, Any], runs: Sequence[Sequence[Run]]
) -> list[Places] | None:
    """One grid of squares an image, or a video."""
    tall, wide = config.vision_config.merge_kernel_size
    images, videos = (
        [
            of_shapes([(rows // tall, columns // wide)])
            for _, rows, columns in told(inputs, f"{kind}_grid_thw")
        ]
        for kind in ("image", "video")
    )
    return in_order(images, videos, runs)


def videos(model: Any, named: Mapping[str, Any]) -> Tensor:
    """The image or video of each patch."""
    return of_sizes(times_rows_columns(named).prod(1))


def patches(model: Any, named: Mapping[str, Any], index: Tensor) -> Patches:
    """The same square in all frames."""
    (tall, wide), parts = model.vision_tower.merge_kernel_size, []
    for grid in grids(index, times_rows_columns(named)):
        of_frames = grid.unfold(1, tall, tall).unfold(2, wide, wide)  # (t, h, w, tall, wide)
        parts.append(of_frames.permute(1, 2, 0, 3, 4).flatten(2).flatten(0, 1))
    most = max(part.shape[1] for part in parts)
    return Patches(torch.cat([pad(part, (0, most - part.shape[1]), value=-1) for part in parts]))


_TOWER = Tower("vision_tower", patches, "attn", frames=videos, form=captured)
register_adapter("kimi_k25", Adapter(layout=layout, tower=_TOWER))
