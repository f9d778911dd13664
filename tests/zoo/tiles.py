"""Models whose processors cut images into tiles, and others that count tokens per image."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import (
    AyaVisionConfig,
    Cohere2Config,
    Idefics2Config,
    Idefics3Config,
    InternVLConfig,
    LlamaConfig,
    Mistral3Config,
    MistralConfig,
    PixtralVisionConfig,
    PreTrainedModel,
    Qwen2Config,
    SiglipVisionConfig,
    SmolVLMConfig,
)

from zoo.specimen import (
    BEGIN,
    END,
    IMAGE,
    NUM_LAYERS,
    PAD,
    Picture,
    Specimen,
    pixels,
    text_sizes,
    vision_sizes,
)

#: Tokens that processors put between tiles and rows of an image.
TILE, GLOBAL, BREAK = 104, 105, 106


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
    for key in ("pixel_values", "pixel_attention_mask"):
        blank = next(picture.inputs[key] for row in pictures for picture in row)[:0]
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
]
