"""Views of made-up tokens: what strategies are shown, without a model."""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
from torch import Tensor

import tokenprune as tp
from tokenprune.strategy import HasPatches, Need

HEADS, WIDTH = 16, 6


@dataclass(frozen=True, eq=False)
class Made:
    """A batch of made-up rows, as a view and as what it is made of.

    Attributes:
        view: What a strategy sees.
        keep: int64 (B,), the budgets.
        counts: Visual tokens alive of each row.
        original: Visual tokens that each row had.
        answers: What is answered to each need.
    """

    view: tp.TokenView
    keep: Tensor
    counts: list[int]
    original: list[int]
    answers: dict[Need, object]


def made(seed: int, longest: int = 40) -> Made:
    """The batch of a seed: ragged rows, some without images, budgets from none to all and more.

    In every other one values are few and exact, so that tokens tie and repeat.

    Args:
        seed: Of all that is drawn.
        longest: Most visual tokens of a row.
    """
    draw, own = random.Random(seed), torch.Generator().manual_seed(seed)
    tied = seed % 2 == 1
    rows = draw.randint(1, 4)
    counts = [draw.choice([0, draw.randint(1, longest)]) for _ in range(rows)]
    counts[draw.randrange(rows)] = draw.randint(1, longest)
    original = [count + draw.choice([0, draw.randint(0, 9)]) * (count > 0) for count in counts]
    texts = [draw.randint(0, 6) for _ in range(rows)]
    following = [draw.randint(0, text) for text in texts]
    width, most, length = max(counts), max(original), max(1, *texts)

    def values(*shape: int) -> Tensor:
        """Directions: of the axes there and back, or any."""
        if not tied:
            return torch.randn(*shape, generator=own)
        axis = torch.randint(0, shape[-1], shape[:-1], generator=own)
        sign = 2.0 * torch.randint(0, 2, (*shape[:-1], 1), generator=own) - 1
        return torch.nn.functional.one_hot(axis, shape[-1]) * sign

    def amounts(*shape: int) -> Tensor:
        """Numbers from 0 to 1, or quarters."""
        if not tied:
            return torch.rand(*shape, generator=own)
        return torch.randint(0, 5, shape, generator=own) / 4

    valid = torch.arange(width) < torch.tensor(counts)[:, None]
    spoken = torch.arange(length) < torch.tensor(texts)[:, None]
    ahead = torch.tensor(texts)[:, None] - torch.tensor(following)[:, None]
    text = tp.TextView(
        embeddings=values(rows, length, WIDTH),
        valid=spoken,
        follows=spoken & (torch.arange(length) >= ahead),
        positions=torch.arange(length).expand(rows, -1) + most + draw.randint(0, 40),
    )
    # Steps along one line: their distances and squares are exact.
    steps = torch.randint(0, 6, (rows, width, 1), generator=own).float().expand(-1, -1, 4)
    hidden = steps if tied else torch.randn(rows, width, 4, generator=own)
    attention = amounts(rows, HEADS, length, width) * spoken[:, None, :, None]
    answers: dict[Need, object] = {
        tp.Projected(): values(rows, width, WIDTH),
        # Never tied: a word as much like the image as the mean of them is a matter of rounding.
        tp.Entered(): torch.randn(rows, most, WIDTH, generator=own),
        tp.Text(): text,
        tp.DecoderRows("text", "previous"): attention,
        tp.DecoderKeys("previous"): tp.TokensAndText(
            amounts(rows, width, 2, 4) - 0.5, amounts(rows, length, 2, 4) - 0.5
        ),
        tp.Normed(): tp.TokensAndText(values(rows, width, WIDTH), values(rows, length, WIDTH)),
    }
    # As a tower's: fewer numbers than the decoder's, and tokens that are no patch.
    has_patch = valid & (torch.rand(rows, width, generator=own) < 0.9)
    answers |= {
        tp.VisionStates(-2, "hidden"): torch.randn(rows, width, WIDTH, generator=own),
        tp.Question(): tuple(
            tuple(torch.randint(0, 40, (count,), generator=own).tolist()) for count in following
        ),
        HasPatches(): has_patch,
        tp.Change(): _changes(own, tied, rows, width),
    }
    share = draw.choice([0.0, 0.2, 0.5, 0.8, 1.0, 1.2, draw.random()])
    keep = torch.tensor([round(count * share) for count in counts])
    tables = [_places(draw, count, width) for count in counts]
    places = torch.stack([own for own, _ in tables])
    answers[tp.Videos()] = torch.stack([own for _, own in tables])
    view = tp.TokenView(
        layer=2,
        num_layers=8,
        num_original=torch.tensor(original),
        max_keep=max(map(min, counts, keep.tolist())),
        ragged=len(set(counts)) > 1,
        _valid=lambda: valid,
        _positions=lambda: torch.arange(width).expand(rows, width),
        _hidden=lambda: hidden,
        _places=lambda: places,
        _signal=answers.__getitem__,
    )
    return Made(view, keep, counts, original, answers)


def _changes(own: torch.Generator, tied: bool, rows: int, width: int) -> Tensor:
    """What a layer has added (rows, width, 4); tied, steps along an axis, of exact lengths."""
    if not tied:
        return torch.randn(rows, width, 4, generator=own)
    axis = torch.randint(0, 4, (rows, width), generator=own)
    steps = torch.randint(-3, 4, (rows, width, 1), generator=own)
    return (torch.nn.functional.one_hot(axis, 4) * steps).float()


def _places(draw: random.Random, count: int, width: int) -> tuple[Tensor, Tensor]:
    """Places of a row, and which tokens are of videos.

    Grids, several of a size as frames or tiles, some with holes and newlines of no grid, and runs
    without any.
    """
    found: list[tuple[int, int, int, int]] = []
    videos: list[bool] = []
    image = 0
    while len(found) < count:
        if draw.random() < 0.3:
            found += [(image, -1, -1, -1)] * draw.randint(1, 9)
        else:
            several = draw.random() < 0.5
            frames, most = (draw.randint(1, 4), 3) if several else (1, 6)
            rows, columns = draw.randint(1, most), draw.randint(1, most)
            cells = [
                (image, f, r, c) for f in range(frames) for r in range(rows) for c in range(columns)
            ]
            found += [cell for cell in cells if draw.random() < 0.9]
            found += [(image, -1, -1, -1)] * (draw.random() < 0.3)
        videos += [draw.random() < 0.7] * (len(found) - len(videos))
        image += 1
    missing = width - count
    table = torch.tensor([*found[:count], *[(-1, -1, -1, -1)] * missing]).view(width, 4)
    return table, torch.tensor([*videos[:count], *[False] * missing])
