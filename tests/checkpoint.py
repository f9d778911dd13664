"""Small random models with tokenizer and processor, saved as checkpoints."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaNextConfig,
    LlavaNextImageProcessorPil,
    LlavaNextProcessor,
    LlavaProcessor,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    ProcessorMixin,
    Qwen2VLImageProcessorPil,
    Qwen2VLProcessor,
)
from zoo import ZOO
from zoo.specimen import BEGIN, IMAGE, VIDEO, VOCABULARY

QUESTION = ["what", "is", "this", "?", "which", "colour", "symbol"]
WORDS = ["USER:", "ASSISTANT:", *QUESTION, "yes", "no", "red", "green", "blue"]
TEMPLATE = (
    "{% for message in messages %}{{ message['role'].upper() }}: "
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image> {% else %}{{ part['text'] }} {% endif %}{% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
NUM_LAYERS = 4
NUM_VISUAL = 16


def word_tokenizer(words: list[str]) -> PreTrainedTokenizerFast:
    """Splits at spaces; the words' ids are their places."""
    core = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
        extra_special_tokens={"image_token": "<image>"},
    )


def save_checkpoint(folder: Path, family: str = "llava") -> Path:
    """Writes a checkpoint of `llava` or `llava_next` and returns its folder."""
    words = ["<pad>", "<s>", "</s>", "<unk>", "<image>", *WORDS]
    tokenizer = word_tokenizer(words)
    sizes = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    pinpoints = [[32, 64], [64, 32], [64, 64]]
    if family == "llava":
        image_processor, processor_class = CLIPImageProcessorPil(**sizes), LlavaProcessor
    else:
        image_processor = LlavaNextImageProcessorPil(**sizes, image_grid_pinpoints=pinpoints)
        processor_class = LlavaNextProcessor
    processor = processor_class(
        image_processor=image_processor,
        tokenizer=tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    )
    config_class = LlavaConfig if family == "llava" else LlavaNextConfig
    extra = {} if family == "llava" else {"image_grid_pinpoints": pinpoints}
    config = config_class(
        vision_config=CLIPVisionConfig(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            image_size=32,
            patch_size=8,
            initializer_range=0.3,
        ),
        text_config=LlamaConfig(
            vocab_size=len(words),
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=NUM_LAYERS,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=512,
            initializer_range=0.3,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        ),
        image_token_id=words.index("<image>"),
        **extra,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForImageTextToText.from_config(config)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


class StillsProcessor(Qwen2VLProcessor):
    """Qwen-VL's without videos, for which transformers wants torchvision."""

    def __init__(
        self,
        image_processor: Qwen2VLImageProcessorPil,
        tokenizer: PreTrainedTokenizerFast,
        chat_template: str | None = None,
    ) -> None:
        self.image_token, self.image_token_id = "<image>", IMAGE
        self.video_token, self.video_token_id = "<video>", VIDEO
        ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)


class _Stills(PreTrainedConfig):
    """No model has it: a processor class is found by its name among those of registered configs."""

    model_type = "stills_of_the_tests"


AutoProcessor.register(_Stills, StillsProcessor)


def save_qwen(folder: Path) -> Path:
    """Writes a checkpoint of the zoo's Qwen2.5-VL; an image is 16 tokens."""
    words = ["<pad>", "<s>", "</s>", "<unk>", *WORDS]
    words += [f"<{i}>" for i in range(len(words), VOCABULARY)]
    words[IMAGE], words[VIDEO] = "<image>", "<video>"
    model: PreTrainedModel = ZOO["qwen2_5_vl"].build("sdpa")
    model.generation_config.eos_token_id = words.index("</s>")
    sides = {"patch_size": 4, "merge_size": 2, "min_pixels": 32 * 32, "max_pixels": 32 * 32}
    template = TEMPLATE.replace("<image>", f"{words[BEGIN]} <image>")
    processor = StillsProcessor(Qwen2VLImageProcessorPil(**sides), word_tokenizer(words), template)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder
