"""Types that depart from LLaVA in a way of their own: NoPE layers, latent attention, OPT."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import (
    Blip2Config,
    Cohere2Config,
    Cohere2VisionConfig,
    CohereCompassConfig,
    DeepseekOcr2Config,
    InstructBlipConfig,
    InstructBlipVideoConfig,
    Kosmos2_5Config,
    Kosmos2Config,
    Llama4Config,
    Mistral3Config,
    Mistral4Config,
    Molmo2Config,
    OPTConfig,
    PixtralVisionConfig,
    PreTrainedModel,
    SiglipVisionConfig,
)

from zoo.specimen import (
    BEGIN,
    END,
    IMAGE,
    NUM_LAYERS,
    PAD,
    TEXT,
    VIDEO,
    VOCABULARY,
    Picture,
    Specimen,
    pixels,
    text_sizes,
    vision_sizes,
)

HALF_LOCAL = ["sliding_attention", "sliding_attention", "full_attention"] * (NUM_LAYERS // 3)


def modality_types(model: PreTrainedModel, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """1 for image tokens, 2 for video tokens."""
    ids = inputs["input_ids"]
    return {"mm_token_type_ids": (ids == IMAGE).long() + 2 * (ids == VIDEO).long()}


def cohere2_vision_config() -> Cohere2VisionConfig:
    """Rotary positions in the local layers, none in the others."""
    return Cohere2VisionConfig(
        text_config=Cohere2Config(**text_sizes(sliding_window=128, layer_types=HALF_LOCAL)),
        vision_config=SiglipVisionConfig(**vision_sizes()),
        alignment_intermediate_size=64,
        image_token_id=IMAGE,
    )


def cohere2_vision_image(model: PreTrainedModel, own: torch.Generator) -> Picture:
    """A tile of 4 x 4 patches, merged to 2 x 2 tokens."""
    return Picture([BEGIN] + [IMAGE] * 4 + [END], {"pixel_values": pixels(own, 1, 3, 32, 32)})


def cohere_compass_config() -> CohereCompassConfig:
    """Layers without rotary positions get no `position_embeddings` at all."""
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}
    return CohereCompassConfig(
        text_config=text_sizes(
            sliding_window=128,
            layer_types=HALF_LOCAL,
            rope_parameters={"sliding_attention": rope, "full_attention": None},
            logit_scale=0.25,
        ),
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_heads": 4,
            "patch_size": 4,
            "out_hidden_size": 32,
            "num_position_embeddings": 16,
            "deepstack_visual_indexes": [0, 1],
        },
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=BEGIN,
        vision_end_token_id=END,
    )


def cohere_compass_image(model: PreTrainedModel, own: torch.Generator) -> Picture:
    """A grid of 4 x 6 patches, merged to 2 x 3 tokens."""
    inputs = {
        "pixel_values": pixels(own, 24, 3 * 2 * 4 * 4),
        "image_grid_thw": torch.tensor([[1, 4, 6]]),
    }
    return Picture([BEGIN] + [IMAGE] * 6 + [END], inputs)


def cohere_compass_video(model: PreTrainedModel, own: torch.Generator) -> Picture:
    """Two frames of 2 x 2 tokens, each after its time stamp."""
    frame = [7, BEGIN] + [VIDEO] * 4 + [END]
    inputs = {
        "pixel_values_videos": pixels(own, 2 * 16, 3 * 2 * 4 * 4),
        "video_grid_thw": torch.tensor([[2, 4, 4]]),
    }
    return Picture(frame + frame, inputs)


def llama4_config() -> Llama4Config:
    """Chunked attention with complex rotary embeddings; every third layer full, without any."""
    return Llama4Config(
        text_config=text_sizes(
            intermediate_size_mlp=48,
            num_local_experts=2,
            interleave_moe_layer_step=2,
            no_rope_layer_interval=3,
            attention_chunk_size=128,
            floor_scale=128,
        ),
        vision_config=vision_sizes(
            vision_output_dim=32,
            projector_input_dim=32,
            projector_output_dim=32,
            intermediate_size=128,
        ),
        boi_token_index=BEGIN,
        eoi_token_index=END,
        image_token_index=IMAGE,
    )


def llama4_image(model: PreTrainedModel, own: torch.Generator) -> Picture:
    return Picture([BEGIN] + [IMAGE] * 4 + [END], {"pixel_values": pixels(own, 1, 3, 32, 32)})


def molmo2_config() -> Molmo2Config:
    """Norms behind attention, scaled and unscaled rotary embeddings; images see each other."""
    return Molmo2Config(
        text_config={
            **text_sizes(vocab_size=96, additional_vocab_size=32),
            "norm_after": True,
            "qk_norm_type": "olmo",
            "rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0},
            "rope_scaling_layers": [0, 3, 4],
        },
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "head_dim": 8,
            "image_size": [32, 32],
            "patch_size": 8,
        },
        adapter_config={
            "vision_feature_layer": [1, 0],
            "hidden_size": 32,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "head_dim": 8,
            "intermediate_size": 48,
            "text_hidden_size": 32,
        },
        image_patch_id=IMAGE,
        image_start_token_id=BEGIN,
        image_end_token_id=END,
        low_res_image_start_token_id=104,
        frame_start_token_id=105,
        frame_end_token_id=106,
    )


def molmo2_image(model: PreTrainedModel, own: torch.Generator) -> Picture:
    """A thumbnail and one crop: 2 x 2 tokens each, of 2 x 2 patches each."""
    corner = torch.tensor([0, 2, 8, 10])[:, None] + torch.tensor([0, 1, 4, 5])
    inputs = {
        "pixel_values": pixels(own, 2, 16, 3 * 8 * 8),
        "image_token_pooling": torch.cat([corner, corner + 16]),
        "image_grids": torch.tensor([[2, 2, 2, 2]]),
        "image_num_crops": torch.tensor([2]),
    }
    grid = [BEGIN] + [IMAGE] * 4 + [END]
    return Picture([104, *grid[1:], *grid], inputs)


def molmo2_join(pictures: list[list[Picture]]) -> dict[str, Tensor]:
    """Patches are counted through the batch: an image's begin where those of the last one end."""
    parts: dict[str, list[Tensor]] = {}
    start = 0
    for picture in [picture for row in pictures for picture in row]:
        for key, value in picture.inputs.items():
            parts.setdefault(key, []).append(
                value + start if key == "image_token_pooling" else value
            )
        start += picture.inputs["pixel_values"].shape[:2].numel()
    return {key: torch.cat(values) for key, values in parts.items()}


