"""Granite Docling: a pixel shuffle folds neighbouring patches of a tile into one token."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from tokenprune.families.adapter import Adapter, register_adapter
from tokenprune.families.tower import Patches, Tower


def patches(model: Any, named: Mapping[str, Any], index: Tensor) -> Patches:
    """The connector's own pixel shuffle, of numbers instead of features; fewer if it is fine."""
    connector = model.vision_model.connector
    path = connector.coarse if named.get("tile_fine_mask") is None else connector.fine
    shuffled = path.pixel_shuffle(index[..., None], path.scale_factor)
    return Patches(shuffled.flatten(0, 1))


register_adapter("granite_docling", Adapter(tower=Tower("vision_model", patches)))
