"""Gemma 3: a token is a square of patches. Gemma 4: every layer is given an embedding of each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from tokenprune.families.adapter import Adapter, register_adapter
from tokenprune.families.tower import Patches, Tower


def patches(model: Any, named: Mapping[str, Any], index: Tensor) -> Patches:
    """Squares as large as the projector's average pooling."""
    edge = model.multi_modal_projector.kernel_size
    side = model.multi_modal_projector.patches_per_image
    squares = index.view(-1, side, side).unfold(1, edge, edge).unfold(2, edge, edge)
    return Patches(squares.reshape(-1, edge * edge))


register_adapter("gemma3", Adapter(tower=Tower("vision_tower", patches)))
register_adapter("gemma4", Adapter(token_arguments={"per_layer_input": 1}))
