"""VideoLLaMA 3: squares of patches, in runs, are shrunk to tokens by interpolation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate, pad

from tokenprune.families.adapter import Adapter, Places, Run, register_adapter
from tokenprune.families.attending import captured
from tokenprune.families.patches import frames, times_rows_columns
from tokenprune.families.places import in_order, of_times, told
from tokenprune.families.tower import Patches, Tower


def layout(
    config: Any, inputs: Mapping[str, Any], runs: Sequence[Sequence[Run]]
) -> list[Places] | None:
    """Squares of each image's own size; of videos, what is not left out as it looks the same."""
    images, videos = (_of_kind(inputs, kind) for kind in ("image", "video"))
    kept = inputs.get("video_compression_mask")
    if kept is not None and videos:
        if kept.device.type != "cpu":  # which frames these are, only the device knows
            return None
        parts = kept.split([len(video) for video in videos])
        videos = [video[own] for video, own in zip(videos, parts, strict=True)]
    return in_order(images, videos, runs)


def _of_kind(inputs: Mapping[str, Any], kind: str) -> list[Places]:
    sizes, edges = (told(inputs, f"{kind}_{name}") for name in ("grid_thw", "merge_sizes"))
    both = zip(sizes, edges, strict=True) if sizes and edges else ()
    return [image for size, edge in both for image in of_times([size], edge)]


def patches(model: Any, named: Mapping[str, Any], index: Tensor) -> Patches:
    """Runs of patches, with the shares that interpolation gives each patch of a square."""
    kind = "image" if "image_merge_sizes" in named else "video"
    edges = named[f"{kind}_merge_sizes"].tolist()
    counts = times_rows_columns(named).prod(1).tolist()
    most = max(edges) ** 2
    numbers, shares = [], []
    for own, edge in zip(torch.split(index.flatten(), counts), edges, strict=True):
        missing = (0, most - edge**2)
        numbers.append(pad(own.view(-1, edge**2), missing, value=-1))
        shares.append(pad(_shares(edge), missing).expand(len(own) // edge**2, -1))
    return Patches(torch.cat(numbers), torch.cat(shares))


def _shares(edge: int) -> Tensor:
    """The share of each patch of a square in its token, (edge ** 2,), by the model's resizing."""
    single = torch.eye(edge**2).view(-1, 1, edge, edge)
    return interpolate(single, size=(1, 1), mode="bilinear").flatten()


_TOWER = Tower("vision_model", patches, frames=frames, form=captured)
register_adapter("video_llama_3", Adapter(layout=layout, framing="whole", tower=_TOWER))
