"""InternVL and Qianfan-OCR: a pixel shuffle folds neighbouring patches of a tile into one token."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from tokenprune.families.adapter import Adapter, register_adapter
from tokenprune.families.llava import selected
from tokenprune.families.places import by_squares, patches_across
from tokenprune.families.tower import Patches, Tower


def patches(model: Any, named: Mapping[str, Any], index: Tensor) -> Patches:
    """The model's own pixel shuffle, of numbers instead of features."""
    own = selected(model, named, index)
    side = int(own.shape[1] ** 0.5)
    square = own.reshape(len(own), side, side, 1)
    shuffled = model.pixel_shuffle(square, scale_factor=model.config.downsample_ratio)
    return Patches(shuffled.flatten(0, 2))


_TOWER = Tower("vision_tower", patches, attention="attention", queries="q_norm", keys="k_norm")
_LAYOUT = by_squares(lambda config: int(patches_across(config) * config.downsample_ratio))
for _model_type in ("internvl", "qianfan_ocr"):
    register_adapter(_model_type, Adapter(layout=_LAYOUT, tower=_TOWER))
