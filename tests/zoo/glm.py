"""GLM-V and other models that take patches and a grid per image."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

from zoo.qwen import (
    ROPE,
    patches,
    qwen_ids,
    qwen_image,
    qwen_video,
    qwen_vision,
    stamped_video,
    token_types,
)
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


def glm_image(model: PreTrainedModel, own: torch.Generator) -> Picture:
    """The images of a row are alike: transformers mixes them up when it repeats a GLM's rows."""
    return qwen_image(model, torch.Generator().manual_seed(own.initial_seed()))


def glm4v_config() -> Any:
    return transformers.Glm4vConfig(
        vision_config=qwen_vision(image_size=32), text_config=half_rotated(), **glm_ids()
    )


def glm46v_config(kind: str = "Glm46VConfig") -> Any:
    return getattr(transformers, kind)(
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


def hunyuan_config() -> Any:
    """Four position axes, the first of which counts tokens."""
    return transformers.HunYuanVLConfig(
        vision_config=vision_sizes(patch_size=4, max_image_size=32, out_hidden_size=32),
        text_config=text_sizes(rope_parameters=ROPE | {"mrope_section": [1, 1, 1, 1]}),
        image_token_id=IMAGE,
        im_start_id=BEGIN,
        im_end_id=END,
        im_newline_id=110,
    )


def hunyuan_image(model: PreTrainedModel, own: torch.Generator) -> Picture:
    """Two rows of three tokens and a newline each, between two tokens more."""
    inputs = {
        "pixel_values": patches(model, own, 24, frames=1),
        "image_grid_thw": torch.tensor([[1, 4, 6]]),
    }
    return Picture([BEGIN] + [IMAGE] * 10 + [END], inputs)


def kimi_config() -> Any:
    """Queries, keys and values are projected from latent vectors."""
    return transformers.Kimi_K25Config(
        vision_config=vision_sizes(patch_size=4, pos_emb_height=8, pos_emb_width=8),
        text_config={"model_type": "deepseek_v3"}
        | text_sizes(
            num_key_value_heads=4,
            kv_lora_rank=16,
            q_lora_rank=16,
            qk_rope_head_dim=8,
            qk_nope_head_dim=8,
            v_head_dim=8,
            moe_intermediate_size=16,
            n_routed_experts=2,
            num_experts_per_tok=1,
            n_group=1,
            topk_group=1,
            first_k_dense_replace=1,
            num_mtp_layers=0,
        ),
        projection_hidden_size=32,
        **qwen_ids(),
    )


def kimi_image(model: PreTrainedModel, own: torch.Generator) -> Picture:
    inputs = {
        "pixel_values": pixels(own, 24, 3, 4, 4),
        "image_grid_thw": torch.tensor([[1, 4, 6]]),
    }
    return Picture([BEGIN] + [IMAGE] * 6 + [END], inputs)


def kimi_video(model: PreTrainedModel, own: torch.Generator) -> Picture:
    """One frame: transformers 5.23 takes no more in one grid."""
    inputs = {
        "pixel_values_videos": pixels(own, 24, 3, 4, 4),
        "video_grid_thw": torch.tensor([[1, 4, 6]]),
    }
    return Picture([11, BEGIN] + [VIDEO] * 6 + [END], inputs)


def exaone_config() -> Any:
    """Three layers with a sliding window, then one without, and without rotation."""
    return transformers.Exaone4_5_Config(
        vision_config=qwen_vision(window_size=16, fullatt_block_indexes=[1], num_key_value_heads=2),
        text_config={"model_type": "exaone4"} | text_sizes(sliding_window=128),
        image_token_id=IMAGE,
        video_token_id=VIDEO,
    )


def hyperclovax_config() -> Any:
    return transformers.HyperCLOVAXVisionV2Config(
        vision_config={"model_type": "qwen2_5_vl_vision"}
        | qwen_vision(window_size=16, fullatt_block_indexes=[1]),
        text_config={"model_type": "hyperclovax"} | text_sizes(attention_multiplier=0.2),
        image_token_id=IMAGE,
        video_token_id=VIDEO,
    )


def cosmos3_edge_config() -> Any:
    return transformers.Cosmos3EdgeConfig(
        vision_config=vision_sizes(patch_size=4, num_patches=16),
        text_config=text_sizes(rope_parameters=ROPE),
        projector_hidden_size=48,
        **qwen_ids(),
    )


def edge_video(model: PreTrainedModel, own: torch.Generator) -> Picture:
    """Every frame stands between tokens of its own, after its time."""
    ids = [token for time in (11, 12) for token in [time, BEGIN] + [VIDEO] * 6 + [END]]
    inputs = {
        "pixel_values_videos": patches(model, own, 48, frames=1),
        "video_grid_thw": torch.tensor([[2, 4, 6]]),
    }
    return Picture(ids, inputs)


def minimax_config() -> Any:
    """All layers attend to everything; those that choose blocks are refused."""
    return transformers.MiniMaxM3VLConfig(
        vision_config=vision_sizes(patch_size=4),
        text_config=text_sizes(
            num_local_experts=2,
            num_experts_per_tok=1,
            dense_intermediate_size=48,
            shared_intermediate_size=16,
            rotary_dim=4,
            rope_parameters={"rope_type": "default", "rope_theta": 1e4},
        ),
        projector_hidden_size=32,
        image_token_index=IMAGE,
        video_token_index=VIDEO,
    )


def muse_vision() -> dict[str, Any]:
    return vision_sizes(patch_size=4, pos_emb_height=4, pos_emb_width=4)


def muse_text(**others: Any) -> dict[str, Any]:
    """A sliding window in all layers but 1 and 5, which rotate nothing."""
    rope = {"rope_type": "default", "rope_theta": 1e4}
    return text_sizes(sliding_window=128, rope_parameters=rope, **others)


def muse_projector() -> dict[str, int]:
    return {"out_hidden_size": 128, "projector_hidden_size": 32}


def muse_glimmer_config() -> Any:
    return transformers.MuseGlimmerConfig(
        vision_config=muse_vision(),
        text_config=muse_text(),
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        **muse_projector(),
    )


def muse_spark_config() -> Any:
    return transformers.MuseSparkConfig(
        vision_config=muse_vision(),
        text_config=muse_text(
            moe_intermediate_size=16,
            moe_hidden_size=16,
            num_local_experts=2,
            num_experts_per_tok=1,
            qk_scale_factor=2.0,  # the default blows rounding up in so small a model
        ),
        audio_config={
            "patch_sizes": [2],
            "hidden_sizes": [8],
            "depths": [1],
            "num_hidden_layers": 1,
            "out_hidden_size": 32,
        },
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        audio_token_id=106,
        **muse_projector(),
    )


def muse_video(model: PreTrainedModel, own: torch.Generator) -> Picture:
    """Two moments, each after its time, between tokens of their own."""
    inputs = {
        "pixel_values_videos": patches(model, own, 48),
        "video_grid_thw": torch.tensor([[2, 4, 6]]),
    }
    return Picture([BEGIN, 11] + [VIDEO] * 6 + [110, 12] + [VIDEO] * 6 + [END], inputs)


def step_config() -> Any:
    """Layers with a sliding window have more heads, and a rotation of their own."""
    return transformers.Step3p7Config(
        vision_config=vision_sizes(patch_size=4, mlp_ratio=1.5, max_position_embeddings=64),
        text_config=text_sizes(
            layer_types=["full_attention", "sliding_attention", "sliding_attention"] * 2,
            sliding_window=128,
            num_sliding_attention_heads=6,
            rope_theta=[1e4, 5e3, 5e3] * 2,
            partial_rotary_factors=[0.5, 1.0, 1.0] * 2,
            moe_intermediate_size=16,
            n_routed_experts=2,
            num_experts_per_tok=1,
            share_expert_dim=16,
        ),
        image_token_id=IMAGE,
    )


def step_image(model: PreTrainedModel, own: torch.Generator) -> Picture:
    """Two crops and the whole, of 2 x 2 tokens each."""
    inputs = {
        "pixel_values": pixels(own, 1, 3, 32, 32),
        "pixel_values_local": pixels(own, 2, 3, 24, 24),
        "num_local_patches": torch.tensor([2]),
    }
    tokens = [IMAGE] * 4
    crop, whole = [104, *tokens, 105], [BEGIN, *tokens, END]
    return Picture([*crop, *crop, 110, *whole], inputs)


#: A GLM video sits on image placeholders; the model takes no batch that has images besides.
SPECIMENS = [
    Specimen(
        "glm4v",
        glm4v_config,
        {"image": glm_image},
        "Glm4vForConditionalGeneration",
        extras=token_types,
    ),
    Specimen(
        "glm46v",
        glm46v_config,
        {"image": glm_image},
        "Glm46VForConditionalGeneration",
        extras=token_types,
    ),
    Specimen(
        "glmga",
        lambda: glm46v_config("GlmgaConfig"),
        {"image": glm_image},
        "Glm46VForConditionalGeneration",
        extras=token_types,
    ),
    Specimen(
        "glm4v_moe",
        glm4v_moe_config,
        {"image": glm_image},
        "Glm4vMoeForConditionalGeneration",
        extras=token_types,
    ),
    Specimen(
        "glm_ocr",
        glm_ocr_config,
        {"image": glm_image},
        "GlmOcrForConditionalGeneration",
        extras=token_types,
    ),
    Specimen(
        "ernie4_5_vl_moe",
        ernie_config,
        {"image": ernie_image, "video": ernie_video},
        "Ernie4_5_VLMoeForConditionalGeneration",
        extras=ernie_types,
        unable=dict.fromkeys(
            ("prompt_lookup", "no_cache"), "generate does not lengthen moe_mm_token_type_ids"
        ),
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
    Specimen(
        "hunyuan_vl",
        hunyuan_config,
        {"image": hunyuan_image},
        "HunYuanVLForConditionalGeneration",
        extras=token_types,
        unable={"batch_is_alone": "it numbers images over the whole batch"},
    ),
    Specimen(
        "kimi_k25",
        kimi_config,
        {"image": kimi_image, "video": kimi_video},
        "Kimi_K25ForConditionalGeneration",
    ),
    Specimen(
        "exaone4_5",
        exaone_config,
        {"image": qwen_image, "video": qwen_video},
        "Exaone4_5_ForConditionalGeneration",
    ),
    Specimen(
        "hyperclovax_vision_v2",
        hyperclovax_config,
        {"image": qwen_image, "video": qwen_video},
        "HyperCLOVAXVisionV2ForConditionalGeneration",
    ),
    Specimen(
        "cosmos3_edge",
        cosmos3_edge_config,
        {"image": ernie_image, "video": edge_video},
        "Cosmos3EdgeForConditionalGeneration",
        extras=token_types,
    ),
    Specimen(
        "minimax_m3_vl",
        minimax_config,
        {"image": qwen_image, "video": stamped_video},
        "MiniMaxM3SparseForConditionalGeneration",
    ),
    Specimen(
        "muse_glimmer",
        muse_glimmer_config,
        {"image": qwen_image, "video": muse_video},
        "MuseGlimmerForConditionalGeneration",
    ),
    Specimen(
        "muse_spark",
        muse_spark_config,
        {"image": qwen_image, "video": muse_video},
        "MuseSparkForConditionalGeneration",
    ),
    Specimen(
        "step3p7",
        step_config,
        {"image": step_image},
        "Step3p7ForConditionalGeneration",
    ),
]
