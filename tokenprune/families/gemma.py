"""Gemma: a token is a patch or a square of them. Gemma 4: layers are given embeddings of each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from tokenprune.families.adapter import Adapter, register_adapter
from tokenprune.families.attending import captured
from tokenprune.families.llava import all_patches
from tokenprune.families.patches import runs, squares
from tokenprune.families.tower import Patches, Tower


def patches(model: Any, named: Mapping[str, Any], index: Tensor) -> Patches:
    """Squares as large as the projector's average pooling."""
    edge = model.multi_modal_projector.kernel_size
    side = model.multi_modal_projector.patches_per_image
    return Patches(squares(index.view(-1, side, side), edge))


def placed_patches(model: Any, named: Mapping[str, Any], index: Tensor) -> Patches:
    """Squares of patches whose places (column, row) the processor says; pads are of no token."""
    kind = "image" if "image_position_ids" in named else "video"
    places, edge = (
        named[f"{kind}_position_ids"].cpu(),
        model.config.vision_config.pooling_kernel_size,
    )
    is_pad = (places < 0).all(2)
    per_row = places[..., 0].amax(1, keepdim=True) // edge + 1
    square = places[..., 0] // edge + per_row * (places[..., 1] // edge)
    order = square.masked_fill(is_pad, places.numel()).argsort(dim=1, stable=True)
    exists = torch.arange(index.shape[1]) < (~is_pad).sum(1, keepdim=True)
    return Patches(runs(index.gather(1, order)[exists], edge))


SQUARES = Tower("vision_tower", patches)
register_adapter("gemma3", Adapter(tower=SQUARES))
register_adapter("shieldgemma2", Adapter(tower=SQUARES))
register_adapter(
    "paligemma",
    Adapter(tower=Tower("vision_tower", all_patches, projector="multi_modal_projector")),
)
register_adapter(
    "gemma4",
    Adapter(
        token_arguments={"per_layer_input": 1},
        tower=Tower("vision_tower", placed_patches, form=captured),
    ),
)
