"""Llama 4: its `get_decoder()` is a head around the decoder; its tower's class token comes last."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from tokenprune.families.adapter import Adapter, register_adapter
from tokenprune.families.attending import captured
from tokenprune.families.places import by_squares, patches_across
from tokenprune.families.tower import Patches, Tower


def patches(model: Any, named: Mapping[str, Any], index: Tensor) -> Patches:
    """The model's own pixel shuffle, of numbers instead of features."""
    shuffle = sys.modules[type(model).__module__].pixel_shuffle
    shuffled = shuffle(index[:, :-1, None], model.config.vision_config.pixel_shuffle_ratio)
    return Patches(shuffled.flatten(0, 1))


_TOWER = Tower("vision_model", patches, form=captured, class_last=True)
_LAYOUT = by_squares(
    lambda config: int(patches_across(config) * config.vision_config.pixel_shuffle_ratio)
)
register_adapter("llama4", Adapter(layout=_LAYOUT, decoder="language_model.model", tower=_TOWER))
