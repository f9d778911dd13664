"""Tiny processors, and samples for them."""

from __future__ import annotations

from PIL import Image
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import CLIPImageProcessorPil, LlavaProcessor, PreTrainedTokenizerFast
from transformers.models.llava_next import LlavaNextImageProcessorPil, LlavaNextProcessor

from tokenprune.data import (
    Sample,
    Turn,
)

LLAVA = (
    "{% for message in messages %}{{ message['role'].upper() + ': ' }}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}{{ '<image>\n' }}"
    "{% elif message['role'] == 'user' %}{{ part['text'] + ' ' }}{% else %}"
    "{% generation %}{{ part['text'] + ' ' }}{% endgeneration %}{% endif %}{% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}{{ '<image>' }}"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TEMPLATES = {"llava": LLAVA, "chatml": CHATML, "none": None}


def _tokenizer(words: str) -> PreTrainedTokenizerFast:
    """Byte pairs in which a space belongs to the word after it."""
    core = Tokenizer(BPE(unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Metaspace()
    core.decoder = decoders.Metaspace()
    special = ["<pad>", "<s>", "</s>", "<unk>", "<image>", "<|im_start|>", "<|im_end|>"]
    core.train_from_iterator([words] * 3, BpeTrainer(vocab_size=300, special_tokens=special))
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        extra_special_tokens={
            "image_token": "<image>",
            "start": "<|im_start|>",
            "end": "<|im_end|>",
        },
        padding_side="left",
    )


def build_processor(family: str, template: str | None):
    tokenizer = _tokenizer(
        "USER: ASSISTANT: user assistant Which colour is it? red blue 7 2 yes no"
    )
    common = {"patch_size": 8, "vision_feature_select_strategy": "default"}
    if family == "llava":
        images = CLIPImageProcessorPil(
            size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}
        )
        return LlavaProcessor(
            images, tokenizer, chat_template=template, num_additional_image_tokens=1, **common
        )
    tiles = LlavaNextImageProcessorPil(
        size={"shortest_edge": 32},
        crop_size={"height": 32, "width": 32},
        image_grid_pinpoints=[[32, 64], [64, 32], [64, 64]],
    )
    return LlavaNextProcessor(
        tiles, tokenizer, chat_template=template, num_additional_image_tokens=1, **common
    )


SAMPLES = [
    Sample("a", (Image.new("RGB", (40, 30), "red"),), (Turn("Which colour is it?", "red"),)),
    Sample(
        "b",
        (Image.new("RGB", (20, 60), "blue"),),
        (Turn("Which?", "7"), Turn("is it red?", "no red"), Turn("blue?", "yes")),
    ),
    Sample("c", (Image.new("RGB", (60, 20), "blue"),), (Turn("it?", "2 7"),)),
]


RED, BLUE = SAMPLES[0].images[0], SAMPLES[1].images[0]
