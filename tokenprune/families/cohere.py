"""Aya Vision and Command A Vision: a pixel shuffle folds neighbouring patches into one token."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from tokenprune.families.adapter import Adapter, register_adapter
from tokenprune.families.llava import selected
from tokenprune.families.places import by_squares, patches_across
from tokenprune.families.tower import Patches, Tower


def patches(model: Any, named: Mapping[str, Any], index: Tensor) -> Patches:
    """The projector's own pixel shuffle, of numbers instead of features."""
    return Patches(model.multi_modal_projector.pixel_shuffle(index[..., None]).flatten(0, 2))


def selected_patches(model: Any, named: Mapping[str, Any], index: Tensor) -> Patches:
    """The same of what a config selects."""
    return patches(model, named, selected(model, named, index))


_LAYOUT = by_squares(lambda config: patches_across(config) // config.downsample_factor)
for _model_type, _patches in (("aya_vision", selected_patches), ("cohere2_vision", patches)):
    register_adapter(_model_type, Adapter(layout=_LAYOUT, tower=Tower("vision_tower", _patches)))
