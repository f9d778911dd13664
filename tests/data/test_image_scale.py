"""Smaller pictures: as many pixels as asked for, and what processors make of them."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from processors import LLAVA, build_processor
from transformers import Qwen2VLImageProcessorPil

from tokenprune.data import ConversationCollator, PromptCollator, Sample, SceneDataset, Turn
from tokenprune.data.collate import _smaller
from tokenprune.data.images import shrink
from tokenprune.data.module import VQADataModule


def picture(width: int, height: int) -> Image.Image:
    levels = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(levels)


@pytest.mark.parametrize(
    ("size", "scale", "expected"),
    [
        ((192, 192), 0.25, (96, 96)),
        ((300, 200), 0.5, (212, 141)),
        ((640, 480), 1 / 9, (213, 160)),
        ((3, 500), 0.01, (1, 50)),  # no side is without a pixel
    ],
)
def test_a_share_of_the_pixels_stays(size, scale, expected):
    assert shrink(picture(*size), scale).size == expected


def test_all_pixels_are_the_picture_itself():
    whole = picture(20, 10)
    assert shrink(whole, 1.0) is whole


def sample(image: Image.Image) -> Sample:
    return Sample("a", (image,), (Turn("Which colour is it?", "red"),))


@pytest.mark.parametrize("collator", [PromptCollator, ConversationCollator])
def test_a_tower_of_one_size_gets_them_enlarged_again(collator):
    """A quarter of the 32 x 32 pixels that it takes, however large the picture is."""
    processor = build_processor("llava", LLAVA)
    side = processor.image_processor.crop_size["height"]
    half = side // 2
    for size, smaller in (((side, side), (half, half)), ((6 * side, 3 * side), (side, half))):
        whole = picture(*size)
        small = collator(processor, 0.25)([sample(whole)])["inputs"]
        by_hand = collator(processor)([sample(whole.resize(smaller, Image.Resampling.BICUBIC))])
        plain = collator(processor)([sample(whole)])["inputs"]
        assert torch.equal(small["pixel_values"], by_hand["inputs"]["pixel_values"])
        assert not torch.equal(small["pixel_values"], plain["pixel_values"])
        assert torch.equal(small["input_ids"], plain["input_ids"])


def test_tiles_are_fewer_and_those_of_the_whole_picture_are_told():
    processor, whole = build_processor("llava_next", LLAVA), picture(192, 192)
    plain = PromptCollator(processor)([sample(whole)])
    small = PromptCollator(processor, 0.02)([sample(whole)])
    assert "whole_ids" not in plain
    assert torch.equal(small["whole_ids"], plain["inputs"]["input_ids"])
    assert small["inputs"]["input_ids"].shape[1] < small["whole_ids"].shape[1]
    assert small["samples"][0].image is whole  # as it is in the data, for pictures of results


def test_fewer_patches_of_a_picture_of_any_size():
    """As Qwen-VL's processors cut pictures: a quarter of the patches, of too large ones as well."""
    sides = {"patch_size": 4, "merge_size": 2, "min_pixels": 64, "max_pixels": 32 * 32}
    own = Qwen2VLImageProcessorPil(**sides)
    processor = SimpleNamespace(image_processor=own)
    for size in ((32, 32), (96, 96)):
        small = _smaller(processor, picture(*size), 0.25)
        (grid,) = own(images=[small], return_tensors="pt")["image_grid_thw"].tolist()
        assert grid == [1, 4, 4]


def test_every_loop_has_them():
    scenes = SceneDataset("test", 2)
    own = {"train": scenes, "validation": scenes, "test": scenes, "batch_size": 2}
    processor = build_processor("llava_next", LLAVA)
    data = VQADataModule(**own, processor=processor, image_scale=0.02)
    whole = VQADataModule(**own, processor=processor)
    for loop in ("train", "val", "test", "predict"):
        few, many = (
            next(iter(getattr(module, f"{loop}_dataloader")()))["inputs"]["input_ids"]
            for module in (data, whole)
        )
        assert few.shape[1] < many.shape[1], loop


@pytest.mark.parametrize("scale", [0, -0.5, 1.5, True, None, "0.5", float("nan")])
def test_other_shares_are_refused(scale):
    with pytest.raises(ValueError, match=r"^data\.image_scale: expected a share .* Set data\."):
        VQADataModule(image_scale=scale)
