"""Pictures of a run's kept tokens, for its loggers."""

from __future__ import annotations

import json
from pathlib import Path

from PIL import Image

from tokenprune.report import pictures
from tokenprune.runs import results


def kept_pictures(folder: Path) -> dict[str, Image.Image]:
    """What each pictured question kept, stage by stage, by its id; few of them, and small.

    Args:
        folder: Of a complete run.

    Returns:
        Nothing for questions whose tokens' places in the image are unknown.
    """
    found = {}
    for entry in json.loads((folder / results.KEPT).read_text(encoding="utf-8")):
        if not entry["grids"] or not entry["stages"]:
            continue
        with Image.open(folder / entry["image"]) as image:
            found[str(entry["id"])] = pictures.stages(image, **pictures.drawing(entry))
    return found
