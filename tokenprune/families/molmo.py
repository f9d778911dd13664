"""Molmo 2: the processor says which patches become each token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from tokenprune.families.adapter import Adapter, Places, Run, register_adapter
from tokenprune.families.attending import captured
from tokenprune.families.places import in_order, of_shapes, of_times, told
from tokenprune.families.tower import Patches, Tower


def layout(
    config: Any, inputs: Mapping[str, Any], runs: Sequence[Sequence[Run]]
) -> list[Places] | None:
    """The thumbnail of an image, then its crops as one grid; the frames of a video."""
    images = [
        of_shapes([(a, b), (c, d)] if c * d else [(a, b)])
        for a, b, c, d in told(inputs, "image_grids")
    ]
    return in_order(images, of_times(told(inputs, "video_grids"), 1), runs)


def patches(model: Any, named: Mapping[str, Any], index: Tensor) -> Patches:
    """As it is given; what fills tables up becomes no token."""
    kind = "image" if "image_token_pooling" in named else "video"
    given: Tensor = named[f"{kind}_token_pooling"].cpu()
    return Patches(given[(given >= 0).any(1)])


_TOWER = Tower("vision_tower", patches, form=captured)
register_adapter("molmo2", Adapter(layout=layout, tower=_TOWER))
