"""Idefics 3 and SmolVLM: a pixel shuffle folds neighbouring patches of a tile into one token."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from tokenprune.families.adapter import Adapter, register_adapter
from tokenprune.families.places import by_squares, patches_across
from tokenprune.families.tower import Patches, Tower


def patches(model: Any, named: Mapping[str, Any], index: Tensor) -> Patches:
    """The model's own pixel shuffle, of numbers instead of features."""
    connector = model.connector
    shuffled = connector.pixel_shuffle(index[..., None], connector.scale_factor)
    return Patches(shuffled.flatten(0, 1))


_LAYOUT = by_squares(lambda config: patches_across(config) // config.scale_factor)
for _model_type in ("idefics3", "smolvlm"):
    register_adapter(_model_type, Adapter(layout=_LAYOUT, tower=Tower("vision_model", patches)))
