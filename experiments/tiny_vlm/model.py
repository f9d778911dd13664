"""The shipped model before training: tokenizer, processor and a small LLaVA, built from configs."""

from __future__ import annotations

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.normalizers import Replace
from tokenizers.pre_tokenizers import Whitespace
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from tokenprune.data.scenes import CELL, COLOURS, SIZE, SYMBOLS

SPECIAL = ("<pad>", "<s>", "</s>", "<unk>", "<image>")
WORDS = (
    *("USER", "ASSISTANT", ":", "?", "Which", "symbol", "is", "colour", "Is", "there", "a"),
    *("left", "of", "above", "What", "does", "the", "sign", "say", "yes", "no"),
)
VOCABULARY = (*SPECIAL, *WORDS, *SYMBOLS, *COLOURS)
CHAT_TEMPLATE = (
    "{{ '<s>' }}{% for message in messages %}{% if message['role'] == 'user' %}{{ 'USER: ' }}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}{{ '<image>\n' }}"
    "{% else %}{{ part['text'] + ' ' }}{% endif %}{% endfor %}{% else %}"
    "{% generation %}{% for part in message['content'] %}{{ part['text'] }}{% endfor %}"
    "{{ '</s>' }}{% endgeneration %}{% endif %}{% endfor %}"
)


def build_processor() -> LlavaProcessor:
    """Word-level tokenizer and CLIP image processor; a scene goes in at its own size."""
    words = Tokenizer(WordLevel({word: i for i, word in enumerate(VOCABULARY)}, unk_token="<unk>"))
    # A prompt ends with the word that its question is about.
    words.normalizer = Replace("?", " ")
    words.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        extra_special_tokens={"image_token": "<image>"},
        padding_side="left",
    )
    images = CLIPImageProcessor(
        size={"shortest_edge": SIZE},
        crop_size={"height": SIZE, "width": SIZE},
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.5, 0.5, 0.5],
    )
    return LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=CELL,
        vision_feature_select_strategy="default",
        chat_template=CHAT_TEMPLATE,
        num_additional_image_tokens=1,
    )


def build_model() -> LlavaForConditionalGeneration:
    """A LLaVA of two million parameters: 144 visual tokens, eight decoder layers."""
    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=96,
        intermediate_size=192,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=SIZE,
        patch_size=CELL,
        projection_dim=96,
    )
    text = LlamaConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=1024,
        # The default of 0.02 hardly moves at this width; 1 / sqrt(128) does.
        initializer_range=128**-0.5,
        tie_word_embeddings=True,
        pad_token_id=VOCABULARY.index("<pad>"),
        bos_token_id=VOCABULARY.index("<s>"),
        eos_token_id=VOCABULARY.index("</s>"),
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=VOCABULARY.index("<image>"),
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        tie_word_embeddings=True,
    )
    model = LlavaForConditionalGeneration(config)
    model.generation_config.pad_token_id = text.pad_token_id
    model.generation_config.bos_token_id = text.bos_token_id
    model.generation_config.eos_token_id = text.eos_token_id
    return model
