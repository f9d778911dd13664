"""LLaVA-OneVision: a mosaic of tiles that is shrunk when it is large, and frames always.

Shape suffixes: N tiles, P patches of one, T visual tokens.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from tokenprune.families.adapter import Adapter, Places, Run, register_adapter
from tokenprune.families.llava import selected
from tokenprune.families.llava_next import mosaic
from tokenprune.families.places import (
    nowhere,
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
    """The whole image, then its shrunk mosaic with a newline after each row; a video's frames.

    The newline after an image that is whole, or after a video, is of no row.
    """
    side = patches_across(config)
    sizes = told(inputs, "image_sizes") if side else []
    images = []
    for size, alone in zip(sizes, _alone(inputs, len(sizes)), strict=False):  # as the model does
        if alone:
            rows, columns = _shrunk(config, *mosaic(config, size, side))
            images.append(of_shapes([(side, side), (rows, columns + 1)]))
        else:
            images.append(torch.cat([of_shapes([(side, side)]), nowhere(1)]))
    half = -(-side // 2)

    def frames(run: Run) -> list[Places]:
        return [torch.cat([own, nowhere(1)]) for own in tiles(Run(run.length - 1), half)]

    return with_videos(images, frames, runs)


def _shrunk(config: Any, rows: int, columns: int) -> tuple[int, int]:
    """Rows and columns of a mosaic that is no larger than a number of tiles."""
    most = int(config.vision_aspect_ratio.removeprefix("anyres_max_"))
    ratio = math.sqrt(rows * columns / (most * patches_across(config) ** 2))
    return (int(rows // ratio), int(columns // ratio)) if ratio > 1.1 else (rows, columns)


def _alone(named: Mapping[str, Any], num_images: int) -> list[bool]:
    """Whether each image is its prompt's only one: others stay whole."""
    of_rows = named.get("batch_num_images")
    if of_rows is None:
        return [True] * num_images
    return [count == 1 for count in of_rows for _ in range(int(count))]


def patches(model: Any, named: Mapping[str, Any], index: Tensor) -> Patches:
    """The model's own packing, of places instead of features.

    Bilinear interpolation gives of places the place from which it takes a token: between four
    patches at most.
    """
    own = selected(model, named, index)
    if named.get("pixel_values_videos") is not None:
        return _of_videos(model, own, len(named["pixel_values_videos"]))
    split = torch.split(own, _tiles_of_images(model, named))
    sizes = named["image_sizes"]
    parts = [_of_image(model, named, *one) for one in zip(split, sizes, strict=True)]
    return _joined(parts)


def _tiles_of_images(model: Any, named: Mapping[str, Any]) -> list[int]:
    """How many tiles each image is cut into; several images of a prompt stay whole."""
    module, config = sys.modules[type(model).__module__], model.config
    sizes = named["image_sizes"]
    edge = config.vision_config.image_size
    return [
        module.image_size_to_num_patches(size, config.image_grid_pinpoints, edge) if one else 1
        for size, one in zip(sizes, _alone(named, len(sizes)), strict=True)
    ]


def _of_image(model: Any, named: Mapping[str, Any], tiles: Tensor, size: Tensor) -> Patches:
    """Of one image's tiles (N, P): the whole image, its mosaic, newlines."""
    base = Patches(tiles[0][:, None])
    if len(tiles) == 1:
        return _joined([base, _NEWLINE])
    module, config = sys.modules[type(model).__module__], model.config
    edge = config.vision_config.image_size
    tall, wide = module.get_anyres_image_grid_shape(size, config.image_grid_pinpoints, edge)
    side = edge // config.vision_config.patch_size
    table = tiles[1:].view(tall, wide, side, side).transpose(1, 2).reshape(tall * side, -1)
    spots = _spots(*table.shape).view(tall, side, wide, side, 2).transpose(1, 2)
    spots = torch.cat([spots.new_zeros(1, side * side, 2), spots.reshape(-1, side * side, 2)])
    aspect = named.get("vision_aspect_ratio")
    (packed,), _ = model.pack_image_features(
        [spots],
        [size],
        image_newline=torch.full((2,), -1.0),
        vision_aspect_ratio=config.vision_aspect_ratio if aspect is None else aspect,
    )
    return _joined([base, _between(packed[side * side :], table)])


def _of_videos(model: Any, own: Tensor, num_videos: int) -> Patches:
    """Of the frames of all videos (N, P): each shrunk, and a newline after the last of a video."""
    side = model.config.vision_config.image_size // model.config.vision_config.patch_size
    shrunk = model.apply_pooling(_spots(side, side).view(1, -1, 2))[0]
    parts = []
    for frames in own.view(num_videos, -1, side, side):
        parts += [*(_between(shrunk, frame) for frame in frames), _NEWLINE]
    return _joined(parts)


def _spots(rows: int, columns: int) -> Tensor:
    """Row and column of each patch, float64 (rows, columns, 2)."""
    order = torch.arange(rows).double(), torch.arange(columns).double()
    return torch.stack(torch.meshgrid(*order, indexing="ij"), -1)


def _between(spots: Tensor, table: Tensor) -> Patches:
    """The four patches around each spot (T, 2) of a table of numbers, and their shares."""
    is_patch = spots[:, 0] >= 0
    low = spots.clamp_min(0).floor()
    # What interpolation rounds is a hair off.
    part = (spots - low).clamp(0, 1).where((spots - spots.round()).abs() > 1e-6, 0)
    low = low.where((spots - spots.round()).abs() > 1e-6, spots.clamp_min(0).round())
    index, shares = [], []
    for down, right in ((0, 0), (0, 1), (1, 0), (1, 1)):
        row = (low[:, 0] + down).clamp_max(table.shape[0] - 1).long()
        column = (low[:, 1] + right).clamp_max(table.shape[1] - 1).long()
        share = (part if down else 1 - part)[:, 0] * (part if right else 1 - part)[:, 1]
        index.append(table[row, column].where(is_patch & (share > 0), -1))
        shares.append(share)
    return Patches(torch.stack(index, 1), torch.stack(shares, 1).float())


#: A token that is no patch.
_NEWLINE = Patches(torch.full((1, 1), -1))


def _joined(parts: list[Patches]) -> Patches:
    """One after another, with four patches a token."""
    width = max(part.index.shape[1] for part in parts)
    index, shares = [], []
    for part in parts:
        missing = (0, width - part.index.shape[1])
        own = torch.ones(part.index.shape) if part.shares is None else part.shares
        index.append(torch.nn.functional.pad(part.index, missing, value=-1))
        shares.append(torch.nn.functional.pad(own, missing))
    return Patches(torch.cat(index), torch.cat(shares))


register_adapter("llava_onevision", Adapter(layout=layout, tower=Tower("vision_tower", patches)))