def molmo2_types(model: PreTrainedModel, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {"mm_token_type_ids": (inputs["input_ids"] >= IMAGE).long()}


def mistral4_config() -> Mistral3Config:
    """Latent keys and values, queries scaled by position, experts."""
    text = text_sizes(
        num_key_value_heads=4,
        q_lora_rank=16,
        kv_lora_rank=8,
        qk_nope_head_dim=4,
        qk_rope_head_dim=4,
        v_head_dim=8,
        n_routed_experts=2,
        num_experts_per_tok=1,
        moe_intermediate_size=16,
        first_k_dense_replace=2,
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": 1e4,
            "factor": 8.0,
            "original_max_position_embeddings": 8,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "llama_4_scaling_beta": 0.1,
        },
    )
    text.pop("head_dim")
    return Mistral3Config(
        vision_config=PixtralVisionConfig(**vision_sizes(patch_size=4), head_dim=8),
        text_config=Mistral4Config(**text),
        image_token_index=IMAGE,
    )


def own_positions(model: PreTrainedModel, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Its queries are scaled by where they stand, which pads must not change."""
    return {"position_ids": (inputs["attention_mask"].cumsum(1) - 1).clamp_min(0)}


def pixtral_image(model: PreTrainedModel, own: torch.Generator) -> Picture:
    """4 x 6 patches merged to 2 x 3 tokens, with a break after each row."""
    inputs = {
        "pixel_values": pixels(own, 1, 3, 16, 24),
        "image_sizes": torch.tensor([[16, 24]]),
    }
    return Picture([IMAGE] * 3 + [BEGIN] + [IMAGE] * 3 + [END], inputs)


def blip_parts() -> dict[str, Any]:
    """A tower, a Q-Former with 4 queries, and OPT, which has learned positions."""
    qformer = vision_sizes(vocab_size=VOCABULARY, encoder_hidden_size=32)
    qformer |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    text = text_sizes(ffn_dim=48, word_embed_proj_dim=32, dropout=0.0)
    for name in ("head_dim", "intermediate_size", "num_key_value_heads"):
        text.pop(name)
    return {
        "vision_config": vision_sizes(),
        "qformer_config": qformer,
        "text_config": OPTConfig(**text).to_dict(),
        "num_query_tokens": 4,
    }


def blip2_config() -> Blip2Config:
    return Blip2Config(**blip_parts(), image_token_index=IMAGE)


def blip2_image(model: PreTrainedModel, own: torch.Generator) -> Picture:
    return Picture([IMAGE] * 4, {"pixel_values": pixels(own, 1, 3, 32, 32)})


def no_picture(model: PreTrainedModel, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """These cannot be called without pixels; those of a text go nowhere."""
    return {} if "pixel_values" in inputs else {"pixel_values": torch.zeros(1, 3, 32, 32)}


def instructblip_config() -> InstructBlipConfig:
    return InstructBlipConfig(**blip_parts(), image_token_index=IMAGE)


def question(own: torch.Generator) -> dict[str, Tensor]:
    ids = torch.randint(1, TEXT, (1, 3), generator=own)
    return {"qformer_input_ids": ids, "qformer_attention_mask": torch.ones_like(ids)}


def instructblip_image(model: PreTrainedModel, own: torch.Generator) -> Picture:
    inputs = {"pixel_values": pixels(own, 1, 3, 32, 32)} | question(own)
    return Picture([IMAGE] * 4, inputs)


def no_question(model: PreTrainedModel, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    if "pixel_values" in inputs:
        return {}
    frames = () if model.config.model_type == "instructblip" else (2,)
    blank = torch.ones(1, 3, dtype=torch.int64)
    return {
        "pixel_values": torch.zeros(1, *frames, 3, 32, 32),
        "qformer_input_ids": blank,
        "qformer_attention_mask": blank,
    }


def instructblipvideo_config() -> InstructBlipVideoConfig:
    return InstructBlipVideoConfig(**blip_parts(), video_token_index=VIDEO)


def instructblip_video(model: PreTrainedModel, own: torch.Generator) -> Picture:
    """Two frames of 4 tokens."""
    inputs = {"pixel_values": pixels(own, 1, 2, 3, 32, 32)} | question(own)
    return Picture([VIDEO] * 8, inputs)


def kosmos_text() -> dict[str, Any]:
    return {
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 512,
        "embed_dim": 32,
        "layers": NUM_LAYERS,
        "ffn_dim": 48,
        "attention_heads": 4,
        "dropout": 0.0,
        "attention_dropout": 0.0,
        "pad_token_id": PAD,
        "bos_token_id": None,
        "eos_token_id": None,
    }


def kosmos2_config() -> Kosmos2Config:
    """Names no placeholder ids: a mask says where the image goes, and the engine asks for one."""
    return Kosmos2Config(
        text_config=kosmos_text(), vision_config=vision_sizes(), latent_query_num=4
    )


def kosmos2_5_config() -> Kosmos2_5Config:
    vision = vision_sizes(head_dim=8, patch_embed_hidden_size=48, max_num_patches=16)
    vision = {k: v for k, v in vision.items() if k not in ("image_size", "patch_size")}
    return Kosmos2_5Config(text_config=kosmos_text(), vision_config=vision, latent_query_num=4)


def kosmos2_5_image(model: PreTrainedModel, own: torch.Generator) -> Picture:
    """6 patches, each after its row and column."""
    places = torch.tensor([[1 + i // 3, 1 + i % 3] for i in range(6)])
    patches = torch.cat([places, pixels(own, 6, 48)], 1)[None]
    return Picture([BEGIN] + [IMAGE] * 4 + [END], {"flattened_patches": patches})


def kosmos2_image(model: PreTrainedModel, own: torch.Generator) -> Picture:
    inputs = {"pixel_values": pixels(own, 1, 3, 32, 32)}
    return Picture([BEGIN] + [IMAGE] * 4 + [END], inputs)


def image_mask(model: PreTrainedModel, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {"image_embeds_position_mask": (inputs["input_ids"] == IMAGE).long()}


def deepseek_ocr2_config() -> DeepseekOcr2Config:
    return DeepseekOcr2Config(
        text_config=text_sizes(
            num_key_value_heads=4,
            n_routed_experts=2,
            n_shared_experts=1,
            num_experts_per_tok=1,
            moe_intermediate_size=16,
            mlp_layer_types=["dense"] * 2 + ["sparse"] * (NUM_LAYERS - 2),
        ),
        vision_config={
            "sam_config": {
                "hidden_size": 32,
                "output_channels": 16,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "image_size": 32,
                "patch_size": 4,
                "window_size": 4,
                "global_attn_indexes": [1],
                "downsample_channels": [24, 32],
            },
            "encoder_config": {
                "hidden_size": 32,
                "intermediate_size": 48,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
            },
        },
        image_token_id=IMAGE,
    )


def deepseek_ocr2_image(model: PreTrainedModel, own: torch.Generator) -> Picture:
    """A page without tiles: one token per query of the tower, which are never fewer, and one."""
    return Picture([IMAGE] * 145, {"pixel_values": pixels(own, 1, 3, 32, 32)})


NO_MAPS = {"scores": "its output has no attention maps"}

SPECIMENS = [
    Specimen(
        "cohere2_vision",
        cohere2_vision_config,
        {"image": cohere2_vision_image},
        "Cohere2VisionForConditionalGeneration",
    ),
    Specimen(
        "cohere_compass",
        cohere_compass_config,
        {"image": cohere_compass_image, "video": cohere_compass_video},
        "CohereCompassForConditionalGeneration",
        extras=modality_types,
    ),
    Specimen(
        "llama4",
        llama4_config,
        {"image": llama4_image},
        "Llama4ForConditionalGeneration",
        unable=dict.fromkeys(
            ("sampling", "beams"), "generate does not repeat the images for the rows that it adds"
        ),
    ),
    Specimen(
        "molmo2",
        molmo2_config,
        {"image": molmo2_image},
        "Molmo2ForConditionalGeneration",
        join=molmo2_join,
        extras=molmo2_types,
    ),
    Specimen(  # the text model that the mapping names, where it sees images
        "mistral4",
        mistral4_config,
        {"image": pixtral_image},
        "Mistral3ForConditionalGeneration",
        extras=own_positions,
    ),
    Specimen(
        "blip-2",
        blip2_config,
        {"image": blip2_image},
        "Blip2ForConditionalGeneration",
        extras=no_picture,
        unable=NO_MAPS,
    ),
    Specimen(
        "instructblip",
        instructblip_config,
        {"image": instructblip_image},
        "InstructBlipForConditionalGeneration",
        extras=no_question,
        unable=NO_MAPS,
    ),
    Specimen(
        "instructblipvideo",
        instructblipvideo_config,
        {"image": instructblip_video},
        "InstructBlipVideoForConditionalGeneration",
        extras=no_question,
        unable=NO_MAPS,
    ),
    Specimen(
        "kosmos-2",
        kosmos2_config,
        {"image": kosmos2_image},
        "Kosmos2ForConditionalGeneration",
        extras=image_mask,
    ),
    Specimen(
        "kosmos-2.5",
        kosmos2_5_config,
        {"image": kosmos2_5_image},
        "Kosmos2_5ForConditionalGeneration",
        extras=image_mask,
    ),
    Specimen(
        "deepseek_ocr2",
        deepseek_ocr2_config,
        {"image": deepseek_ocr2_image},
        "DeepseekOcr2ForConditionalGeneration",
    ),
]
