"""Ovis 2: squares of patches become tokens; edges are filled up with what is no patch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from tokenprune.families.adapter import Adapter, register_adapter
from tokenprune.families.patches import squares
from tokenprune.families.places import by_squares, patches_across
from tokenprune.families.tower import Patches, Tower


def patches(model: Any, named: Mapping[str, Any], index: Tensor) -> Patches:
    """Squares of each tile."""
    edge = model.config.vision_config.hidden_stride
    side = int(index.shape[1] ** 0.5)
    missing = -side % edge
    tiles = index.view(-1, side, side)
    return Patches(
        squares(torch.nn.functional.pad(tiles, (0, missing, 0, missing), value=-1), edge)
    )


_LAYOUT = by_squares(
    lambda config: -(-patches_across(config) // config.vision_config.hidden_stride)
)
_TOWER = Tower("vision_tower", patches, "attention")
register_adapter("ovis2", Adapter(layout=_LAYOUT, tower=_TOWER))
