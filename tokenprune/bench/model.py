"""The model that is measured, with random weights, and what training adds to it."""

from __future__ import annotations

from typing import Any

import torch
from omegaconf import DictConfig

#: LLaVA-1.5's script finetune_lora.sh; weights of all linear maps but the vocabulary's.
LORA: dict[str, Any] = {"r": 128, "lora_alpha": 256, "target_modules": "all-linear"}


def build_model(config: Any, dtype: torch.dtype, attention: str, device: torch.device) -> Any:
    """A model with random weights: the decoder of the config where it stands alone, else all of it.

    Args:
        config: A Hugging Face config, of a decoder or of a vision-language model.
        dtype: Of the weights.
        attention: Attention implementation.
        device: Where the weights are made.

    Raises:
        ValueError: If transformers has no such model.
    """
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    text = config.get_text_config(decoder=True)
    options = {"dtype": dtype, "attn_implementation": attention}
    candidates = ((AutoModelForCausalLM, text), (AutoModelForImageTextToText, config))
    for family, own in candidates:
        builder: Any = family
        if type(own) in builder._model_mapping:
            with torch.device(device):
                return builder.from_config(own, **options).eval()
    raise ValueError(
        f"shape: expected a decoder or a vision-language model, got {type(config).__name__}. "
        "Choose shape=llava_1_5_7b, or another checkpoint."
    )


def prepare_training(model: Any, config: DictConfig) -> torch.optim.Optimizer:
    """The optimiser, with its state made; the model ready to train.

    Args:
        model: From `build_model`; changed in place.
        config: As composed from configs/bench.yaml.
    """
    if config.tuning == "lora":
        from peft import LoraConfig, inject_adapter_in_model

        model.requires_grad_(False)
        inject_adapter_in_model(LoraConfig(**LORA), model)
    model.train()
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    # PyTorch's fused update, on either device; a rate at which random weights stay finite.
    optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=True)
    for weight in trained:
        weight.grad = torch.zeros_like(weight)
    optimizer.step()  # makes its state, so that neither variant pays for that
    optimizer.zero_grad()
    return optimizer
