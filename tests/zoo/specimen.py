"""One tiny random model per model type, and what a picture is to it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

NUM_LAYERS = 6
PAD = 0
#: Ids 1..TEXT - 1 are text in every tokenizer of the zoo; special tokens come after.
TEXT = 90
VOCABULARY = 128
IMAGE, VIDEO, BEGIN, END = 100, 101, 102, 103

#: A prompt: numbers of text tokens, and pictures by name.
Prompt = Sequence[int | str]
#: A lone picture; text alone; two pictures with text between; a short question; one of each length.
PROMPTS: tuple[Prompt, ...] = (
    (3, "image", 5),
    (9,),
    (2, "image", 3, "image", 7),
    (1, "image", 12),
)


@dataclass
class Picture:
    """What a picture, or video, is in a call.

    Attributes:
        ids: Its tokens: placeholders, and what the processor puts around them.
        inputs: Its tensors; those of several pictures are concatenated along dimension 0.
    """

    ids: list[int]
    inputs: dict[str, Tensor]


def no_extras(model: PreTrainedModel, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {}


def concatenate(pictures: Sequence[Sequence[Picture]]) -> dict[str, Tensor]:
    """Inputs of a batch from the pictures of each row."""
    parts: dict[str, list[Tensor]] = {}
    for row in pictures:
        for picture in row:
            for key, value in picture.inputs.items():
                parts.setdefault(key, []).append(value)
    return {key: torch.cat(values) for key, values in parts.items()}


@dataclass(frozen=True)
class Specimen:
    """A model type of the zoo.

    Attributes:
        model_type: As in the config.
        config: Makes a tiny config (text decoder of NUM_LAYERS layers, if it can be pruned).
        pictures: By name ("image", "video"): makes one, given the model and a generator.
        model_class: Name of the class in transformers.
        join: Inputs of a batch from the pictures of each row.
        extras: Further inputs that the processor would give, from the model and the inputs.
        cuts: Layers to cut at.
        video_prompts: Prompts with videos, for types that see them.
        unable: Checks that the unmodified model cannot do, and why.
    """

    model_type: str
    config: Callable[[], Any]
    pictures: dict[str, Callable[[PreTrainedModel, torch.Generator], Picture]]
    model_class: str
    join: Callable[[Sequence[Sequence[Picture]]], dict[str, Tensor]] = concatenate
    extras: Callable[[PreTrainedModel, dict[str, Tensor]], dict[str, Tensor]] = no_extras
    cuts: tuple[int, ...] = (3, 5)
    video_prompts: tuple[Prompt, ...] = ((2, "video", 4), (6,))
    unable: dict[str, str] = field(default_factory=dict)

    def build(self, attention: str = "eager") -> PreTrainedModel:
        config = self.config()
        for part in _configs(config):
            part._attn_implementation = "eager"
        kind = getattr(transformers, self.model_class)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = kind._from_config(config, attn_implementation="eager")
            randomise(model)
        # Afterwards: it leaves parts that cannot do it as they are, as loading does.
        model.set_attn_implementation(attention)
        for name in ("eos_token_id", "bos_token_id"):
            setattr(model.generation_config, name, None)
        model.generation_config.pad_token_id = PAD
        return model.eval()

    def segments(self, model: PreTrainedModel, prompt: Prompt) -> list[Picture]:
        """The pictures of a prompt, and its text as pictures without pixels; always the same."""
        own = torch.Generator().manual_seed(1000 * len(prompt) + len(str(prompt)))
        return [
            self.pictures[segment](model, own)
            if isinstance(segment, str)
            else Picture(torch.randint(1, TEXT, (segment,), generator=own).tolist(), {})
            for segment in prompt
        ]

    def batch(
        self, model: PreTrainedModel, prompts: Sequence[Prompt] = PROMPTS, side: str = "left"
    ) -> dict[str, Tensor]:
        """Inputs of a call; a row is the same alone and in a batch."""
        sequences, pictures = [], []
        for prompt in prompts:
            segments = self.segments(model, prompt)
            sequences.append(torch.tensor([token for part in segments for token in part.ids]))
            pictures.append([part for part in segments if part.inputs])
        length = max(map(len, sequences))

        def pad(tensor: Tensor, value: int) -> Tensor:
            missing = (length - len(tensor), 0) if side == "left" else (0, length - len(tensor))
            return torch.nn.functional.pad(tensor, missing, value=value)

        inputs = {
            "input_ids": torch.stack([pad(s, PAD) for s in sequences]),
            "attention_mask": torch.stack([pad(torch.ones_like(s), 0) for s in sequences]),
        }
        if any(pictures):
            inputs |= self.join(pictures)
        return inputs | self.extras(model, inputs)


def _configs(config: Any) -> list[Any]:
    parts = [config]
    for value in vars(config).values():
        if hasattr(value, "to_dict") and hasattr(value, "model_type"):
            parts += _configs(value)
    return parts


def randomise(model: PreTrainedModel) -> None:
    """Weights whose outputs keep the size of their inputs, so that every token matters."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() < 2:
                continue
            embeds = "embed" in name or "wte" in name
            parameter.normal_(std=1.0 if embeds else parameter.shape[-1] ** -0.5)


def text_sizes(**others: Any) -> dict[str, Any]:
    """Sizes of a tiny decoder."""
    return {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": NUM_LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 512,
        "pad_token_id": PAD,
        "bos_token_id": None,
        "eos_token_id": None,
    } | others


def vision_sizes(**others: Any) -> dict[str, Any]:
    """Sizes of a tiny image tower: 32 x 32 pixels, 16 patches."""
    return {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": 32,
        "patch_size": 8,
    } | others


def pixels(own: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=own)
