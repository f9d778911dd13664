"""LLaVA-NeXT: the whole image, then the unpadded mosaic of its tiles, with newline tokens.

LLaVA-NeXT-Video shrinks the frames of videos besides.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from tokenprune.families.adapter import Adapter, Places, Run, register_adapter
from tokenprune.families.llava import selected
from tokenprune.families.patches import squares
from tokenprune.families.places import (
    in_order,
    of_shapes,
    patches_across,
    tiles,
    told,
    with_videos,
)
from tokenprune.families.tower import Patches, Tower


def layout(
    config: Any, inputs: Mapping[str, Any], runs: Sequence[Sequence[Run]]
) -> list[Places] | None:
    """Base grid first, then the unpadded mosaic of tiles with a newline token per row."""
    return in_order(_images(config, inputs), [], runs)


def images_or_frames(
    config: Any, inputs: Mapping[str, Any], runs: Sequence[Sequence[Run]]
) -> list[Places] | None:
    """The same of images; a run of a video is frames, each a shrunk square."""
    side = patches_across(config) // config.spatial_pool_stride
    return with_videos(_images(config, inputs), lambda run: tiles(run, side), runs)


def _images(config: Any, inputs: Mapping[str, Any]) -> list[Places]:
    side = patches_across(config)
    return bases_and_mosaics(config, inputs, side)


def bases_and_mosaics(config: Any, inputs: Mapping[str, Any], side: int) -> list[Places]:
    """Of each image the whole, then its mosaic, of tiles that are so many tokens high and wide."""
    sizes = told(inputs, "image_sizes") if side else []
    mosaics = [mosaic(config, size, side) for size in sizes]
    return [of_shapes([(side, side), (rows, columns + 1)]) for rows, columns in mosaics]


def mosaic(config: Any, size: Sequence[int], side: int) -> tuple[int, int]:
    """Rows and columns of an image's unpadded mosaic (Liu et al., 2024, "spatial_unpad")."""
    from transformers.image_processing_utils import select_best_resolution

    height, width = size
    edge = config.vision_config.image_size
    tall, wide = select_best_resolution((height, width), config.image_grid_pinpoints)
    rows, columns = side * (tall // edge), side * (wide // edge)
    if width / height > columns / rows:
        rows -= 2 * ((rows - int(round(height * (columns / width), 7))) // 2)
    else:
        columns -= 2 * ((columns - int(round(width * (rows / height), 7))) // 2)
    return rows, columns


def patches(model: Any, named: Mapping[str, Any], index: Tensor) -> Patches:
    """The model's own packing, of numbers instead of features; newlines are no patches."""
    module = sys.modules[type(model).__module__]
    config, sizes = model.config, named["image_sizes"]
    edge = config.vision_config.image_size
    counts = [
        module.image_size_to_num_patches(size, config.image_grid_pinpoints, edge) for size in sizes
    ]
    strategy = named.get("vision_feature_select_strategy")
    packed, _ = model.pack_image_features(
        torch.split(selected(model, named, index)[..., None], counts),
        sizes,
        vision_feature_select_strategy=strategy or config.vision_feature_select_strategy,
        image_newline=torch.tensor([-1]),
    )
    return Patches(torch.cat(packed))


def patches_or_frames(model: Any, named: Mapping[str, Any], index: Tensor) -> Patches:
    """As above; of videos, squares of each frame."""
    if named.get("pixel_values_videos") is None:
        return patches(model, named, index)
    own, edge = selected(model, named, index), model.config.spatial_pool_stride
    side = int(own.shape[1] ** 0.5)
    return Patches(squares(own.view(-1, side, side), edge))


TOWER = Tower("vision_tower", patches, projector="multi_modal_projector")

#: Of the mosaic.
NEWLINES = (1,)
register_adapter(
    "llava_next", Adapter(layout=layout, framing="whole", newlines=NEWLINES, tower=TOWER)
)
register_adapter(
    "llava_next_video",
    Adapter(
        layout=images_or_frames,
        framing="whole",
        newlines=NEWLINES,
        tower=replace(TOWER, patches=patches_or_frames),
    ),
)
