"""What a finished training says about itself: training.json, and a line for people."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

#: `metrics.json` would make it a run of a sweep.
SUMMARY = "training.json"


def summarise(numbers: Mapping[str, float]) -> dict[str, Any]:
    """What training.json says."""
    validation: dict[str, Any] = {}
    if "val_loss" in numbers:
        start = "val_accuracy_"
        validation = {
            "loss": numbers["val_loss"],
            "accuracy": numbers["val_accuracy"],
            "kinds": {
                name.removeprefix(start): value
                for name, value in sorted(numbers.items())
                if name.startswith(start)
            },
        }
    return {
        "steps": int(numbers["step"]),
        # None where all steps were done before this call.
        "train_loss": numbers.get("train_loss"),
        "validation": validation,
        "samples_per_second": numbers.get("samples_per_second"),
        "avg_tokens": numbers.get("avg_tokens"),
        # Batches without a supervised token: they taught nothing.
        "unsupervised_batches": int(numbers.get("unsupervised_batches", 0)),
    }


def sentence(summary: Mapping[str, Any], folder: Path) -> str:
    """The summary for people."""
    parts = [f"{summary['steps']} steps"]
    if summary["train_loss"] is not None:
        parts.append(f"{summary['samples_per_second']:.1f} samples/s")
        parts.append(f"training loss {summary['train_loss']:.3f}")
    if summary["validation"]:
        own = summary["validation"]
        parts.append(f"validation loss {own['loss']:.3f}, accuracy {100 * own['accuracy']:.1f} %")
    return f"{', '.join(parts)}: {folder}"
