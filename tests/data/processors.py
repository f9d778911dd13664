"""Tiny processors, and samples for them."""

from __future__ import annotations

import string
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import transformers
from PIL import Image
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import (
    CLIPImageProcessorPil,
    Gemma3Processor,
    GotOcr2ImageProcessorPil,
    InternVLProcessor,
    LlavaOnevisionImageProcessorPil,
    LlavaOnevisionProcessor,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessorPil,
    Qwen3VLProcessor,
    SmolVLMProcessor,
)
from transformers.models.gemma3 import Gemma3ImageProcessorPil
from transformers.models.llava_next import LlavaNextImageProcessorPil, LlavaNextProcessor
from transformers.models.smolvlm import processing_smolvlm

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
WORDS = "USER: ASSISTANT: user assistant Which colour is it? red blue 7 2 yes no"
TEMPLATES = {"llava": LLAVA, "chatml": CHATML, "none": None}


def _tokenizer(words: str, **named: str) -> PreTrainedTokenizerFast:
    """Byte pairs in which a space belongs to the word after it.

    Args:
        words: What it is trained on.
        named: A family's special tokens, by the names that its processor asks for them by.
    """
    named = named or {"image_token": "<image>"}
    core = Tokenizer(BPE(unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Metaspace()
    core.decoder = decoders.Metaspace()
    special = ["<pad>", "<s>", "</s>", "<unk>", *named.values(), "<|im_start|>", "<|im_end|>"]
    letters = " ".join(string.printable.split()[0])
    trainer = BpeTrainer(vocab_size=300, special_tokens=special)
    core.train_from_iterator([words, words, words, letters], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        extra_special_tokens={**named, "start": "<|im_start|>", "end": "<|im_end|>"},
        padding_side="left",
    )


def build_processor(family: str, template: str | None):
    tokenizer = _tokenizer(WORDS)
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


class NoVideo:
    """A processor that takes no videos: theirs need torchvision."""

    def check_argument_for_proper_class(self, name: str, argument: Any) -> Any:
        if "video_processor" in name and argument is None:
            return type(None)
        return super().check_argument_for_proper_class(name, argument)


def _named(kind: type) -> type:
    return type(kind.__name__, (NoVideo, kind), {})


SIDE = {"height": 28, "width": 28}


def gemma3() -> Any:
    """Four tokens for any image."""
    tokenizer = _tokenizer(
        WORDS,
        image_token="<image_soft_token>",
        boi_token="<start_of_image>",
        eoi_token="<end_of_image>",
    )
    template = CHATML.replace("<image>", "<start_of_image>")
    images = Gemma3ImageProcessorPil(size=SIDE)
    return Gemma3Processor(images, tokenizer, chat_template=template, image_seq_length=4)


def qwen(kind: type) -> Any:
    """A token for 28 x 28 pixels."""
    tokenizer = _tokenizer(
        WORDS,
        image_token="<|image_pad|>",
        video_token="<|video_pad|>",
        vision_bos_token="<|vision_start|>",
        vision_eos_token="<|vision_end|>",
    )
    template = CHATML.replace("<image>", "<|vision_start|><|image_pad|><|vision_end|>")
    images = Qwen2VLImageProcessorPil(max_pixels=112 * 112)
    return _named(kind)(images, tokenizer, None, chat_template=template)


def internvl() -> Any:
    """Four tokens for a tile."""
    tokenizer = _tokenizer(
        WORDS,
        context_image_token="<IMG_CONTEXT>",
        start_image_token="<img>",
        end_image_token="</img>",
        video_token="<video>",
    )
    template = CHATML.replace("<image>", "<IMG_CONTEXT>")
    images = GotOcr2ImageProcessorPil(size=SIDE)
    return _named(InternVLProcessor)(
        images, tokenizer, None, image_seq_length=4, chat_template=template
    )


def llava_onevision() -> Any:
    """Four tokens for a tile, and newlines."""
    tokenizer = _tokenizer(WORDS, image_token="<image>", video_token="<video>")
    images = LlavaOnevisionImageProcessorPil(
        size=SIDE, image_grid_pinpoints=[[28, 56], [56, 28], [56, 56]]
    )
    return _named(LlavaOnevisionProcessor)(
        images,
        tokenizer,
        None,
        num_image_tokens=4,
        vision_feature_select_strategy="full",
        chat_template=CHATML,
    )


def smolvlm() -> Any:
    """Four tokens for a tile; a skip where transformers has its images by torchvision only."""
    tokenizer = _tokenizer(
        WORDS,
        image_token="<image>",
        fake_image_token="<fake_token_around_image>",
        global_image_token="<global-img>",
        end_of_utterance_token="<end_of_utterance>",
    )
    try:
        images = transformers.SmolVLMImageProcessorPil(
            size={"longest_edge": 56}, max_image_size={"longest_edge": 28}
        )
    except ImportError as error:
        pytest.skip(str(error).split("\n")[0])
    # It asks for num2words, which only writes the introductions of videos.
    with patch.object(processing_smolvlm, "num2words", str):
        processor = _named(SmolVLMProcessor)(
            images, tokenizer, None, image_seq_len=4, chat_template=CHATML
        )
    # Its template asks how videos are sampled, whether there are any or not.
    processor.video_processor = SimpleNamespace(num_frames=1, fps=1, size=None)
    return processor


#: Processors of other families, with the code of transformers and tiny sizes.
OTHERS = {
    "gemma3": gemma3,
    "qwen2_5_vl": lambda: qwen(Qwen2_5_VLProcessor),
    "qwen3_vl": lambda: qwen(Qwen3VLProcessor),
    "internvl": internvl,
    "llava_onevision": llava_onevision,
    "smolvlm": smolvlm,
}


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
