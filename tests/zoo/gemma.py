"""Gemma 3 and PaliGemma: image tokens that see each other, layers with sliding windows."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import Gemma3Config, PreTrainedModel, SiglipVisionConfig

from zoo.specimen import (
    BEGIN,
    END,
    IMAGE,
    NUM_LAYERS,
    Picture,
    Specimen,
    pixels,
    text_sizes,
    vision_sizes,
)


def image_types(model: PreTrainedModel, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {"token_type_ids": (inputs["input_ids"] == IMAGE).long()}


def gemma3_config() -> Gemma3Config:
    return Gemma3Config(
        text_config=text_sizes(
            sliding_window=128,
            layer_types=["sliding_attention", "sliding_attention", "full_attention"]
            * (NUM_LAYERS // 3),
            query_pre_attn_scalar=8,
        ),
        vision_config=SiglipVisionConfig(**vision_sizes()).to_dict(),
        mm_tokens_per_image=4,
        image_token_index=IMAGE,
        boi_token_index=BEGIN,
        eoi_token_index=END,
    )


def gemma3_image(model: PreTrainedModel, own: torch.Generator) -> Picture:
    ids = [BEGIN] + [IMAGE] * 4 + [END]
    return Picture(ids, {"pixel_values": pixels(own, 1, 3, 32, 32)})


SPECIMENS = [
    Specimen(
        "gemma3",
        gemma3_config,
        {"image": gemma3_image},
        "Gemma3ForConditionalGeneration",
        extras=image_types,
    ),
]
