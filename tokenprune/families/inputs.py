"""What a call shows of its images.

Shape suffixes: B batch rows, T sequence positions.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


def without_late_features(
    inputs: Mapping[str, Any], first: int
) -> tuple[dict[str, Any], Tensor | None, dict[int, Tensor]]:
    """A decoder's arguments without the visual features that it would add after layer `first` runs.

    Those of a list are added after the first layers, those of a dict before the layers it names.

    Args:
        inputs: The arguments.
        first: A layer before which features may still be added; -1 for none.

    Returns:
        The rest of the arguments; bool (B, T), the columns whose features these are; the features,
        (M, D) of all such columns of all rows, by the layer that they enter.
    """
    left = dict(inputs)
    marked, late = None, {}
    if (listed := left.get("deepstack_visual_embeds")) is not None:
        kept = max(first, 0)
        late = {layer + 1: listed[layer] for layer in range(kept, len(listed))}
        marked = left["visual_pos_masks"]
        left["deepstack_visual_embeds"] = listed[:kept]
    if (named := left.get("deepstack_features")) is not None:
        late = {layer: features for layer, features in named.items() if layer > first}
        marked = left["vision_mask"].squeeze(-1)
        left["deepstack_features"] = {k: v for k, v in named.items() if k <= first}
    return left, marked, late


def takes_late_features(names: Collection[str]) -> bool:
    """Whether a decoder, by the names of its arguments, adds visual features between its layers."""
    return not {"deepstack_visual_embeds", "deepstack_features"}.isdisjoint(names)


def shows_images(inputs: Mapping[str, Any]) -> bool:
    """Whether a call brings images along, as pixels or encoded ahead."""
    return any("pixel" in key for key in inputs) or bool(inputs.get("mm_encoder_outputs"))


#: What says something of each token: no layout reads it, no trace keeps it alive, and calls that
#: differ in it are of one kind where prefills are captured.
_OF_TOKENS = {
    *("input_ids", "labels", "shift_labels", "position_ids", "cache_position"),
    *("token_type_ids", "mm_token_type_ids", "moe_mm_token_type_ids"),
    *("attention_mask", "visual_mask", "visual_pos_masks", "vision_mask"),
}


def facts(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """What a `Layout` may know of a call: its integer tensors, but for tokens and pixels.

    Of places (column, row) of all patches, those of each image's last: the others are a table.
    """
    known: dict[str, Any] = {
        key: value
        for key, value in inputs.items()
        if isinstance(value, Tensor)
        and not value.is_floating_point()
        and key not in _OF_TOKENS
        and "pixel" not in key
    }
    for kind in ("image", "video"):
        if (table := known.pop(f"{kind}_position_ids", None)) is not None:
            known[f"last_{kind}_patches"] = table.flatten(0, -3).amax(1)
    return known


def mark_visual(visual_ids: Sequence[int], input_ids: Tensor) -> Tensor:
    """Bool (B, T): positions whose id is one of `visual_ids`."""
    mask = torch.zeros_like(input_ids, dtype=torch.bool)
    for visual_id in visual_ids:
        mask |= input_ids == visual_id
    return mask
