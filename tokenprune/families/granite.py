"""Granite Docling: a pixel shuffle folds neighbouring patches of a tile into one token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from tokenprune.families.adapter import Adapter, Places, Run, register_adapter
from tokenprune.families.places import by_runs, patches_across, tiles
from tokenprune.families.tower import Patches, Tower


def layout(
    config: Any, inputs: Mapping[str, Any], runs: Sequence[Sequence[Run]]
) -> list[Places] | None:
    """Square tiles; where some may be finer, each is a run, and its length says if it is."""
    vision = config.vision_config
    coarse = patches_across(config) // vision.scale_factor

    def fine_or_coarse(run: Run) -> list[Places]:
        if not vision.use_fine_route:
            return tiles(run, coarse)
        sides = {
            side**2: side for side in (coarse, patches_across(config) // (vision.scale_factor // 2))
        }
        return tiles(run, sides[run.length]) if run.length in sides else []

    return by_runs(runs, fine_or_coarse)


def patches(model: Any, named: Mapping[str, Any], index: Tensor) -> Patches:
    """The connector's own pixel shuffle, of numbers instead of features; fewer if it is fine."""
    connector = model.vision_model.connector
    path = connector.coarse if named.get("tile_fine_mask") is None else connector.fine
    shuffled = path.pixel_shuffle(index[..., None], path.scale_factor)
    return Patches(shuffled.flatten(0, 1))


_TOWER = Tower("vision_model", patches)
register_adapter("granite_docling", Adapter(layout=layout, tower=_TOWER))
