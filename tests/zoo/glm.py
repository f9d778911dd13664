"""GLM-V and other models that take patches and a grid per image."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

from zoo.qwen import ROPE, patches, qwen_image, qwen_vision, token_types
from zoo.specimen import (
    BEGIN,
    END,
    IMAGE,
    VIDEO,
    Picture,
    Specimen,
    pixels,
    text_sizes,
    vision_sizes,
)

VIDEO_BEGIN, VIDEO_END = 104, 105


def glm_ids() -> dict[str, int]:
    return {
        "image_token_id": IMAGE,
        "video_token_id": VIDEO,
        "image_start_token_id": BEGIN,
        "image_end_token_id": END,
        "video_start_token_id": VIDEO_BEGIN,
        "video_end_token_id": VIDEO_END,
    }


def half_rotated(**others: Any) -> dict[str, Any]:
    """Two heads of width 16, of which the first half is rotated."""
    sizes = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}
    return text_sizes(**sizes, rope_parameters=ROPE | {"partial_rotary_factor": 0.5}, **others)


def glm4v_config() -> Any:
    return transformers.Glm4vConfig(
        vision_config=qwen_vision(image_size=32), text_config=half_rotated(), **glm_ids()
    )


def glm46v_config() -> Any:
    return transformers.Glm46VConfig(
        vision_config={"model_type": "glm4v_vision"} | qwen_vision(image_size=32),
        text_config={"model_type": "glm4v_text"} | half_rotated(),
        **glm_ids(),
    )


def glm4v_moe_config() -> Any:
    experts = {
        "moe_intermediate_size": 16,
        "n_routed_experts": 2,
        "num_experts_per_tok": 1,
        "first_k_dense_replace": 1,
    }
    return transformers.Glm4vMoeConfig(
        vision_config=qwen_vision(image_size=32), text_config=half_rotated(**experts), **glm_ids()
    )


def glm_ocr_config() -> Any:
    return transformers.GlmOcrConfig(
        vision_config=qwen_vision(image_size=32),
        text_config=text_sizes(rope_parameters=ROPE),
        **glm_ids(),
    )


def ernie_config() -> Any:
    return transformers.Ernie4_5_VLMoeConfig(
        vision_config=qwen_vision(),
        text_config=text_sizes(
            rope_parameters=ROPE | {"mrope_section": [1, 1, 2]},
            moe_intermediate_size=[16, 8],
            moe_num_experts=2,
            moe_k=1,
            moe_num_shared_experts=1,
        ),
        **glm_ids(),
    )


def ernie_image(model: PreTrainedModel, own: torch.Generator) -> Picture:
    inputs = {
        "pixel_values": patches(model, own, 24, frames=1),
        "image_grid_thw": torch.tensor([[1, 4, 6]]),
    }
    return Picture([BEGIN] + [IMAGE] * 6 + [END], inputs)


def ernie_video(model: PreTrainedModel, own: torch.Generator) -> Picture:
    """Four frames of 2 x 3 tokens, of which two each become one."""
    inputs = {
        "pixel_values_videos": patches(model, own, 96, frames=1),
        "video_grid_thw": torch.tensor([[4, 4, 6]]),
    }
    return Picture([VIDEO_BEGIN] + [VIDEO] * 12 + [VIDEO_END], inputs)


def ernie_types(model: PreTrainedModel, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """For the experts, what stands around an image counts as image."""
    ids = inputs["input_ids"]
    of_image = (ids == IMAGE) | (ids == BEGIN) | (ids == END)
    of_video = (ids == VIDEO) | (ids == VIDEO_BEGIN) | (ids == VIDEO_END)
    moe = of_image.long() + 2 * of_video.long()
    return token_types(model, inputs) | {"moe_mm_token_type_ids": moe}


def paddleocr_config() -> Any:
    return transformers.PaddleOCRVLConfig(
        vision_config=vision_sizes(patch_size=4),
        text_config=text_sizes(rope_parameters=ROPE),
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=BEGIN,
        vision_end_token_id=END,
    )


def paddleocr_image(model: PreTrainedModel, own: torch.Generator) -> Picture:
    inputs = {
        "pixel_values": pixels(own, 24, 3, 4, 4),
        "image_grid_thw": torch.tensor([[1, 4, 6]]),
    }
    return Picture([BEGIN] + [IMAGE] * 6 + [END], inputs)


def video_llama_config() -> Any:
    return transformers.VideoLlama3Config(
        vision_config=vision_sizes(patch_size=4),
        text_config={"model_type": "qwen2"} | text_sizes(),
        image_token_id=IMAGE,
        video_token_id=VIDEO,
    )


def video_llama_image(model: PreTrainedModel, own: torch.Generator) -> Picture:
    """Not merged."""
    inputs = {
        "pixel_values": patches(model, own, 6, frames=1),
        "image_grid_thw": torch.tensor([[1, 2, 3]]),
        "image_merge_sizes": torch.tensor([1]),
    }
    return Picture([IMAGE] * 6, inputs)


def video_llama_video(model: PreTrainedModel, own: torch.Generator) -> Picture:
    """Two frames, merged 2 x 2; of the second, what looks like the first is left out."""
    kept = torch.tensor([True] * 6 + [False, True, True, False, True, False])
    inputs = {
        "pixel_values_videos": patches(model, own, 48, frames=1),
        "video_grid_thw": torch.tensor([[2, 4, 6]]),
        "video_merge_sizes": torch.tensor([2]),
        "video_compression_mask": kept,
    }
    return Picture([11] + [VIDEO] * 6 + [12] + [VIDEO] * 3, inputs)


#: A GLM video sits on image placeholders; the model takes no batch that has images besides.
SPECIMENS = [
    Specimen(
        "glm4v",
        glm4v_config,
        {"image": qwen_image},
        "Glm4vForConditionalGeneration",
        extras=token_types,
    ),
    Specimen(
        "glm46v",
        glm46v_config,
        {"image": qwen_image},
        "Glm46VForConditionalGeneration",
        extras=token_types,
    ),
    Specimen(
        "glm4v_moe",
        glm4v_moe_config,
        {"image": qwen_image},
        "Glm4vMoeForConditionalGeneration",
        extras=token_types,
    ),
    Specimen(
        "glm_ocr",
        glm_ocr_config,
        {"image": qwen_image},
        "GlmOcrForConditionalGeneration",
        extras=token_types,
    ),
    Specimen(
        "ernie4_5_vl_moe",
        ernie_config,
        {"image": ernie_image, "video": ernie_video},
        "Ernie4_5_VLMoeForConditionalGeneration",
        extras=ernie_types,
    ),
    Specimen(
        "paddleocr_vl",
        paddleocr_config,
        {"image": paddleocr_image},
        "PaddleOCRVLForConditionalGeneration",
        extras=token_types,
    ),
    Specimen(
        "video_llama_3",
        video_llama_config,
        {"image": video_llama_image, "video": video_llama_video},
        "VideoLlama3ForConditionalGeneration",
    ),
]
