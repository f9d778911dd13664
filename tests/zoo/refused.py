"""Types that the engine refuses as soon as it is attached, each with the reason it must give.

Their models are built on the meta device: `attach` runs nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from transformers import CONFIG_MAPPING, PreTrainedModel

import tokenprune as tp

CROSS = "reads the image through cross-attention"
ENCODER = "visual tokens sit in an encoder"
STATE = "A token that it has seen cannot be taken back"
INDEX = "It picks the keys that it reads by an index with a cache of its own"


@dataclass(frozen=True)
class Refused:
    """A model type that cannot be pruned.

    Attributes:
        model_class: Name of the class in transformers.
        config: Makes its config.
        reason: What the error must say.
    """

    model_class: str
    config: Callable[[], Any]
    reason: str

    def build(self) -> PreTrainedModel:
        """The model, without memory for its weights."""
        config = self.config()
        with torch.device("meta"):
            return getattr(transformers, self.model_class)(config)

    def said(self) -> str:
        """What the engine says when it is asked to prune such a model."""
        try:
            tp.attach(self.build(), tp.build_strategy("uniform"), tp.Schedule.one_shot(3, 0.5))
        except ValueError as error:
            return " ".join(str(error).split()).removeprefix("prune: ")
        raise AssertionError("it was not refused")


def sized(model_type: str, text: str = "text_config", **sizes: Any) -> Callable[[], Any]:
    """A config as it comes, but for the sizes of its text part (or of itself: `text=""`)."""
    return lambda: CONFIG_MAPPING[model_type](**({text: sizes} if text and sizes else sizes))


def vision_encoder_decoder() -> Any:
    parts = transformers.ViTConfig(num_hidden_layers=2), transformers.BertConfig()
    return transformers.VisionEncoderDecoderConfig.from_encoder_decoder_configs(*parts)


SIX = {"num_hidden_layers": 6}

REFUSED: dict[str, Refused] = {
    # Images that are not in the decoder's stream.
    "blip": Refused("BlipForConditionalGeneration", sized("blip", **SIX), CROSS),
    "florence2": Refused("Florence2ForConditionalGeneration", sized("florence2"), CROSS),
    "idefics": Refused("IdeficsForVisionText2Text", sized("idefics", "", **SIX), CROSS),
    "mllama": Refused("MllamaForConditionalGeneration", sized("mllama"), CROSS),
    "pix2struct": Refused("Pix2StructForConditionalGeneration", sized("pix2struct"), CROSS),
    "pp_formulanet": Refused("PPFormulaNetForConditionalGeneration", sized("pp_formulanet"), CROSS),
    "vision-encoder-decoder": Refused("VisionEncoderDecoderModel", vision_encoder_decoder, CROSS),
    "t5gemma2": Refused("T5Gemma2ForConditionalGeneration", sized("t5gemma2"), ENCODER),
    "udop": Refused("UdopForConditionalGeneration", sized("udop", "", num_layers=6), ENCODER),
    "evolla": Refused(
        "EvollaForProteinText2Text", sized("evolla", "", **SIX), "reads a protein through"
    ),
    "git": Refused("GitForCausalLM", sized("git", ""), "no placeholder shows them"),
    # A second stack that reads the keys of every layer.
    "diffusion_gemma": Refused(
        "DiffusionGemmaForBlockDiffusion",
        sized("diffusion_gemma", num_experts=2, top_k_experts=1, moe_intermediate_size=16, **SIX),
        "writes blocks of text by diffusion",
    ),
    "pi0": Refused("PI0ForConditionalGeneration", sized("pi0"), "its action expert reads the keys"),
    # Convolutions, recurrences and linear attention.
    "glm5_next": Refused("Glm5NextForConditionalGeneration", sized("glm5_next", **SIX), STATE),
    "inkling2": Refused("Inkling2ForConditionalGeneration", sized("inkling2", **SIX), STATE),
    "inkling_mm_model": Refused(
        "InklingForConditionalGeneration", sized("inkling_mm_model", **SIX), STATE
    ),
    "lfm2_vl": Refused(
        "Lfm2VlForConditionalGeneration",
        sized("lfm2_vl", layer_types=["conv", "conv", "full_attention"] * 2, **SIX),
        STATE,
    ),
    "lfm3_vl": Refused("Lfm3VlForConditionalGeneration", sized("lfm3_vl"), STATE),
    "minicpm_ocr": Refused(
        "MiniCPMOcrForConditionalGeneration", sized("minicpm_ocr", **SIX), STATE
    ),
    "minicpmv4_6": Refused(
        "MiniCPMV4_6ForConditionalGeneration", sized("minicpmv4_6", **SIX), STATE
    ),
    "minicpmv4_7": Refused(
        "MiniCPMV4_7ForConditionalGeneration", sized("minicpmv4_7", **SIX), STATE
    ),
    "nemotron_h_omni": Refused("NemotronH_Omni_Reasoning_V3", sized("nemotron_h_omni"), STATE),
    "qwen3_5": Refused("Qwen3_5ForConditionalGeneration", sized("qwen3_5", **SIX), STATE),
    "qwen3_5_moe": Refused(
        "Qwen3_5MoeForConditionalGeneration", sized("qwen3_5_moe", **SIX), STATE
    ),
    "qwen4_exp": Refused(
        "Qwen4ExpForConditionalGeneration",
        sized(
            "qwen4_exp",
            indexer_n_heads=2,
            indexer_kv_heads=1,
            indexer_head_dim=256,
            indexer_budget=64,
            indexer_compress_ratio=4,
            **SIX,
        ),
        STATE,
    ),
    # Attention to a part of the keys that depends on the others.
    "dots3_note": Refused("Dots3NoteForConditionalGeneration", sized("dots3_note", **SIX), INDEX),
    "mistral_large4": Refused(
        "MistralLarge4ForConditionalGeneration", sized("mistral_large4", **SIX), INDEX
    ),
    "unlimited_ocr": Refused(
        "UnlimitedOcrForConditionalGeneration",
        sized("unlimited_ocr", **SIX),
        "Its cache keeps the prompt apart from a window on the answer",
    ),
}

#: Sizes of a type that are refused, where others are pruned.
REFUSED_SIZES: dict[str, Refused] = {
    kind: Refused(
        model_class,
        sized(kind, num_kv_shared_layers=2, layer_types=["full_attention"] * 6, **SIX),
        "expected layers with keys of their own",
    )
    for kind, model_class in (
        ("gemma4", "Gemma4ForConditionalGeneration"),  # E2B and E4B
        ("gemma4_unified", "Gemma4UnifiedForConditionalGeneration"),
    )
}

#: Types that transformers builds with timm only.
NEED_TIMM = ("fast_vlm", "gemma3n", "perception_lm")
