"""LLaVA and its descendants."""

from __future__ import annotations

import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, PreTrainedModel

from zoo.specimen import IMAGE, Picture, Specimen, pixels, text_sizes, vision_sizes


def llava_config() -> LlavaConfig:
    return LlavaConfig(
        vision_config=CLIPVisionConfig(**vision_sizes()),
        text_config=LlamaConfig(**text_sizes()),
        image_token_id=IMAGE,
    )


def llava_image(model: PreTrainedModel, own: torch.Generator) -> Picture:
    return Picture([IMAGE] * 16, {"pixel_values": pixels(own, 1, 3, 32, 32)})


SPECIMENS = [
    Specimen("llava", llava_config, {"image": llava_image}, "LlavaForConditionalGeneration"),
]
