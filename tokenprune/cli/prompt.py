"""What `show` and `verify` share: a model on its device, and a question about one image."""

from __future__ import annotations

from typing import Any

from omegaconf import DictConfig


def load(config: DictConfig) -> Any:
    """Model and processor of a config, on the trainer's device."""
    import torch

    from tokenprune.evaluation.loading import load_model

    loaded = load_model(config)
    wants_gpu = config.trainer.accelerator in ("gpu", "auto") and torch.cuda.is_available()
    if wants_gpu and getattr(loaded.model, "hf_device_map", None) is None:
        model: Any = loaded.model
        model.to("cuda")
    return loaded


def prompt(loaded: Any, image: Any, question: str) -> Any:
    """A model's inputs for a question about an image."""
    from tokenprune.data.collate import PromptCollator
    from tokenprune.data.sample import Sample, Turn

    sample = Sample(id="shown", images=(image,), turns=(Turn(question, ""),))
    inputs = PromptCollator(loaded.processor)([sample])["inputs"]
    return inputs.to(loaded.model.device, dtype=loaded.model.dtype)
