"""What can be known of a run before its model is made.

Neither torch nor transformers is loaded, unless `shape`, `device` or `ways` needs them.
"""

from __future__ import annotations

from importlib.util import find_spec

from omegaconf import DictConfig

from tokenprune import LOGITS
from tokenprune.runs.compose import build_pruning
from tokenprune.runs.shapes import decoder_shape, num_tokens

MEASURES = ("prefill", "decode", "train")
TUNINGS = ("full", "lora")
DTYPES = ("float32", "bfloat16", "float16")


def check(config: DictConfig) -> None:
    """What can be known of a run before its model is made.

    Raises:
        ValueError: If a value is out of range, or the schedule does not fit the shape.
        KeyError: If the strategy is unknown.
    """
    choices = {
        "measure": MEASURES,
        "tuning": TUNINGS,
        "logits": LOGITS,
        "device": ("auto", "cpu", "cuda"),
        "dtype": ("auto", *DTYPES),
    }
    for key, allowed in choices.items():
        if config[key] not in allowed:
            raise ValueError(
                f"{key}: expected one of {list(allowed)}, got {config[key]!r}. "
                f"Set {key}={allowed[0]}."
            )
    counts = {"batch_size": 1, "num_text": 2, "new_tokens": 1, "rounds": 1, "warmup": 1}
    optional = {"num_visual": 1, "num_threads": 1}
    for key, lowest in (counts | optional).items():
        value = config[key]
        if value is None and key in optional:
            continue
        if isinstance(value, bool) or not isinstance(value, int) or value < lowest:
            raise ValueError(f"{key}: expected an integer >= {lowest}, got {value!r}. Set {key}=8.")
    num_tokens(config.resolution)
    if config.tuning == "lora" and config.measure == "train" and find_spec("peft") is None:
        raise ValueError(
            "tuning: expected the package peft for tuning=lora, got none. Run pip install peft."
        )
    if config.strategy is None:
        raise ValueError(
            "strategy: expected one that prunes, to compare with the unpruned model, got none. "
            "Choose strategy=pyramiddrop."
        )
    if config.graph not in (True, False):
        raise ValueError(f"graph: expected true or false, got {config.graph!r}. Set graph=true.")
    if config.graph and config.measure == "prefill":
        _check_graph(config)
    if config.ways and config.measure != "prefill":
        raise ValueError(
            f"ways: expected measure=prefill, got measure={config.measure}. Set ways=[]."
        )
    pruning = build_pruning(config, decoder_shape(config).num_layers)
    assert pruning is not None, "a strategy was asked for"
    if config.device == "cuda" and not _has_gpu():
        raise ValueError("device: expected a CUDA device, got none. Set device=cpu.")
    if config.ways != []:
        from tokenprune.bench import ways

        ways.check(config.ways, pruning.strategy, config.attention)


def _check_graph(config: DictConfig) -> None:
    """Refuses graphs where there are none, and rounds in which they would be recorded."""
    if config.warmup < 2:
        raise ValueError(
            f"warmup: expected 2 or more with graph=true, one to run and one to record, got "
            f"{config.warmup}. Set warmup=2."
        )
    if config.device == "cpu" or not _has_gpu():
        raise ValueError("graph: expected a CUDA device, got none. Set graph=false.")


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()
