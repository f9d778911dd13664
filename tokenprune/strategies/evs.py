"""EVS: Bagrov et al., 2025, arXiv 2510.14624, as vLLM serves it.

A token is worth what has changed at its place since the frame before: 1 - cosine of what enters
the decoder (the paper compares pixels). A video's first frame is worth more than any change, and
so is all else that has no frame before it: an image, a token whose place is unknown, or whose
forerunner an earlier cut has dropped. Of those, as of any equal ones, the first stay: where images
are all there is, their first rows do, and another method is wanted. It looks at no text.

Some models (InternVL, SmolVLM) are given a video's frames as images: `frames="images"` takes all
images of a row for one video. Departures: the served code keeps at least a frame's worth of tokens,
whatever the budget; the visual tokens of a row, several videos too, are one pool here.

Shape suffixes: B batch rows, V visual tokens alive.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from tokenprune.strategy import (
    Need,
    Projected,
    Published,
    ScoreStrategy,
    TokenView,
    Videos,
    check_choice,
    register,
)

if TYPE_CHECKING:
    from torch import Tensor

FRAMES = ("grids", "images")
_SIDE = 2**14  # no video has as many frames, no frame as many rows or columns
_ALIKE = 2e-6
_NEW = 255.0  # of what has no frame before it; a cosine's distance is 2 at most


@register("evs")
@dataclass(frozen=True)
class EVS(ScoreStrategy):
    """Keeps a video's first frame, and then what differs from the frame before.

    Args:
        frames: What the frames of a video are: its `"grids"`, or the row's `"images"`.
    """

    frames: str = "grids"

    def __post_init__(self) -> None:
        check_choice("EVS.frames", self.frames, FRAMES)

    def needs(self) -> tuple[Need, ...]:
        return (Projected(), Videos()) if self.frames == "grids" else (Projected(),)

    def score(self, view: TokenView) -> Tensor:
        import torch

        from tokenprune.tensors import find, snap, take

        places = view.places
        video_BV, frame_BV, row_BV, column_BV = places.unbind(-1)
        is_known_BV = view.valid & (places >= 0).all(-1)
        if self.frames == "images":
            video_BV, frame_BV = frame_BV, video_BV  # tiles are apart
        else:
            is_known_BV = is_known_BV & view.of_videos
        cell_BV = ((video_BV * _SIDE + frame_BV) * _SIDE + row_BV) * _SIDE + column_BV
        wanted_BV = torch.where(is_known_BV & (frame_BV > 0), cell_BV - _SIDE**2, -2)
        before_BV, there_BV = find(cell_BV.where(is_known_BV, -1), wanted_BV)
        unit = torch.nn.functional.normalize(view.projected.float(), dim=-1)
        change_BV = 1 - (unit * take(unit, before_BV)).sum(-1)
        return snap(change_BV.where(there_BV, _NEW), _ALIKE)

    @classmethod
    def published(cls, num_layers: int) -> Published:
        # Its rate has no default; Nemotron-Nano-VL was trained at .7 dropped. M-RoPE stays.
        return Published("one_shot", {"layer": 0, "keep": 0.3}, positions="original")
