"""Qwen-VL: variable grids, several position axes, DeepStack features."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

from zoo.specimen import BEGIN, END, IMAGE, VIDEO, Picture, Specimen, pixels, text_sizes

ROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}


def token_types(model: PreTrainedModel, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """1 for image tokens, 2 for video tokens, as the processors of transformers 5 say it."""
    ids = inputs["input_ids"]
    return {"mm_token_type_ids": (ids == IMAGE).long() + 2 * (ids == VIDEO).long()}


def qwen_ids() -> dict[str, int]:
    return {
        "image_token_id": IMAGE,
        "video_token_id": VIDEO,
        "vision_start_token_id": BEGIN,
        "vision_end_token_id": END,
    }


def qwen_vision(**others: Any) -> dict[str, Any]:
    """Sizes of a tiny image tower for patches of 4 x 4 pixels, merged 2 x 2."""
    return {
        "depth": 2,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_heads": 4,
        "out_hidden_size": 32,
        "patch_size": 4,
    } | others


def qwen_experts() -> dict[str, int]:
    return {"moe_intermediate_size": 16, "num_experts": 2, "num_experts_per_tok": 1}


def qwen2_vl_config() -> Any:
    return transformers.Qwen2VLConfig(
        vision_config={
            "depth": 2,
            "embed_dim": 32,
            "hidden_size": 32,
            "mlp_ratio": 2,
            "num_heads": 4,
            "patch_size": 4,
        },
        text_config=text_sizes(rope_parameters=ROPE),
        **qwen_ids(),
    )


def qwen2_5_vl_config() -> Any:
    return transformers.Qwen2_5_VLConfig(
        vision_config=qwen_vision(window_size=16, fullatt_block_indexes=[1]),
        text_config=text_sizes(rope_parameters=ROPE),
        **qwen_ids(),
    )


def qwen3_vision() -> dict[str, Any]:
    """Features of each of the two layers are added after decoder layers 0 and 1."""
    return qwen_vision(num_position_embeddings=64, deepstack_visual_indexes=[0, 1])


def qwen3_vl_config() -> Any:
    return transformers.Qwen3VLConfig(
        vision_config=qwen3_vision(), text_config=text_sizes(rope_parameters=ROPE), **qwen_ids()
    )


def cosmos3_omni_config() -> Any:
    return transformers.Cosmos3OmniConfig(
        vision_config={"model_type": "qwen3_vl_vision"} | qwen3_vision(),
        text_config={"model_type": "qwen3_vl_text"} | text_sizes(rope_parameters=ROPE),
        **qwen_ids(),
    )


def qwen3_vl_moe_config() -> Any:
    return transformers.Qwen3VLMoeConfig(
        vision_config=qwen3_vision(),
        text_config=text_sizes(rope_parameters=ROPE, **qwen_experts()),
        **qwen_ids(),
    )


def audio_sizes() -> dict[str, int]:
    """Sizes of a tiny audio tower, which no prompt of the zoo asks."""
    return {
        "encoder_layers": 1,
        "encoder_attention_heads": 2,
        "encoder_ffn_dim": 32,
        "d_model": 16,
        "num_mel_bins": 16,
        "output_dim": 32,
    }


#: The thinkers count positions from these.
OMNI_IDS = {
    "audio_token_id": 106,
    "audio_start_token_id": 107,
    "user_token_id": 108,
    "vision_start_token_id": BEGIN,
}


def qwen2_5_omni_config() -> Any:
    return transformers.Qwen2_5OmniThinkerConfig(
        vision_config=qwen_vision(window_size=16, fullatt_block_indexes=[1]),
        audio_config=audio_sizes(),
        text_config=text_sizes(rope_parameters=ROPE),
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        audio_end_token_id=109,
        **OMNI_IDS,
    )


def qwen3_omni_config() -> Any:
    return transformers.Qwen3OmniMoeThinkerConfig(
        vision_config=qwen3_vision(),
        audio_config=audio_sizes() | {"downsample_hidden_size": 8},
        text_config=text_sizes(rope_parameters=ROPE, **qwen_experts()),
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        **OMNI_IDS,
    )


def patches(model: PreTrainedModel, own: torch.Generator, number: int, frames: int = 2) -> Tensor:
    return pixels(own, number, 3 * frames * model.config.vision_config.patch_size**2)


def qwen_image(model: PreTrainedModel, own: torch.Generator) -> Picture:
    """A grid of 4 x 6 patches, merged to 2 x 3 tokens."""
    inputs = {
        "pixel_values": patches(model, own, 24),
        "image_grid_thw": torch.tensor([[1, 4, 6]]),
    }
    return Picture([BEGIN] + [IMAGE] * 6 + [END], inputs)


def video_inputs(model: PreTrainedModel, own: torch.Generator) -> dict[str, Tensor]:
    """Two times 4 x 6 patches."""
    return {
        "pixel_values_videos": patches(model, own, 48),
        "video_grid_thw": torch.tensor([[2, 4, 6]]),
    }


def qwen_video(model: PreTrainedModel, own: torch.Generator) -> Picture:
    return Picture([BEGIN] + [VIDEO] * 12 + [END], video_inputs(model, own))


def qwen2_5_video(model: PreTrainedModel, own: torch.Generator) -> Picture:
    inputs = video_inputs(model, own) | {"second_per_grid_ts": torch.tensor([1.0])}
    return Picture([BEGIN] + [VIDEO] * 12 + [END], inputs)


def omni_video(model: PreTrainedModel, own: torch.Generator) -> Picture:
    inputs = video_inputs(model, own) | {"video_second_per_grid": torch.tensor([1.0])}
    return Picture([BEGIN] + [VIDEO] * 12 + [END], inputs)


def stamped_video(model: PreTrainedModel, own: torch.Generator) -> Picture:
    """Every moment stands between tokens of its own, after its time."""
    ids = [token for time in (11, 12) for token in [time, BEGIN] + [VIDEO] * 6 + [END]]
    return Picture(ids, video_inputs(model, own))


SPECIMENS = [
    Specimen(
        "qwen2_vl",
        qwen2_vl_config,
        {"image": qwen_image, "video": qwen_video},
        "Qwen2VLForConditionalGeneration",
        extras=token_types,
    ),
    Specimen(
        "qwen2_5_vl",
        qwen2_5_vl_config,
        {"image": qwen_image, "video": qwen2_5_video},
        "Qwen2_5_VLForConditionalGeneration",
        extras=token_types,
    ),
    Specimen(
        "qwen3_vl",
        qwen3_vl_config,
        {"image": qwen_image, "video": stamped_video},
        "Qwen3VLForConditionalGeneration",
        extras=token_types,
    ),
    Specimen(
        "qwen3_vl_moe",
        qwen3_vl_moe_config,
        {"image": qwen_image, "video": stamped_video},
        "Qwen3VLMoeForConditionalGeneration",
        extras=token_types,
    ),
    Specimen(
        "qwen2_5_omni_thinker",
        qwen2_5_omni_config,
        {"image": qwen_image, "video": omni_video},
        "Qwen2_5OmniThinkerForConditionalGeneration",
    ),
    Specimen(
        "qwen3_omni_moe_thinker",
        qwen3_omni_config,
        {"image": qwen_image, "video": omni_video},
        "Qwen3OmniMoeThinkerForConditionalGeneration",
    ),
    Specimen(
        "cosmos3_omni",
        cosmos3_omni_config,
        {"image": qwen_image, "video": stamped_video},
        "Cosmos3OmniForConditionalGeneration",
        extras=token_types,
    ),
]
