"""What can be known of a training before its model is loaded: values that nothing can train with.

Loads no torch, so that a mistake is told at once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from omegaconf import DictConfig

from tokenprune import LOGITS
from tokenprune.runs.compose import entries
from tokenprune.runs.devices import check_settings
from tokenprune.runs.extras import check_logger

PARTS = ("vision_tower", "projector", "decoder")
TUNINGS = ("full", "projector", "lora")
#: What can say which validation is best, and whether high or low is good.
MONITORS = {"val_loss": "min", "val_accuracy": "max"}


_TRAINER = ("accelerator", "strategy", "precision", "max_steps", "max_epochs")
_RATES = ("learning_rate", "learning_rates", "weight_decay", "warmup", "schedule_warmup")
_SAVING = ("checkpoint_every", "monitor", "keep", "patience")


def check(config: DictConfig) -> None:
    """Refuses a config whose values are out of range.

    Args:
        config: As `configs/train.yaml` composes it.

    Raises:
        ValueError: If one is.
    """
    check_logger(config)
    check_settings(entries(config.trainer, (*_TRAINER, "num_nodes", "devices")))
    own = entries(config.model, ("tuning", "lora")) | entries(config, ("parts", *_RATES, *_SAVING))
    check_tuning(own["tuning"], own["parts"])
    Lora(**own["lora"])
    check_rates(*(own[name] for name in _RATES))
    check_saving(*(own[name] for name in _SAVING))
    check_logits(config.logits)


@dataclass(frozen=True)
class Lora:
    """Low-rank adapters on the decoder's linear maps (Hu et al., 2021, arXiv 2106.09685).

    Args:
        rank: Of each adapter's two matrices.
        alpha: Their product is scaled by `alpha / rank`.
        dropout: Of what enters them.

    Raises:
        ValueError: If a value is out of range.
    """

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0

    def __post_init__(self) -> None:
        if _is_below_one(self.rank):
            raise ValueError(
                f"model.lora.rank: expected an integer >= 1, got {self.rank!r}. "
                "Set model.lora.rank=16."
            )
        _check_number("model.lora.alpha", self.alpha, lambda x: x > 0, "above 0", 32)
        _check_number("model.lora.dropout", self.dropout, lambda x: 0 <= x < 1, "in [0, 1)", 0.05)


def check_tuning(tuning: str, parts: Sequence[str]) -> list[str]:
    """The parts that are trained.

    Raises:
        ValueError: If a choice is unknown, or the two do not fit.
    """
    if tuning not in TUNINGS:
        raise ValueError(
            f"model.tuning: expected one of {list(TUNINGS)}, got {tuning!r}. "
            "lora trains small adapters and leaves the decoder's weights as they are."
        )
    unknown = [part for part in parts if part not in PARTS]
    if unknown or not parts:
        raise ValueError(
            f"parts: expected some of {list(PARTS)}, got {list(parts)}. "
            "Set parts=[projector,decoder]."
        )
    chosen = ["projector"] if tuning == "projector" else list(parts)
    if tuning == "lora" and "decoder" not in chosen:
        raise ValueError(
            f"parts: expected decoder among them with model.tuning=lora, got {chosen}. "
            "Add decoder, or set model.tuning=full."
        )
    return chosen


def check_rates(
    learning_rate: float,
    learning_rates: Mapping[str, float | None],
    weight_decay: float,
    warmup: float,
    schedule_warmup: float,
) -> None:
    """Refuses learning rates, decay and shares of the steps that are out of range.

    Raises:
        ValueError: If one is.
    """
    _check_number("learning_rate", learning_rate, lambda x: x > 0, "above 0", 2e-5)
    _check_number("weight_decay", weight_decay, lambda x: x >= 0, ">= 0", 0.0)
    for name, share, example in (
        ("warmup", warmup, 0.03),
        ("schedule_warmup", schedule_warmup, 0.3),
    ):
        _check_number(name, share, lambda x: 0 <= x <= 1, "between 0 and 1", example)
    for part, rate in learning_rates.items():
        if part not in PARTS:
            raise ValueError(
                f"learning_rates: expected some of {list(PARTS)}, got {part!r}. "
                "Set learning_rates.projector=2e-5."
            )
        if rate is not None:
            _check_number(f"learning_rates.{part}", rate, lambda x: x > 0, "above 0", 2e-5)


def check_logits(logits: str) -> None:
    """Refuses what a call cannot be asked for; see `tokenprune.attach`.

    Raises:
        ValueError: It is no choice.
    """
    if logits not in LOGITS:
        raise ValueError(
            f"logits: expected one of {list(LOGITS)}, got {logits!r}. "
            "supervised makes those that the loss needs."
        )


def check_saving(checkpoint_every: int, monitor: str, keep: str, patience: int | None) -> None:
    """Refuses what a training could not be saved or ended by.

    Raises:
        ValueError: If a value is out of range.
    """
    if _is_below_one(checkpoint_every):
        raise ValueError(
            f"checkpoint_every: expected a number of steps >= 1, got {checkpoint_every!r}. "
            "Set checkpoint_every=100."
        )
    if monitor not in MONITORS:
        raise ValueError(
            f"monitor: expected one of {list(MONITORS)}, got {monitor!r}. Set monitor=val_loss."
        )
    if keep not in ("last", "best"):
        raise ValueError(
            f"keep: expected last or best, got {keep!r}. It says which weights are saved."
        )
    if patience is not None and _is_below_one(patience):
        raise ValueError(
            f"patience: expected a number of validations >= 1, or null, got {patience!r}. "
            "Set patience=3."
        )


def _is_below_one(count: Any) -> bool:
    return isinstance(count, bool) or not isinstance(count, int) or count < 1


def _check_number(
    name: str, value: Any, holds: Callable[[float], bool], condition: str, example: float
) -> None:
    """Raises ValueError unless `value` is a number for which the condition holds."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not holds(value):
        raise ValueError(
            f"{name}: expected a number {condition}, got {value!r}. Set {name}={example}."
        )
