"""What `show` and `verify` share: a model on its device, and a question about one image."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from omegaconf import DictConfig

#: How a command line says where a model runs.
_DEVICES = ("trainer=", "trainer.accelerator=")


def load(config: DictConfig, overrides: Sequence[str]) -> Any:
    """Model and processor of a config, on a GPU if there is one.

    Args:
        config: As `configs/eval.yaml` composes it.
        overrides: Of the command line: a trainer that is named there says where instead.
    """
    import torch

    from tokenprune.evaluation.loading import load_model
    from tokenprune.runs.devices import default_device

    loaded = load_model(config)
    named = any(item.lstrip("+").startswith(_DEVICES) for item in overrides)
    on_cpu = named and config.trainer.accelerator not in ("gpu", "cuda", "auto")
    if not on_cpu and getattr(loaded.model, "hf_device_map", None) is None:
        model: Any = loaded.model
        model.to(torch.device(default_device()))
    return loaded


def prompt(loaded: Any, image: Any, question: str) -> Any:
    """A model's inputs for a question about an image."""
    from tokenprune.data.collate import PromptCollator
    from tokenprune.data.sample import Sample, Turn

    sample = Sample(id="shown", images=(image,), turns=(Turn(question, ""),))
    inputs = PromptCollator(loaded.processor)([sample])["inputs"]
    return inputs.to(loaded.model.device, dtype=loaded.model.dtype)
