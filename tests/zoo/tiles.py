"""Models whose processors cut images into tiles, and others that count tokens per image."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import (
    AriaConfig,
    AyaVisionConfig,
    ChameleonConfig,
    Cohere2Config,
    DeepseekVLConfig,
    DeepseekVLHybridConfig,
    Emu3Config,
    FuyuConfig,
    GotOcr2Config,
    Granite4VisionConfig,
    GraniteDoclingConfig,
    Idefics2Config,
    Idefics3Config,
    InternVLConfig,
    JanusConfig,
    LightOnOcrConfig,
    LlamaConfig,
    Mistral3Config,
    MistralConfig,
    Ovis2Config,
    PixtralVisionConfig,
    PPChart2TableConfig,
    PreTrainedModel,
    QianfanOCRConfig,
    Qwen2Config,
    Qwen3Config,
    SiglipVisionConfig,
    SmolVLMConfig,
)

from zoo.llava import mosaic_image, small_image
from zoo.specimen import (
    BEGIN,
    END,
    IMAGE,
    NUM_LAYERS,
    PAD,
    VOCABULARY,
    Picture,
    Specimen,
    pixels,
    text_sizes,
    vision_sizes,
)

#: Tokens that processors put between tiles and rows of an image.
TILE, GLOBAL, BREAK = 104, 105, 106
#: First of the tokens that stand for codes of an image.
CODES = 110


def internvl_config() -> InternVLConfig:
    return InternVLConfig(
        vision_config=vision_sizes(),
        text_config=Qwen2Config(**text_sizes()),
        image_token_id=IMAGE,
    )


def internvl_image(model: PreTrainedModel, own: torch.Generator) -> Picture:
    """Two tiles and the whole image, 2 x 2 tokens each."""
    return Picture([BEGIN] + [IMAGE] * 12 + [END], {"pixel_values": pixels(own, 3, 3, 32, 32)})


def internvl_video(model: PreTrainedModel, own: torch.Generator) -> Picture:
    """Two frames."""
    frame = [TILE, BEGIN] + [IMAGE] * 4 + [END]
    return Picture(frame * 2, {"pixel_values": pixels(own, 2, 3, 32, 32)})


def smolvlm_config() -> SmolVLMConfig:
    return SmolVLMConfig(**idefics3_parts())


def idefics3_config() -> Idefics3Config:
    return Idefics3Config(**idefics3_parts())


def idefics3_parts() -> dict[str, object]:
    return {
        "vision_config": vision_sizes(),
        "text_config": LlamaConfig(**text_sizes()),
        "image_token_id": IMAGE,
        "pad_token_id": PAD,
    }


def idefics2_config() -> Idefics2Config:
    return Idefics2Config(
        vision_config=vision_sizes(),
        perceiver_config={
            "hidden_size": 32,
            "resampler_n_latents": 4,
            "resampler_depth": 1,
            "resampler_n_heads": 4,
            "resampler_head_dim": 8,
            "num_key_value_heads": 2,
        },
        text_config=MistralConfig(**text_sizes(sliding_window=128)),
        image_token_id=IMAGE,
    )


def tiles_of_row(own: torch.Generator, count: int) -> dict[str, Tensor]:
    return {
        "pixel_values": pixels(own, count, 3, 32, 32),
        "pixel_attention_mask": torch.ones(count, 32, 32, dtype=torch.int64),
    }


def tiled_image(model: PreTrainedModel, own: torch.Generator) -> Picture:
    """Two tiles and the whole image, each of four tokens after a word on where it is."""
    four = [IMAGE] * 4
    ids = [BEGIN, TILE, *four, BEGIN, TILE, *four, BREAK, BEGIN, GLOBAL, *four, BEGIN]
    return Picture(ids, tiles_of_row(own, 3))


def framed_video(model: PreTrainedModel, own: torch.Generator) -> Picture:
    """Two frames, each of four tokens after its time."""
    frame = [TILE, BEGIN, GLOBAL] + [IMAGE] * 4 + [BEGIN]
    return Picture(frame * 2, tiles_of_row(own, 2))


def plain_image(model: PreTrainedModel, own: torch.Generator) -> Picture:
    return Picture([BEGIN] + [IMAGE] * 4 + [BEGIN], tiles_of_row(own, 1))


def stack_rows(pictures: Sequence[Sequence[Picture]]) -> dict[str, Tensor]:
    """Images of a row along dimension 1, filled up with zeros."""
    joined = {}
    first = next(picture for row in pictures for picture in row)
    for key, value in first.inputs.items():
        blank = value[:0]
        rows = [torch.cat([blank, *(picture.inputs[key] for picture in row)]) for row in pictures]
        joined[key] = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    return joined


def mistral3_config() -> Mistral3Config:
    vision = vision_sizes(patch_size=4) | {"head_dim": 8}
    return Mistral3Config(
        vision_config=PixtralVisionConfig(**vision),
        text_config=MistralConfig(**text_sizes(sliding_window=None)),
        image_token_index=IMAGE,
    )


def pixtral_image(model: PreTrainedModel, own: torch.Generator) -> Picture:
    """4 x 6 patches merged to 2 x 3 tokens, with a break after each row."""
    ids = [IMAGE] * 3 + [BREAK] + [IMAGE] * 3 + [END]
    inputs = {
        "pixel_values": pixels(own, 1, 3, 16, 24),
        "image_sizes": torch.tensor([[16, 24]]),
    }
    return Picture(ids, inputs)


def aya_vision_config() -> AyaVisionConfig:
    text = text_sizes(
        sliding_window=128,
        layer_types=["sliding_attention", "sliding_attention", "full_attention"]
        * (NUM_LAYERS // 3),
    )
    return AyaVisionConfig(
        vision_config=SiglipVisionConfig(**vision_sizes(), vision_use_head=False),
        text_config=Cohere2Config(**text),
        image_token_index=IMAGE,
    )


def aya_image(model: PreTrainedModel, own: torch.Generator) -> Picture:
    """A tile and the whole image, 2 x 2 tokens each."""
    ids = [BEGIN, TILE] + [IMAGE] * 4 + [GLOBAL] + [IMAGE] * 4 + [END]
    return Picture(ids, {"pixel_values": pixels(own, 2, 3, 32, 32)})


def got_ocr2_parts() -> dict[str, object]:
    vision = vision_sizes(
        patch_size=4, mlp_dim=48, output_channels=8, window_size=4, global_attn_indexes=[1]
    )
    return {
        "vision_config": vision,
        "text_config": Qwen2Config(**text_sizes()),
        "image_token_index": IMAGE,
    }


def got_ocr2_config() -> GotOcr2Config:
    return GotOcr2Config(**got_ocr2_parts())


def pp_chart2table_config() -> PPChart2TableConfig:
    return PPChart2TableConfig(**got_ocr2_parts())


def got_image(model: PreTrainedModel, own: torch.Generator) -> Picture:
    """Two crops of 2 x 2 tokens."""
    return Picture([BEGIN] + [IMAGE] * 8 + [END], {"pixel_values": pixels(own, 2, 3, 32, 32)})


def chart_image(model: PreTrainedModel, own: torch.Generator) -> Picture:
    return Picture([BEGIN] + [IMAGE] * 4 + [END], {"pixel_values": pixels(own, 1, 3, 32, 32)})


def ovis2_config() -> Ovis2Config:
    return Ovis2Config(
        vision_config=vision_sizes(vocab_size=24, hidden_stride=2),
        text_config=Qwen2Config(**text_sizes()),
        image_token_id=IMAGE,
        visual_indicator_token_ids=list(range(CODES, CODES + 5)),
        vocab_size=VOCABULARY,
        hidden_size=32,
    )


def ovis2_image(model: PreTrainedModel, own: torch.Generator) -> Picture:
    """The whole image and two tiles of four tokens, between indicators of their places."""
    four = [IMAGE] * 4
    start, sep, column, row, end = range(CODES, CODES + 5)
    ids = [start, *four, sep, *four, column, *four, row, end]
    return Picture(ids, {"pixel_values": pixels(own, 3, 3, 32, 32)})


def lighton_ocr_config() -> LightOnOcrConfig:
    return LightOnOcrConfig(
        vision_config=PixtralVisionConfig(**vision_sizes(patch_size=4), head_dim=8),
        text_config=Qwen3Config(**text_sizes()),
        image_token_id=IMAGE,
    )


def lighton_image(model: PreTrainedModel, own: torch.Generator) -> Picture:
    inputs = pixtral_image(model, own).inputs
    return Picture([IMAGE] * 6, inputs)


def deepseek_vl_config() -> DeepseekVLConfig:
    return DeepseekVLConfig(
        vision_config=SiglipVisionConfig(**vision_sizes(image_size=16)),
        text_config=LlamaConfig(**text_sizes()),
        image_token_id=IMAGE,
    )


def deepseek_vl_hybrid_config() -> DeepseekVLHybridConfig:
    fine = vision_sizes(
        patch_size=4,
        mlp_dim=48,
        output_channels=8,
        window_size=4,
        global_attn_indexes=[1],
        num_pos_feats=4,
    )
    return DeepseekVLHybridConfig(
        vision_config=SiglipVisionConfig(**vision_sizes(image_size=16)).to_dict(),
        high_res_vision_config=fine | {"model_type": "sam_vision_model"},
        text_config=LlamaConfig(**text_sizes()),
        image_token_id=IMAGE,
    )


def hybrid_image(model: PreTrainedModel, own: torch.Generator) -> Picture:
    """One image at two resolutions."""
    inputs = {
        "pixel_values": pixels(own, 1, 3, 16, 16),
        "high_res_pixel_values": pixels(own, 1, 3, 32, 32),
    }
    return Picture([IMAGE] * 4, inputs)


def janus_config() -> JanusConfig:
    return JanusConfig(
        vision_config=vision_sizes(image_size=16, projection_dim=32, num_image_tokens=4),
        vq_config={
            "embed_dim": 8,
            "num_embeddings": 16,
            "latent_channels": 32,
            "base_channels": 32,
            "channel_multiplier": [1],
            "num_res_blocks": 1,
            "projection_dim": 32,
            "image_token_embed_dim": 32,
        },
        text_config=LlamaConfig(**text_sizes()),
        image_token_id=IMAGE,
    )


def janus_image(model: PreTrainedModel, own: torch.Generator) -> Picture:
    return Picture([BEGIN] + [IMAGE] * 4 + [END], {"pixel_values": pixels(own, 1, 3, 16, 16)})


def qianfan_ocr_config() -> QianfanOCRConfig:
    return QianfanOCRConfig(
        vision_config=vision_sizes(drop_path_rate=0.0),
        text_config=Qwen3Config(**text_sizes()),
        image_token_id=IMAGE,
    )


def granite4_vision_config() -> Granite4VisionConfig:
    """Image features are added before each of the layers 0 to 3."""
    return Granite4VisionConfig(
        vision_config=vision_sizes(
            model_type="clip_vision_model", hidden_size=64, image_size=16, patch_size=4
        ),
        text_config=text_sizes(attention_multiplier=0.3, residual_multiplier=0.5),
        qformer_config={
            "model_type": "blip_2_qformer",
            "num_hidden_layers": 1,
            "intermediate_size": 48,
            "cross_attention_frequency": 1,
            "use_qformer_text_input": False,
            "hidden_dropout_prob": 0.0,
            "attention_probs_dropout_prob": 0.0,
        },
        image_token_index=IMAGE,
        image_grid_pinpoints=[[32, 32]],
        downsample_rate="1/2",
        deepstack_layer_map=[[-2, 0], [-1, 1]],
        spatial_target_layers=[2, 3],
        projector_dropout=0.0,
    )


def aria_config() -> AriaConfig:
    return AriaConfig(
        vision_config=vision_sizes(model_type="idefics3_vision"),
        text_config=text_sizes(moe_num_experts=2, moe_topk=1, moe_num_shared_experts=1),
        projector_patch_to_query_dict={16: 4},
        image_token_index=IMAGE,
    )


def aria_image(model: PreTrainedModel, own: torch.Generator) -> Picture:
    """Two crops of four tokens; the second is half padding."""
    mask = torch.ones(2, 32, 32, dtype=torch.bool)
    mask[1, 16:] = False
    return Picture([IMAGE] * 8, {"pixel_values": pixels(own, 2, 3, 32, 32), "pixel_mask": mask})


def fuyu_config() -> FuyuConfig:
    rope = {"rope_type": "default", "rope_theta": 25000.0, "partial_rotary_factor": 0.5}
    return FuyuConfig(
        text_config=text_sizes(model_type="persimmon", rope_parameters=rope),
        patch_size=8,
        image_token_id=IMAGE,
    )


def fuyu_image(model: PreTrainedModel, own: torch.Generator) -> Picture:
    """Two rows of three patches, each followed by a break."""
    row = [IMAGE] * 3 + [BREAK]
    return Picture(row * 2 + [END], {"pixel_values": pixels(own, 6, 8 * 8 * 3)})


def emu3_config() -> Emu3Config:
    codes = {f"<|visual token {code:06d}|>": CODES + code for code in range(8)}
    return Emu3Config(
        vq_config={
            "codebook_size": 8,
            "base_channels": 32,
            "channel_multiplier": [1, 1],
            "num_res_blocks": 1,
            "attn_resolutions": [],
            "hidden_size": 32,
            "temporal_downsample_factor": 2,
        },
        text_config=text_sizes(attention_dropout=0.0, bos_token_id=BEGIN),
        vocabulary_map={"<image>": IMAGE, "<|extra_200|>": BREAK} | codes,
    )


def emu3_image(model: PreTrainedModel, own: torch.Generator) -> Picture:
    """2 x 3 codes and an end of line in each row, all behind placeholders."""
    inputs = {"pixel_values": pixels(own, 1, 3, 4, 6), "image_sizes": torch.tensor([[4, 6]])}
    return Picture([BEGIN, TILE] + [IMAGE] * 8 + [GLOBAL, END], inputs)


def chameleon_config() -> ChameleonConfig:
    codes = {f"IMGIMG{'ABCDEFGH'[code]}Z": CODES + code for code in range(8)}
    return ChameleonConfig(
        **text_sizes(),
        vq_config={
            "embed_dim": 8,
            "num_embeddings": 8,
            "latent_channels": 8,
            "resolution": 8,
            "base_channels": 32,
            "channel_multiplier": [1, 1],
            "num_res_blocks": 1,
        },
        vocabulary_map={"<image>": IMAGE} | codes,
    )


def chameleon_image(model: PreTrainedModel, own: torch.Generator) -> Picture:
    return Picture([BEGIN] + [IMAGE] * 16 + [END], {"pixel_values": pixels(own, 1, 3, 8, 8)})


def granite_docling_config() -> GraniteDoclingConfig:
    """Image features are added after the layers 0 and 1."""
    return GraniteDoclingConfig(
        vision_config=vision_sizes(
            patch_size=4,
            out_hidden_size=32,
            deepstack_visual_indexes=[0, 1],
            use_fine_route=False,
        ),
        text_config=text_sizes(attention_multiplier=0.3),
        image_token_id=IMAGE,
        pad_token_id=PAD,
    )


def docling_image(model: PreTrainedModel, own: torch.Generator) -> Picture:
    """As `tiled_image`, with a mask that tells tiles from padding."""
    inputs = {
        "pixel_values": pixels(own, 3, 3, 32, 32),
        "pixel_attention_mask": torch.ones(3, dtype=torch.bool),
    }
    return Picture(tiled_image(model, own).ids, inputs)


#: Faults of transformers 5.23 itself where generation expands a batch.
_INTERLEAVED = "of a row with two images, A and B, the expanded rows are shown A, A, B, B"
_NOT_EXPANDED = "encoded images are not expanded with the rows"

SPECIMENS = [
    Specimen(
        "internvl",
        internvl_config,
        {"image": internvl_image, "video": internvl_video},
        "InternVLForConditionalGeneration",
    ),
    Specimen(
        "smolvlm",
        smolvlm_config,
        {"image": tiled_image, "video": framed_video},
        "SmolVLMForConditionalGeneration",
        join=stack_rows,
    ),
    Specimen(
        "idefics2",
        idefics2_config,
        {"image": plain_image},
        "Idefics2ForConditionalGeneration",
        join=stack_rows,
    ),
    Specimen(
        "idefics3",
        idefics3_config,
        {"image": tiled_image},
        "Idefics3ForConditionalGeneration",
        join=stack_rows,
    ),
    Specimen(
        "mistral3",
        mistral3_config,
        {"image": pixtral_image},
        "Mistral3ForConditionalGeneration",
    ),
    Specimen(
        "aya_vision",
        aya_vision_config,
        {"image": aya_image},
        "AyaVisionForConditionalGeneration",
    ),
    Specimen("got_ocr2", got_ocr2_config, {"image": got_image}, "GotOcr2ForConditionalGeneration"),
    Specimen("ovis2", ovis2_config, {"image": ovis2_image}, "Ovis2ForConditionalGeneration"),
    Specimen(
        "lighton_ocr",
        lighton_ocr_config,
        {"image": lighton_image},
        "LightOnOcrForConditionalGeneration",
    ),
    Specimen(
        "deepseek_vl",
        deepseek_vl_config,
        {"image": small_image},
        "DeepseekVLForConditionalGeneration",
    ),
    Specimen(
        "deepseek_vl_hybrid",
        deepseek_vl_hybrid_config,
        {"image": hybrid_image},
        "DeepseekVLHybridForConditionalGeneration",
    ),
    Specimen("janus", janus_config, {"image": janus_image}, "JanusForConditionalGeneration"),
    Specimen(
        "qianfan_ocr",
        qianfan_ocr_config,
        {"image": internvl_image},
        "QianfanOCRForConditionalGeneration",
    ),
    Specimen(
        "pp_chart2table",
        pp_chart2table_config,
        {"image": chart_image},
        "GotOcr2ForConditionalGeneration",
    ),
    Specimen(
        "granite4_vision",
        granite4_vision_config,
        {"image": mosaic_image},
        "Granite4VisionForConditionalGeneration",
        unable={"sampling": _INTERLEAVED, "beams": _INTERLEAVED},
    ),
    Specimen("aria", aria_config, {"image": aria_image}, "AriaForConditionalGeneration"),
    Specimen(
        "fuyu",
        fuyu_config,
        {"image": fuyu_image},
        "FuyuForCausalLM",
        unable={"sampling": _NOT_EXPANDED, "beams": _NOT_EXPANDED},
    ),
    Specimen("emu3", emu3_config, {"image": emu3_image}, "Emu3ForConditionalGeneration"),
    Specimen(
        "chameleon",
        chameleon_config,
        {"image": chameleon_image},
        "ChameleonForConditionalGeneration",
    ),
    Specimen(
        "granite_docling",
        granite_docling_config,
        {"image": docling_image},
        "GraniteDoclingForConditionalGeneration",
        join=stack_rows,
    ),
]
