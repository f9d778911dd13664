"""The shipped models before training: tokenizer, processor, a small LLaVA, built from configs."""

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

from tokenprune.data.scenes import COLOURS, LEVELS, SYMBOLS, hard

SPECIAL = ("<pad>", "<s>", "</s>", "<unk>", "<image>")
WORDS = (
    *("USER", "ASSISTANT", ":", "?", "Which", "symbol", "is", "colour", "Is", "there", "a"),
    *("left", "of", "above", "What", "does", "the", "sign", "say", "yes", "no"),
)
#: Words that only the harder questions have.
HARDER = ("How", "many", "are", "Are", "more", "than", "shares", "with", *hard.NUMBERS)
VOCABULARIES = {
    "easy": (*SPECIAL, *WORDS, *SYMBOLS, *COLOURS),
    "hard": (*SPECIAL, *WORDS, *HARDER, *SYMBOLS, *COLOURS),
}
#: Of heads of 32 entries, the base of RoPE: with the larger one, half of the rotations hardly turn
#: over the length of a picture of 576 tokens.
BASES = {"easy": 1e4, "hard": 1e6}
CHAT_TEMPLATE = (
    "{{ '<s>' }}{% for message in messages %}{% if message['role'] == 'user' %}{{ 'USER: ' }}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}{{ '<image>\n' }}"
    "{% else %}{{ part['text'] + ' ' }}{% endif %}{% endfor %}{% else %}"
    "{% generation %}{% for part in message['content'] %}{{ part['text'] }}{% endfor %}"
    "{{ '</s>' }}{% endgeneration %}{% endif %}{% endfor %}"
)


def build_processor(level: str) -> LlavaProcessor:
    """Word-level tokenizer and CLIP image processor; a scene goes in at its own size."""
    style, vocabulary = LEVELS[level].STYLE, VOCABULARIES[level]
    words = Tokenizer(WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="<unk>"))
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
        size={"shortest_edge": style.size},
        crop_size={"height": style.size, "width": style.size},
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.5, 0.5, 0.5],
    )
    return LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=style.cell,
        vision_feature_select_strategy="default",
        chat_template=CHAT_TEMPLATE,
        num_additional_image_tokens=1,
    )


def build_model(level: str) -> LlavaForConditionalGeneration:
    """A LLaVA of two million parameters: 144 or 576 visual tokens, eight decoder layers."""
    torch.manual_seed(0)
    style, vocabulary = LEVELS[level].STYLE, VOCABULARIES[level]
    vision = CLIPVisionConfig(
        hidden_size=96,
        intermediate_size=192,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=style.size,
        patch_size=style.cell,
        projection_dim=96,
    )
    text = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=1024,
        rope_parameters={"rope_type": "default", "rope_theta": BASES[level]},
        # The default of 0.02 hardly moves at this width; 1 / sqrt(128) does.
        initializer_range=128**-0.5,
        tie_word_embeddings=True,
        pad_token_id=vocabulary.index("<pad>"),
        bos_token_id=vocabulary.index("<s>"),
        eos_token_id=vocabulary.index("</s>"),
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=vocabulary.index("<image>"),
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        tie_word_embeddings=True,
    )
    model = LlavaForConditionalGeneration(config)
    model.generation_config.pad_token_id = text.pad_token_id
    model.generation_config.bos_token_id = text.bos_token_id
    model.generation_config.eos_token_id = text.eos_token_id
    return model
