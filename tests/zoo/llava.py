"""LLaVA and its descendants."""

from __future__ import annotations

import torch
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaNextConfig,
    LlavaNextVideoConfig,
    LlavaOnevisionConfig,
    PreTrainedModel,
    Qwen2Config,
    SiglipVisionConfig,
    VideoLlavaConfig,
    VipLlavaConfig,
)

from zoo.specimen import IMAGE, VIDEO, Picture, Specimen, pixels, text_sizes, vision_sizes

#: One grid of 2 x 2 tiles, each of 2 x 2 patches.
TILED = {
    "text_config": text_sizes(),
    "vision_config": CLIPVisionConfig(**vision_sizes(image_size=16)).to_dict(),
    "image_grid_pinpoints": [[32, 32]],
    "image_token_index": IMAGE,
}


def llava_config() -> LlavaConfig:
    return LlavaConfig(
        vision_config=CLIPVisionConfig(**vision_sizes()),
        text_config=LlamaConfig(**text_sizes()),
        image_token_id=IMAGE,
    )


def llava_image(model: PreTrainedModel, own: torch.Generator) -> Picture:
    return Picture([IMAGE] * 16, {"pixel_values": pixels(own, 1, 3, 32, 32)})


def llava_next_config() -> LlavaNextConfig:
    return LlavaNextConfig(**TILED)


def mosaic_image(model: PreTrainedModel, own: torch.Generator) -> Picture:
    """A wide image: 2 x 2 tokens of the whole, then 2 x 4 of the tiles and 2 newlines."""
    inputs = {
        "pixel_values": pixels(own, 1, 5, 3, 16, 16),
        "image_sizes": torch.tensor([[16, 32]]),
    }
    return Picture([IMAGE] * 14, inputs)


def llava_next_video_config() -> LlavaNextVideoConfig:
    return LlavaNextVideoConfig(**TILED, video_token_index=VIDEO)


def pooled_video(model: PreTrainedModel, own: torch.Generator) -> Picture:
    """Four frames of one token."""
    return Picture([VIDEO] * 4, {"pixel_values_videos": pixels(own, 1, 4, 3, 16, 16)})


def llava_onevision_config() -> LlavaOnevisionConfig:
    vision = SiglipVisionConfig(**vision_sizes(image_size=16), vision_use_head=False)
    return LlavaOnevisionConfig(
        **TILED
        | {
            "text_config": Qwen2Config(**text_sizes()),
            "vision_config": vision,
            "video_token_index": VIDEO,
        }
    )


def ended_video(model: PreTrainedModel, own: torch.Generator) -> Picture:
    """Four frames of one token, and a newline after the last."""
    return Picture([VIDEO] * 5, {"pixel_values_videos": pixels(own, 1, 4, 3, 16, 16)})


def video_llava_config() -> VideoLlavaConfig:
    return VideoLlavaConfig(
        vision_config=CLIPVisionConfig(**vision_sizes(image_size=16)),
        text_config=LlamaConfig(**text_sizes()),
        image_token_index=IMAGE,
        video_token_index=VIDEO,
    )


def small_image(model: PreTrainedModel, own: torch.Generator) -> Picture:
    return Picture([IMAGE] * 4, {"pixel_values": pixels(own, 1, 3, 16, 16)})


def whole_video(model: PreTrainedModel, own: torch.Generator) -> Picture:
    """Two frames of 2 x 2 patches and a class token."""
    return Picture([VIDEO] * 10, {"pixel_values_videos": pixels(own, 1, 2, 3, 16, 16)})


def vipllava_config() -> VipLlavaConfig:
    return VipLlavaConfig(
        vision_config=CLIPVisionConfig(**vision_sizes()),
        text_config=LlamaConfig(**text_sizes()),
        image_token_index=IMAGE,
        vision_feature_layer=[-2, 2],
    )


SPECIMENS = [
    Specimen("llava", llava_config, {"image": llava_image}, "LlavaForConditionalGeneration"),
    Specimen(
        "llava_next",
        llava_next_config,
        {"image": mosaic_image},
        "LlavaNextForConditionalGeneration",
    ),
    Specimen(
        "llava_next_video",
        llava_next_video_config,
        {"image": mosaic_image, "video": pooled_video},
        "LlavaNextVideoForConditionalGeneration",
    ),
    Specimen(
        "llava_onevision",
        llava_onevision_config,
        {"image": mosaic_image, "video": ended_video},
        "LlavaOnevisionForConditionalGeneration",
    ),
    Specimen(
        "video_llava",
        video_llava_config,
        {"image": small_image, "video": whole_video},
        "VideoLlavaForConditionalGeneration",
    ),
    Specimen(
        "vipllava", vipllava_config, {"image": llava_image}, "VipLlavaForConditionalGeneration"
    ),
]
