"""VidCom2: Liu et al., 2025, arXiv 2505.14454 (EMNLP 2025).

Frames that stand out from the video keep more of their tokens, and of each frame those stay that
stand out from the video and from their frame. Tokens are compared, as they enter the decoder, by
the half of their channels that varies least, scaled to length 1; how close one is to a mean c is
the sum of exp(-|x - c|^2 / 2a) over a = 1/8, 1/4, 1/2, 1, 2. Of F frames of one size each gets
1 + softmax(u / .01) - 1/F times the average, u being minus the mean closeness of its tokens to the
video.

The released code rounds each frame's share, to one token at least, so that its total is near the
budget. Here the budget is met: seats go to frames by the divisor method with rounding
(Sainte-Lague), which rounds the same shares, scaled so that they sum to it. That is one order of
all tokens, by (rank in the frame + 1/2) / share. Departures besides: a row's visual tokens are one
video, its frames the grids of `places`, an image each where a model is given frames as images;
newlines within a frame count as its tokens, and a picture whose grid is unknown as a frame. A token
of no frame, as LLaVA-OneVision's newline after the last, stays first and counts in no mean, as
released. LLaVA's survivors are renumbered, Qwen-VL's keep their positions (`positions=original`).

Shape suffixes: B batch rows, V visual tokens alive, F frames, D channels.
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
    check_fraction,
    check_number,
    register,
)

if TYPE_CHECKING:
    from torch import Tensor

_ALIKE = 2e-6
_WIDTHS = (0.125, 0.25, 0.5, 1.0, 2.0)


@register("vidcom2")
@dataclass(frozen=True)
class VidCom2(ScoreStrategy):
    """Keeps what stands out from its video and its frame, more of frames that stand out.

    Args:
        channels: Part of the channels that is compared, those that vary least.
        temperature: Of the softmax over frames; higher, and frames get more alike shares.
    """

    channels: float = 0.5
    temperature: float = 0.01

    def __post_init__(self) -> None:
        check_fraction("VidCom2.channels", self.channels, "part of the channels is compared")
        check_number("VidCom2.temperature", self.temperature, above=0, paper=".01")

    def needs(self) -> tuple[Need, ...]:
        return (Projected(),)

    def score(self, view: TokenView) -> Tensor:
        import torch

        from tokenprune.tensors import find, grid_units, rank_in_units, snap

        places, tokens = view.places, view.projected.float()
        sound_BV = tokens.isfinite().all(-1)
        tokens = tokens.masked_fill(~sound_BV[..., None], 0)
        # What has no place in a picture that has a grid is in no frame.
        image_BV, is_placed_BV = places[..., 0], places[..., 2] >= 0
        _, has_grid_BV = find(image_BV.where(view.valid & is_placed_BV, -2), image_BV)
        valid_BV = view.valid & sound_BV & (is_placed_BV | ~has_grid_BV)
        frame_BV, sizes_BF = grid_units(places, valid_BV)
        steady_BD = _varies_least(tokens, valid_BV, self.channels)
        tokens = torch.nn.functional.normalize(tokens * steady_BD[:, None], dim=-1)
        tokens = tokens * valid_BV[..., None]
        number_B1 = valid_BV.sum(1, keepdim=True).clamp_min(1)
        of_video_B1D = (tokens.sum(1) / number_B1)[:, None]
        of_frame_BVD = _means(tokens, frame_BV, sizes_BF)
        to_video_BV = _closeness(tokens, of_video_B1D)
        alike_BV = snap(to_video_BV + _closeness(tokens, of_frame_BVD), _ALIKE)
        # A frame's share of the budget, by how far its tokens are from the video's mean.
        apart_BV = -_means(to_video_BV[..., None], frame_BV, sizes_BF)[..., 0]
        rank_BV = rank_in_units(-alike_BV, frame_BV, valid_BV)
        first_BV = valid_BV & (rank_BV == 0)  # one of each frame
        power_BV = (apart_BV / self.temperature).masked_fill(~valid_BV, -torch.inf)
        power_BV = (power_BV - power_BV.amax(1, keepdim=True)).exp()
        total_B1 = (power_BV * first_BV).sum(1, keepdim=True)
        number_frames_B1 = first_BV.sum(1, keepdim=True).clamp_min(1)
        share_BV = 1 + power_BV / total_B1 - 1 / number_frames_B1
        share_BV = share_BV * sizes_BF.gather(1, frame_BV)
        order_BV = -(rank_BV + 0.5) / share_BV
        # All of frames are below 0; what is no number comes last.
        return order_BV.where(valid_BV, torch.where(sound_BV, 1.0, torch.nan))

    @classmethod
    def published(cls, num_layers: int) -> Published:
        # A quarter of a video's tokens, before the decoder; LLaVA-OneVision's are renumbered.
        return Published("one_shot", {"layer": 0, "keep": 0.25}, positions="renumbered")


def _varies_least(tokens: Tensor, valid_BV: Tensor, part: float) -> Tensor:
    """Which channels vary least over a row, bool (B, D); of equal ones the first."""
    exists = valid_BV[..., None]
    count_B11 = exists.sum(1, keepdim=True).clamp_min(1)
    mean_B1D = (tokens * exists).sum(1, keepdim=True) / count_B11
    variance_BD = ((tokens - mean_B1D).square() * exists).sum(1)
    order_BD = variance_BD.argsort(dim=1, stable=True).argsort(dim=1)
    return order_BD < int(part * tokens.shape[-1])


def _means(values: Tensor, unit_BV: Tensor, sizes_BF: Tensor) -> Tensor:
    """Of each token the mean over its frame, (B, V, D).

    In double precision: a GPU adds in any order.
    """
    index = unit_BV[..., None].expand_as(values)
    none = values.new_zeros(*sizes_BF.shape, values.shape[-1]).double()
    means = none.scatter_add(1, index, values.double()) / sizes_BF.clamp_min(1)[..., None]
    return means.to(values.dtype).gather(1, index)


def _closeness(tokens: Tensor, centre: Tensor) -> Tensor:
    """How close each token is to a mean, (B, V)."""
    import torch

    square_BV = (tokens - centre).square().sum(-1)
    scales = [(-square_BV / (2 * width)).exp() for width in _WIDTHS]
    return torch.stack(scales).sum(0)
