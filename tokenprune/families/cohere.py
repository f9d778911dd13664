"""Aya Vision and Command A Vision: a pixel shuffle folds neighbouring patches into one token."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from tokenprune.families.adapter import Adapter, register_adapter
from tokenprune.families.llava import selected
from tokenprune.families.tower import Patches, Tower


def patches(model: Any, named: Mapping[str, Any], index: Tensor) -> Patches:
    """The projector's own pixel shuffle, of numbers instead of features."""
    return Patches(model.multi_modal_projector.pixel_shuffle(index[..., None]).flatten(0, 2))


def selected_patches(model: Any, named: Mapping[str, Any], index: Tensor) -> Patches:
    """The same of what a config selects."""
    return patches(model, named, selected(model, named, index))


register_adapter("aya_vision", Adapter(tower=Tower("vision_tower", selected_patches)))
register_adapter("cohere2_vision", Adapter(tower=Tower("vision_tower", patches)))
