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

from tokenprune.families.adapter import Adapter, Places, register_adapter
from tokenprune.families.llava import selected
from tokenprune.families.patches import squares
from tokenprune.families.places import number_images, raster
from tokenprune.families.tower import Patches, Tower


def layout(
    config: Any, inputs: Mapping[str, Any], num_visual: Sequence[int]
) -> list[Places] | None:
    """Base grid first, then the unpadded mosaic of tiles with a newline token per row.

    The mosaic's size follows Liu et al., 2024 (LLaVA-NeXT, "spatial_unpad").
    """
    from transformers.image_processing_utils import select_best_resolution

    tile = config.vision_config.image_size
    side = tile // config.vision_config.patch_size
    images: list[list[Places]] = []

    def add(rows: int, columns: int) -> None:
        images.append([raster(0, 0, side, side), raster(0, 1, rows, columns + 1)])

    if inputs.get("image_sizes") is not None:
        for height, width in inputs["image_sizes"].tolist():
            tall, wide = select_best_resolution((height, width), config.image_grid_pinpoints)
            rows, columns = side * (tall // tile), side * (wide // tile)
            if width / height > columns / rows:
                rows -= 2 * ((rows - int(round(height * columns / width, 7))) // 2)
            else:
                columns -= 2 * ((columns - int(round(width * rows / height, 7))) // 2)
            add(rows, columns)
    else:
        for length in inputs.get("image_lengths", ()):
            fitting = _mosaics_of_length(config, length - side * side)
            if len(fitting) == 1:
                add(*fitting.pop())
            else:
                images.append([torch.full((length, 4), -1)])  # two shapes of that length
    return number_images(images, num_visual)


def _mosaics_of_length(config: Any, length: int) -> set[tuple[int, int]]:
    """Unpadded mosaics (rows, columns) with that many tokens, newlines included; mostly one.

    `generate` in transformers 5.23 encodes images ahead of the call, which then shows no sizes.
    """
    patch, fitting = config.vision_config.patch_size, set()
    for tall, wide in config.image_grid_pinpoints:
        rows, columns = tall // patch, wide // patch
        fitting |= {(rows, c) for c in range(columns, 0, -2) if rows * (c + 1) == length}
        fitting |= {(r, columns) for r in range(rows, 0, -2) if r * (columns + 1) == length}
    return fitting


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

register_adapter("llava_next", Adapter(layout=layout, tower=TOWER))
register_adapter("llava_next_video", Adapter(tower=replace(TOWER, patches=patches_or_frames)))
