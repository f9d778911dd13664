"""Molmo 2: the processor says which patches become each token."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from tokenprune.families.adapter import Adapter, register_adapter
from tokenprune.families.attending import captured
from tokenprune.families.tower import Patches, Tower


def patches(model: Any, named: Mapping[str, Any], index: Tensor) -> Patches:
    """As it is given; what fills tables up becomes no token."""
    kind = "image" if "image_token_pooling" in named else "video"
    given: Tensor = named[f"{kind}_token_pooling"].cpu()
    return Patches(given[(given >= 0).any(1)])


register_adapter("molmo2", Adapter(tower=Tower("vision_tower", patches, form=captured)))
