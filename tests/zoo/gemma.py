"""Gemma 3 and its relatives: image tokens that see each other, layers with sliding windows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import (
    Gemma3Config,
    Gemma4Config,
    Gemma4UnifiedConfig,
    GemmaConfig,
    PaliGemmaConfig,
    PreTrainedModel,
    ShieldGemma2Config,
    SiglipVisionConfig,
)

from zoo.specimen import (
    BEGIN,
    END,
    IMAGE,
    NUM_LAYERS,
    VIDEO,
    Picture,
    Specimen,
    pixels,
    text_sizes,
    vision_sizes,
)

LAYER_TYPES = ["sliding_attention", "sliding_attention", "full_attention"] * (NUM_LAYERS // 3)


def image_types(model: PreTrainedModel, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {"token_type_ids": (inputs["input_ids"] == IMAGE).long()}


def modality_types(model: PreTrainedModel, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    ids = inputs["input_ids"]
    return {"mm_token_type_ids": (ids == IMAGE).long() + 2 * (ids == VIDEO).long()}


def prefix_types(model: PreTrainedModel, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """A prompt is all prefix: every token of it sees every other."""
    return {"token_type_ids": torch.zeros_like(inputs["input_ids"])}


def gemma3_config(kind: Callable[..., Any] = Gemma3Config) -> Any:
    return kind(
        text_config=text_sizes(
            sliding_window=128, layer_types=LAYER_TYPES, query_pre_attn_scalar=8
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


def paligemma_config() -> PaliGemmaConfig:
    return PaliGemmaConfig(
        text_config=GemmaConfig(**text_sizes()),
        vision_config=SiglipVisionConfig(**vision_sizes()),
        projection_dim=32,
        image_token_index=IMAGE,
    )


def paligemma_image(model: PreTrainedModel, own: torch.Generator) -> Picture:
    return Picture([IMAGE] * 16, {"pixel_values": pixels(own, 1, 3, 32, 32)})


def gemma4_ids() -> dict[str, int]:
    return {
        "image_token_id": IMAGE,
        "video_token_id": VIDEO,
        "boi_token_id": BEGIN,
        "eoi_token_id": END,
        "audio_token_id": 104,
    }


def gemma4_text(**others: Any) -> dict[str, Any]:
    return text_sizes(
        sliding_window=128,
        layer_types=LAYER_TYPES,
        global_head_dim=16,
        attention_k_eq_v=True,
        num_global_key_value_heads=1,
        use_bidirectional_attention="vision",
        **others,
    )


def gemma4_config() -> Gemma4Config:
    """What its sizes have apart, together: inputs per layer, and images that see themselves."""
    return Gemma4Config(
        text_config=gemma4_text(hidden_size_per_layer_input=8, vocab_size_per_layer_input=128),
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "head_dim": 8,
            "pooling_kernel_size": 2,
            "patch_size": 4,
            "position_embedding_size": 64,
        },
        **gemma4_ids(),
    )


def coordinates(rows: int, columns: int, pads: int) -> Tensor:
    """Places of patches as (column, row), and pads."""
    order = torch.arange(rows * columns)
    places = torch.stack([order % columns, order // columns], 1)
    return torch.nn.functional.pad(places, (0, 0, 0, pads), value=-1)[None]


def gemma4_image(model: PreTrainedModel, own: torch.Generator) -> Picture:
    """A grid of 4 x 6 patches, pooled to 2 x 3 tokens, with pads up to 32 patches."""
    inputs = {
        "pixel_values": torch.rand(1, 32, 3 * 4 * 4, generator=own),
        "image_position_ids": coordinates(4, 6, 8),
    }
    return Picture([BEGIN] + [IMAGE] * 6 + [END], inputs)


def gemma4_video(model: PreTrainedModel, own: torch.Generator) -> Picture:
    """Two frames of 4 x 4 patches, 2 x 2 tokens each."""
    inputs = {
        "pixel_values_videos": torch.rand(2, 32, 3 * 4 * 4, generator=own),
        "video_position_ids": coordinates(4, 4, 16).expand(2, -1, -1),
        "num_frames_per_video": torch.tensor([2]),
    }
    frame = [BEGIN] + [VIDEO] * 4 + [END]
    return Picture([*frame, 7, *frame], inputs)


def gemma4_unified_config() -> Gemma4UnifiedConfig:
    return Gemma4UnifiedConfig(
        text_config=gemma4_text(),
        vision_config={
            "patch_size": 4,
            "pooling_kernel_size": 2,
            "mm_embed_dim": 32,
            "mm_posemb_size": 16,
            "output_proj_dims": 32,
        },
        **gemma4_ids(),
    )


def gemma4_unified_image(model: PreTrainedModel, own: torch.Generator) -> Picture:
    """A grid of 2 x 3 patches, a token each, with pads up to 8."""
    inputs = {
        "pixel_values": torch.rand(1, 8, 3 * 8 * 8, generator=own),
        "image_position_ids": coordinates(2, 3, 2),
    }
    return Picture([BEGIN] + [IMAGE] * 6 + [END], inputs)


def gemma4_unified_video(model: PreTrainedModel, own: torch.Generator) -> Picture:
    inputs = {
        "pixel_values_videos": torch.rand(2, 8, 3 * 8 * 8, generator=own),
        "video_position_ids": coordinates(2, 2, 4).expand(2, -1, -1),
        "num_frames_per_video": torch.tensor([2]),
    }
    frame = [BEGIN] + [VIDEO] * 4 + [END]
    return Picture([*frame, 7, *frame], inputs)


SPECIMENS = [
    Specimen(
        "gemma3",
        gemma3_config,
        {"image": gemma3_image},
        "Gemma3ForConditionalGeneration",
        extras=image_types,
    ),
    Specimen(  # the config of ShieldGemma 2 makes a Gemma 3
        "shieldgemma2",
        lambda: gemma3_config(ShieldGemma2Config),
        {"image": gemma3_image},
        "Gemma3ForConditionalGeneration",
        extras=image_types,
    ),
    Specimen(
        "paligemma",
        paligemma_config,
        {"image": paligemma_image},
        "PaliGemmaForConditionalGeneration",
        extras=prefix_types,
        unable={"prompt_lookup": "guesses join the prefix, whose tokens see each other"},
    ),
    Specimen(
        "gemma4",
        gemma4_config,
        {"image": gemma4_image, "video": gemma4_video},
        "Gemma4ForConditionalGeneration",
        extras=modality_types,
    ),
    Specimen(
        "gemma4_unified",
        gemma4_unified_config,
        {"image": gemma4_unified_image, "video": gemma4_unified_video},
        "Gemma4UnifiedForConditionalGeneration",
        extras=modality_types,
        unable={
            "static_cache": "its images see themselves in sliding layers only if the cache is "
            "fixed, and in all layers otherwise"
        },
    ),
]
