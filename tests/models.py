"""Tiny random models and batches, built from configs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    PreTrainedModel,
)

IMAGE = 99
PAD = 0
NUM_LAYERS = 6
FAMILIES = ("llava", "llava_next", "llama")
#: Of the first eighty the one whose choices, of tokens to say and to keep, are the least close.
SEED = 6


def text_config() -> LlamaConfig:
    return LlamaConfig(
        vocab_size=100,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=NUM_LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.3,
        eos_token_id=None,
        bos_token_id=None,
        pad_token_id=PAD,
    )


def vision_config() -> CLIPVisionConfig:
    return CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=32,
        patch_size=8,
        initializer_range=0.3,
    )


def build(family: str, attention: str = "sdpa", seed: int = SEED) -> PreTrainedModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if family == "llama":
            config = text_config()
            config._attn_implementation = attention
            return LlamaForCausalLM(config).eval()
        sizes = {"vision_config": vision_config(), "text_config": text_config()}
        common = {"image_token_index": IMAGE, "attn_implementation": attention}
        if family == "llava":
            model: PreTrainedModel = LlavaForConditionalGeneration(LlavaConfig(**sizes, **common))
        else:
            pinpoints = [[32, 64], [64, 32], [64, 64]]
            config = LlavaNextConfig(**sizes, **common, image_grid_pinpoints=pinpoints)
            model = LlavaNextForConditionalGeneration(config)
        model.config.image_token_id = IMAGE
        return model.eval()


@dataclass
class Row:
    """One sample: segments of text (a number of tokens) and images (height, width)."""

    segments: list[int | tuple[int, int]]


ROWS = [
    Row([3, (30, 60), 5]),
    Row([9]),
    Row([2, (50, 20), 3, (64, 64), 7]),
    Row([1, (40, 41), 12]),
]


def batch(
    model: PreTrainedModel, rows: list[Row], side: str = "left", seed: int = SEED
) -> dict[str, Tensor]:
    """Inputs of a call, padded on one side; images are noise."""
    family = model.config.model_type
    sequences, pixels, sizes, masks = [], [], [], []
    for row in rows:
        ids: list[int] = []
        visual: list[bool] = []
        # Content depends on the row alone, so that a row is the same alone and in a batch.
        own = torch.Generator().manual_seed(seed + len(str(row)) * 1000 + len(row.segments))
        for segment in row.segments:
            if isinstance(segment, int):
                ids += torch.randint(1, 90, (segment,), generator=own).tolist()
                visual += [False] * segment
                continue
            if family == "llava_next":
                num_tiles = 1 + (2 if segment in ((30, 60), (50, 20)) else 4)
                pixel = torch.randn(num_tiles, 3, 32, 32, generator=own).to(model.dtype)
                with torch.no_grad():
                    feats = model.get_image_features(
                        pixel[None], torch.tensor([segment])
                    ).pooler_output
                count = feats[0].shape[0]
                sizes.append(segment)
            else:
                pixel = torch.randn(3, 32, 32, generator=own).to(model.dtype)
                count = 16
            if family == "llama":
                ids += torch.randint(1, 90, (count,), generator=own).tolist()
            else:
                ids += [IMAGE] * count
                pixels.append(pixel)
            visual += [True] * count
        sequences.append(torch.tensor(ids))
        masks.append(torch.tensor(visual))
    length = max(map(len, sequences))

    def pad(tensor: Tensor, value: int) -> Tensor:
        missing = (length - len(tensor), 0) if side == "left" else (0, length - len(tensor))
        return torch.nn.functional.pad(tensor, missing, value=value)

    inputs = {
        "input_ids": torch.stack([pad(s, PAD) for s in sequences]),
        "attention_mask": torch.stack([pad(torch.ones_like(s), 0) for s in sequences]),
    }
    if pixels and family == "llava":
        inputs["pixel_values"] = torch.stack(pixels)
    if pixels and family == "llava_next":
        most = max(p.shape[0] for p in pixels)
        inputs["pixel_values"] = torch.stack(
            [torch.nn.functional.pad(p, (0, 0) * 3 + (0, most - p.shape[0])) for p in pixels]
        )
        inputs["image_sizes"] = torch.tensor(sizes)
    if family == "llama":
        inputs["visual_mask"] = torch.stack([pad(m, False) for m in masks])
    return inputs


def labelled(model, side="right"):
    """A batch with answers: the last tokens of each row; the last row has none at all."""
    inputs = batch(model, ROWS, side)
    labels = torch.full_like(inputs["input_ids"], -100)
    for row in range(len(ROWS) - 1):
        columns = inputs["attention_mask"][row].nonzero()[-3:, 0]
        labels[row, columns] = inputs["input_ids"][row, columns]
    return inputs, labels


def turns(model):
    """Two turns, each with an image, and a text turn between them: calls of one conversation."""
    whole = batch(model, [Row([3, (30, 60), 5, 4, (50, 20), 2])])
    ids, pixels = whole["input_ids"], whole["pixel_values"]
    return [
        {"input_ids": ids[:, :24], "pixel_values": pixels[:1]},
        {"input_ids": ids[:, 24:28]},
        {"input_ids": ids[:, 28:], "pixel_values": pixels[1:]},
        {"input_ids": torch.tensor([[7]])},
        {"input_ids": torch.tensor([[8]])},
    ]
