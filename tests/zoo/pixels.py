"""Where the pixels of each visual token are, as the model itself shows it.

No patch of the tower sees another while its attention is silent. Then what enters the decoder in a
token's column changes with the pixels that the token is made of, and with no others: those of one
row of patches after another are disturbed, of one column, of one tile or frame.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby, pairwise
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

import tokenprune as tp
from tokenprune.families.anatomy import examine
from zoo.specimen import Prompt, Specimen

#: Types whose patches come in raster order, where others come in squares that are merged.
RASTER = ("paddleocr_vl", "hunyuan_vl", "kimi_k25", "muse_glimmer", "muse_spark")
#: Types with a token after each row of an image.
NEWLINES = ("llava_next", "llava_next_video", "llava_onevision", "hunyuan_vl", "granite4_vision")
#: Types with a mosaic of tiles behind the whole image, here of 2 x 2.
MOSAICS = ("llava_next", "llava_next_video", "llava_onevision", "granite4_vision")
#: Types that have text between the tiles, or frames, of an image.
APART = ("smolvlm", "idefics3", "aya_vision", "ovis2", "granite_docling", "llama4", "internvl")
#: An axis of a patch's place: its tile or frame, its row, its column.
FRAME, ROW, COLUMN = range(3)


class _Entered(Exception):
    """What enters the decoder, which need not run."""


@dataclass
class Pixels:
    """Pixels of a call, and where each is: int64, a shape like theirs and 3; -1 for pads."""

    name: str
    where: Tensor


def pixels_of(model: PreTrainedModel, inputs: dict[str, Tensor]) -> list[Pixels]:
    """All pixels of a call, but for the same image once more."""
    found = []
    for kind, name in (("image", "pixel_values"), ("video", "pixel_values_videos")):
        if name in inputs:
            found.append(Pixels(name, _where(model, inputs, kind, inputs[name])))
    return found


def _where(model: Any, inputs: dict[str, Tensor], kind: str, values: Tensor) -> Tensor:
    """Tile or frame, row and column of each of a call's pixels, or patches."""
    model_type, vision = model.config.model_type, model.config.vision_config
    if (sizes := inputs.get(f"{kind}_grid_thw")) is not None:
        merge = inputs.get(f"{kind}_merge_sizes")
        edge = getattr(vision, "spatial_merge_size", 2)
        edges = [1 if model_type in RASTER else edge] * len(sizes) if merge is None else merge
        own = [_patches(*size, int(edge)) for size, edge in zip(sizes.tolist(), edges, strict=True)]
        return _counted(own).view(-1, *[1] * (values.dim() - 1), 3)
    if (given := inputs.get(f"{kind}_position_ids")) is not None:
        frames = torch.arange(len(given))[:, None, None].expand(*given.shape[:2], 1)
        is_pad = (given < 0).any(-1, keepdim=True)
        return torch.cat([frames, given.flip(-1)], -1).masked_fill(is_pad, -1)[..., None, :]
    if model_type == "molmo2":
        grids = [_patches(1, 4, 4, 1)] * len(values)
        return _counted(grids).view(*values.shape[:2], 1, 3)
    *lead, _, height, width = values.shape
    frames = torch.arange(torch.Size(lead).numel()).view(*lead, 1, 1).expand(*lead, height, width)
    edge = vision.patch_size if isinstance(vision.patch_size, int) else vision.patch_size[0]
    row = (torch.arange(height) // edge)[:, None].expand(frames.shape)
    column = (torch.arange(width) // edge).expand(frames.shape)
    where = torch.stack([frames, row, column], -1)
    if model_type in MOSAICS and kind == "image":  # of each image the first tile is all of it
        side, tile = height // edge, torch.arange(1, lead[1]) - 1
        where[:, 1:, ..., FRAME] = where[:, 1:2, ..., FRAME]
        where[:, 1:, ..., ROW] += (tile // 2 * side)[:, None, None]
        where[:, 1:, ..., COLUMN] += (tile % 2 * side)[:, None, None]
    filled = values.flatten(-3).abs().sum(-1) > 0  # some models tell tiles from zeros
    return where.masked_fill(~filled[..., None, None, None], -1).unsqueeze(-4)


def _patches(times: int, rows: int, columns: int, edge: int) -> Tensor:
    """Frame, row and column of each patch, in the order of squares of that edge, (P, 3)."""
    axes = torch.arange(times), torch.arange(rows), torch.arange(columns)
    table = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1)
    cut = table.view(times, rows // edge, edge, columns // edge, edge, 3)
    return cut.transpose(2, 3).reshape(-1, 3)


def _counted(own: list[Tensor]) -> Tensor:
    """Frames counted through all images."""
    parts, start = [], 0
    for patches in own:
        parts.append(patches + torch.tensor([start, 0, 0]))
        start += int(patches[:, FRAME].max()) + 1
    return torch.cat(parts)


@contextmanager
def _silent(model: Any, within: bool = False) -> Iterator[Callable[[dict[str, Tensor]], Tensor]]:
    """A call of a model whose tower attends to nothing: what enters the decoder, (B, T, D).

    Args:
        model: The model.
        within: Whether what attends between tower and decoder does.
    """
    anatomy = examine(model)
    hooks = []

    def silence(module: nn.Module, args: Any, output: Any) -> Any:
        return (output[0] * 0, *output[1:]) if isinstance(output, tuple) else output * 0

    def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
        raise _Entered(args[0] if args else kwargs["hidden_states"])

    if (parts := anatomy.vision) is None:
        own = set(anatomy.decoder.modules())
        rest = [module for module in model.modules() if module not in own]
        attending = [part for part in rest if type(part).__name__.endswith("Attention")]
        # The innermost: what is around them may add their input.
        silent = [part for part in attending if len({*part.modules()} & {*attending}) == 1]
        if within:
            silent = [part for part in silent if part in {*model.model.vision_tower.modules()}]
        hooks += [module.register_forward_hook(silence) for module in silent]
    else:
        layers = [layer for stack in (parts.layers, *parts.others) for layer in stack]
        silent = [getattr(layer, parts.tower.attention) for layer in layers]
        pooling = getattr(getattr(parts.base, "multi_modal_projector", None), "image_pooling_2d", 0)
        silent += [pooling.q_proj] if pooling else []  # asks all patches of a token alike
        hooks += [module.register_forward_hook(silence) for module in silent]
    hooks.append(anatomy.layers[0].register_forward_pre_hook(enter, with_kwargs=True))

    def call(inputs: dict[str, Tensor]) -> Tensor:
        try:
            with torch.no_grad():
                model(**inputs, use_cache=False)
        except _Entered as entered:
            return entered.args[0]
        raise AssertionError("the decoder was not called")

    try:
        yield call
    finally:
        for hook in hooks:
            hook.remove()


#: Of a visual token: tiles or frames (kind, number), rows and columns of its patches.
Made = tuple[frozenset[tuple[str, int]], frozenset[int], frozenset[int]]


def made_of(model: Any, inputs: dict[str, Tensor], within: bool = False) -> list[list[Made]]:
    """What each visual token of each row is made of; of `within` see `_silent`."""
    visual = tp.visual_mask(model, inputs["input_ids"])
    noise = torch.Generator().manual_seed(0)
    found: dict[tuple[int, int, int], list[Any]] = {}
    with _silent(model, within) as call:
        plain = call(inputs)
        for pixels in pixels_of(model, inputs):
            values = inputs[pixels.name]
            other = 4 * torch.randn(values.shape, generator=noise)
            for axis in (FRAME, ROW, COLUMN):
                for number in range(int(pixels.where[..., axis].max()) + 1):
                    marked = pixels.where[..., axis] == number
                    moved = torch.where(marked, values + other, values)
                    change = (call(inputs | {pixels.name: moved}) - plain).abs().amax(-1)
                    key = (pixels.name, number) if axis == FRAME else number
                    for row, column in (change > 1e-5).nonzero().tolist():
                        assert visual[row, column], "text changed with the image"
                        found.setdefault((row, column, axis), []).append(key)
    return [
        [
            tuple(frozenset(found.get((row, column, axis), ())) for axis in range(3))
            for column in own
        ]
        for row, own in ((row, marks.nonzero()[:, 0].tolist()) for row, marks in enumerate(visual))
    ]


# --------------------------------------------------------------------------------- what is expected


def runs_of(specimen: Specimen, model: Any, prompt: Prompt) -> list[list[int]]:
    """The lengths of the runs of visual tokens of each picture of a prompt."""
    pictures = [part for part in specimen.segments(model, prompt) if part.inputs]
    marks = [tp.visual_mask(model, torch.tensor(picture.ids)).tolist() for picture in pictures]
    return [[len(list(run)) for is_visual, run in groupby(own) if is_visual] for own in marks]


def expected(specimen: Specimen, model: Any, made: list[Made], prompt: Prompt) -> list[list[int]]:
    """Places of a row's tokens by what they are made of, as the zoo's prompt has its images."""
    places: list[list[int]] = []
    start = image = 0
    for runs in runs_of(specimen, model, prompt):
        for length in runs if specimen.model_type in APART else [sum(runs)]:
            own, start = made[start : start + length], start + length
            names = {name for frames, _, _ in own for name, _ in frames}
            newlines = specimen.model_type in NEWLINES and names == {"pixel_values"}
            places += [[image, *place] for place in _of_image(own, newlines)]
            image += 1
    assert start == len(made)
    return places


def _of_image(own: list[Made], newlines: bool) -> list[list[int]]:
    """Grid, row and column of an image's tokens: how their patches stand to each other."""
    grids = list(dict.fromkeys(frames for frames, _, _ in own if frames))
    sets = {
        (grid, axis): {token[axis] for token in own if token[FRAME] == grid}
        for grid in grids
        for axis in (ROW, COLUMN)
    }
    places: list[list[int]] = []
    ends = sum(not token[FRAME] for token in own)
    for number, token in enumerate(own):
        grid, before = token[FRAME], own[number - 1][FRAME] if number else None
        if grid:
            place = [_along(token[axis], sets[grid, axis], newlines) for axis in (ROW, COLUMN)]
            places.append([grids.index(grid), *place])
        elif newlines and before and ends > 1:
            places.append([*places[-1][:2], len(sets[before, COLUMN])])
        else:  # of an image that is not cut, a newline ends no row
            places.append([-1, -1, -1])
    return places


def _along(own: frozenset[int], others: set[frozenset[int]], cropped: bool) -> int:
    """How many tokens stand before one, in a row or a column, by the patches they are made of."""
    order = sorted(others, key=lambda numbers: sum(numbers) / len(numbers))
    if any(one & other for one, other in pairwise(order)):  # convolutions, whose windows overlap
        return order.index(own)
    return (min(own) - (min(order[0]) if cropped else 0)) // len(own)
