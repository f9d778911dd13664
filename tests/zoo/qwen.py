"""Qwen-VL and other models of variable grids and several position axes."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel, Qwen2_5_VLConfig

from zoo.specimen import BEGIN, END, IMAGE, VIDEO, Picture, Specimen, pixels, text_sizes


def token_types(model: PreTrainedModel, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """1 for image tokens, 2 for video tokens, as the processors of transformers 5 say it."""
    ids = inputs["input_ids"]
    return {"mm_token_type_ids": (ids == IMAGE).long() + 2 * (ids == VIDEO).long()}


def qwen2_5_vl_config() -> Qwen2_5_VLConfig:
    return Qwen2_5_VLConfig(
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_heads": 4,
            "out_hidden_size": 32,
            "patch_size": 4,
            "window_size": 16,
            "fullatt_block_indexes": [1],
        },
        text_config=text_sizes(
            rope_parameters={"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
        ),
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=BEGIN,
        vision_end_token_id=END,
    )


def qwen_image(model: PreTrainedModel, own: torch.Generator) -> Picture:
    """A grid of 4 x 6 patches, merged to 2 x 3 tokens."""
    width = 3 * 2 * model.config.vision_config.patch_size**2
    inputs = {
        "pixel_values": pixels(own, 24, width),
        "image_grid_thw": torch.tensor([[1, 4, 6]]),
    }
    return Picture([BEGIN] + [IMAGE] * 6 + [END], inputs)


SPECIMENS = [
    Specimen(
        "qwen2_5_vl",
        qwen2_5_vl_config,
        {"image": qwen_image},
        "Qwen2_5_VLForConditionalGeneration",
        extras=token_types,
    ),
]
