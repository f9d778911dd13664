"""LLaVA 1.5 and its kin: one square grid an image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from tokenprune.families.adapter import Adapter, Places, Run, register_adapter
from tokenprune.families.attending import captured
from tokenprune.families.pixtral import by_sizes
from tokenprune.families.places import by_runs, nowhere, of_shapes, patches_across, raster, whole
from tokenprune.families.tower import Patches, Tower


def layout(
    config: Any, inputs: Mapping[str, Any], runs: Sequence[Sequence[Run]]
) -> list[Places] | None:
    """One square of patches after another, each an image; Pixtral's images have sizes."""
    if config.vision_config.model_type == "pixtral":
        return by_sizes(config, inputs, runs, 1)
    side = patches_across(config)

    return by_runs(runs, lambda run: _apart(run, side))


def _apart(run: Run, side: int) -> list[Places]:
    """Squares of a run, each an image."""
    return [of_shapes([(side, side)])] * whole(run, side**2)


def images_or_frames(
    config: Any, inputs: Mapping[str, Any], runs: Sequence[Sequence[Run]]
) -> list[Places] | None:
    """An image is a square of patches; a run of a video is frames, each after its class token."""
    side = patches_across(config)

    def shaped(run: Run) -> list[Places]:
        if not run.is_video:
            return [] if run.is_video is None else _apart(run, side)
        frames = range(whole(run, side**2 + 1))
        parts = [torch.cat([nowhere(1), raster(frame, side, side)]) for frame in frames]
        return [torch.cat(parts)] if parts else []

    return by_runs(runs, shaped)


def patches(model: Any, named: Mapping[str, Any], index: Tensor) -> Patches:
    """A token a patch."""
    return Patches(selected(model, named, index).reshape(-1, 1))


def without_first(model: Any, named: Mapping[str, Any], index: Tensor) -> Patches:
    """A token a patch, and none for the class token."""
    return Patches(index[:, 1:].reshape(-1, 1))


def of_images_or_videos(model: Any, named: Mapping[str, Any], index: Tensor) -> Patches:
    """A token a patch; in videos, a token a class token as well."""
    is_video = named.get("pixel_values_videos") is not None
    return all_patches(model, named, index) if is_video else patches(model, named, index)


def all_patches(model: Any, named: Mapping[str, Any], index: Tensor) -> Patches:
    """A token a position of the tower."""
    return Patches(index.reshape(-1, 1))


def selected(model: Any, named: Mapping[str, Any], index: Tensor) -> Tensor:
    """What of each tile's positions (N, L) becomes tokens.

    `"default"` drops the tower's first position, be it a class token or not; `"full"` drops none.
    """
    given = named.get("vision_feature_select_strategy")
    strategy = model.config.vision_feature_select_strategy if given is None else given
    return index[:, 1:] if strategy == "default" else index


TOWER = Tower("vision_tower", patches, projector="multi_modal_projector")

#: What projects DeepSeek-VL's finer tower beside the other takes both: nothing is mixed before it.
_TOWERS = {
    "llava": TOWER,
    "vipllava": replace(TOWER, patches=without_first),
    "deepseek_vl": Tower("vision_model", all_patches, projector="aligner"),
    "deepseek_vl_hybrid": Tower("vision_model", all_patches),
    "janus": Tower("vision_model", all_patches, projector="aligner", form=captured),
}
#: Its videos go through a tower of their own, and keep the class token of each frame.
VIDEO = Tower(
    "image_tower",
    of_images_or_videos,
    projector="multi_modal_projector",
    others=("video_tower",),
)
register_adapter("video_llava", Adapter(layout=images_or_frames, framing="centre", tower=VIDEO))
for _model_type, _tower in _TOWERS.items():
    # CLIP's processor cuts off what is no square; those of DeepSeek fill it up to one.
    _framing = "centre" if _model_type in ("llava", "vipllava") else "padded"
    register_adapter(_model_type, Adapter(layout=layout, framing=_framing, tower=_tower))
