"""What of a model is trained, and how: its parts, LoRA adapters, the optimiser and its schedule."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from tokenprune.families.anatomy import examine
from tokenprune.training.check import PARTS, Lora, check_tuning


def parts_of(model: Any) -> dict[str, list[nn.Parameter]]:
    """Parameters of a model's vision tower, decoder (head included), and all between them."""
    encoder, head = model.get_encoder(modality="image"), model.get_output_embeddings()
    # A head may be the embeddings once more: an optimiser would step twice.
    heads = [] if head is None else list(head.parameters())
    decoder = list({id(p): p for p in (*model.get_decoder().parameters(), *heads)}.values())
    tower = [] if encoder is model else list(encoder.parameters())
    taken = {id(parameter) for parameter in (*tower, *decoder)}
    between = [parameter for parameter in model.parameters() if id(parameter) not in taken]
    return dict(zip(PARTS, (tower, between, decoder), strict=True))


class Adapters:
    """LoRA adapters inside a model: where they are saved from, and merged into it.

    Args:
        model: Gets adapters on the linear maps of its decoder; its other parameters are frozen.
        lora: Their size.

    Raises:
        ValueError: If peft is missing, or the decoder has no linear maps.
    """

    def __init__(self, model: PreTrainedModel, lora: Lora) -> None:
        try:
            import peft
        except ImportError as error:
            raise ValueError(
                "model.tuning: expected the peft package for lora, got none. "
                "Install it: pip install 'tokenprune-vlm[train]'."
            ) from error
        decoder = examine(model).decoder
        path = next(name for name, module in model.named_modules() if module is decoder)
        maps = {
            name.rsplit(".", 1)[-1]
            for name, module in decoder.named_modules()
            if isinstance(module, nn.Linear)
        }
        if not maps:
            raise ValueError(
                f"model.tuning: expected linear maps in the decoder for lora, got none in "
                f"{type(decoder).__name__}. Set model.tuning=full."
            )
        config = peft.LoraConfig(
            r=lora.rank,
            lora_alpha=lora.alpha,  # type: ignore[arg-type]  # a factor
            lora_dropout=lora.dropout,
            target_modules=rf"{re.escape(path)}\.(.*\.)?({'|'.join(sorted(maps))})",
        )
        with warnings.catch_warnings():
            # peft asks transformers 5.23 by a name that is going to change.
            warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`")
            # Works in place: the model itself stays what is called.
            self._wrapper: Any = peft.get_peft_model(model, config)

    def save(self, folder: Path) -> None:
        """Writes the adapters alone, for `peft.PeftModel.from_pretrained`."""
        self._wrapper.save_pretrained(folder)

    def merge(self) -> None:
        """Adds the adapters to the weights that they adapt; the model is a plain one again."""
        self._wrapper.merge_and_unload()


def tune(
    model: PreTrainedModel, tuning: str, parts: Sequence[str], lora: Lora | None = None
) -> Adapters | None:
    """Makes trainable what is to be trained, and nothing else.

    Args:
        model: All of it may be frozen.
        tuning: `"full"` trains all weights of the parts; `"projector"` the projector's, whatever
            the parts; `"lora"` adapters in the decoder, and all weights of the other parts.
        parts: Some of `vision_tower`, `projector` and `decoder`.
        lora: Size of the adapters.

    Returns:
        The adapters, with `"lora"`.

    Raises:
        ValueError: If a choice is unknown, the model has no such part, nothing would be trained, or
            weights to be trained are in half precision.
    """
    chosen = check_tuning(tuning, parts)
    own = parts_of(model)
    model.requires_grad_(False)
    adapters = Adapters(model, lora or Lora()) if tuning == "lora" else None
    for part in chosen:
        if not own[part]:
            raise ValueError(
                f"parts: expected a part of {type(model).__name__}, got {part!r}, which "
                f"it does not have apart. Choose from {[name for name in PARTS if own[name]]}."
            )
        if part == "decoder" and adapters is not None:
            continue
        for parameter in own[part]:
            if parameter.dtype in (torch.float16, torch.bfloat16):
                if adapters is None:
                    raise _too_coarse(parameter.dtype)
                parameter.data = parameter.data.float()  # the frozen decoder may stay as it is
            parameter.requires_grad_(True)
    return adapters


def _too_coarse(dtype: torch.dtype) -> ValueError:
    return ValueError(
        f"model.dtype: expected float32 for training, got {str(dtype).removeprefix('torch.')}, in "
        "which small updates vanish. Keep model.dtype=float32 and set "
        "trainer.precision=bf16-mixed, or set model.tuning=lora."
    )


def build_optimizer(
    model: Any,
    learning_rate: float,
    learning_rates: Mapping[str, float | None],
    weight_decay: float,
) -> torch.optim.AdamW:
    """AdamW with a learning rate per part; weights decay in matrices only.

    Args:
        model: What is trained of it requires gradients.
        learning_rate: Of parts without one of their own.
        learning_rates: By part; None is `learning_rate`.
        weight_decay: AdamW's.
    """
    groups: list[dict[str, Any]] = []
    for part, parameters in parts_of(model).items():
        own = learning_rates.get(part)
        trained = [parameter for parameter in parameters if parameter.requires_grad]
        matrices = [parameter for parameter in trained if parameter.dim() > 1]
        others = [parameter for parameter in trained if parameter.dim() <= 1]
        for members, decay in ((matrices, weight_decay), (others, 0.0)):
            if members:
                rate = learning_rate if own is None else own
                group = {"params": members, "lr": rate, "weight_decay": decay, "part": part}
                groups.append(group)
    return torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.98))


def cosine(num_steps: int, warmup: float) -> Callable[[int], float]:
    """Factor on the learning rate at each step: a linear rise, then half a cosine down to zero.

    Args:
        num_steps: Of the whole training.
        warmup: Share of the steps during which it rises.
    """
    num_warmup = math.ceil(warmup * num_steps)

    def factor(step: int) -> float:
        if step < num_warmup:
            return (step + 1) / num_warmup
        done = (step - num_warmup) / max(1, num_steps - num_warmup)
        return 0.5 * (1 + math.cos(math.pi * min(1.0, done)))

    return factor
