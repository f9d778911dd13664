"""Gemma: a token is a patch or a square of them. Gemma 4: layers are given embeddings of each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import islice
from math import isqrt
from typing import Any

import torch
from torch import Tensor

from tokenprune.families.adapter import Adapter, Places, Run, register_adapter
from tokenprune.families.attending import captured
from tokenprune.families.llava import all_patches
from tokenprune.families.llava import layout as apart
from tokenprune.families.patches import runs, squares
from tokenprune.families.places import by_squares, in_order, of_shapes, told
from tokenprune.families.tower import Patches, Tower


def of_patches(
    config: Any, inputs: Mapping[str, Any], runs: Sequence[Sequence[Run]]
) -> list[Places] | None:
    """A token a patch, of images and frames as large as the place of their last patch says."""
    return _of_last(inputs, 1, runs)


def of_squares(
    config: Any, inputs: Mapping[str, Any], runs: Sequence[Sequence[Run]]
) -> list[Places] | None:
    """The same of squares of patches."""
    return _of_last(inputs, config.vision_config.pooling_kernel_size, runs)


def _of_last(
    inputs: Mapping[str, Any], edge: int, runs: Sequence[Sequence[Run]]
) -> list[Places] | None:
    images, frames = (
        [(row // edge + 1, column // edge + 1) for column, row in told(inputs, name)]
        for name in ("last_image_patches", "last_video_patches")
    )
    rest = iter(frames)
    videos = [of_shapes(islice(rest, count)) for count in told(inputs, "num_frames_per_video")]
    return in_order([of_shapes([shape]) for shape in images], videos, runs)


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
_LAYOUT = by_squares(lambda config: isqrt(config.mm_tokens_per_image))
for _model_type in ("gemma3", "shieldgemma2"):
    register_adapter(_model_type, Adapter(layout=_LAYOUT, framing="whole", tower=SQUARES))
_TOWER = Tower("vision_tower", all_patches, projector="multi_modal_projector")
register_adapter("paligemma", Adapter(layout=apart, framing="whole", tower=_TOWER))
register_adapter(
    "gemma4",
    Adapter(
        layout=of_squares,
        framing="whole",
        token_arguments={"per_layer_input": 1},
        tower=Tower("vision_tower", placed_patches, form=captured),
    ),
)
_REASON = "it projects pixels to tokens, and has no vision transformer"
register_adapter("gemma4_unified", Adapter(layout=of_patches, framing="whole", unread=_REASON))
