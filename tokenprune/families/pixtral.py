"""Mistral 3 and others with Pixtral's tower: all images in one sequence, squares become tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from tokenprune.families.adapter import Adapter, Places, Run, register_adapter
from tokenprune.families.attending import captured
from tokenprune.families.patches import grids, of_sizes, squares
from tokenprune.families.places import in_order, of_shapes, told
from tokenprune.families.tower import Patches, Tower


def by_sizes(
    config: Any, inputs: Mapping[str, Any], runs: Sequence[Sequence[Run]], edge: int
) -> list[Places] | None:
    """Squares of `edge` x `edge` patches of each image, whatever stands between its rows."""
    patch = config.vision_config.patch_size
    images = [
        of_shapes([(rows // patch // edge, columns // patch // edge)])
        for rows, columns in told(inputs, "image_sizes")
    ]
    return in_order(images, [], runs)


def layout(
    config: Any, inputs: Mapping[str, Any], runs: Sequence[Sequence[Run]]
) -> list[Places] | None:
    """As large as the squares that become tokens."""
    return by_sizes(config, inputs, runs, config.spatial_merge_size)


def sizes(model: Any, named: Mapping[str, Any]) -> Tensor:
    """Rows and columns of patches of each image, int64 (images, 2)."""
    edge: int = model.config.vision_config.patch_size
    return torch.as_tensor(named["image_sizes"]).cpu() // edge


def frames(model: Any, named: Mapping[str, Any]) -> Tensor:
    """The image of each patch."""
    return of_sizes(sizes(model, named).prod(1))


def patches(model: Any, named: Mapping[str, Any], index: Tensor) -> Patches:
    """Squares of each image's patches."""
    own = grids(index, sizes(model, named))
    return Patches(torch.cat([squares(grid, model.config.spatial_merge_size) for grid in own]))


for _model_type, _path in (("mistral3", "vision_tower"), ("lighton_ocr", "vision_encoder")):
    _tower = Tower(_path, patches, "attention", frames=frames, form=captured)
    register_adapter(_model_type, Adapter(layout=layout, framing="whole", tower=_tower))
