"""Runs as an evaluation leaves them, with scores of the test's choice and no model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenprune.runs import results
from tokenprune.runs.methods import Method, gather, read_runs

NUM_VISUAL = 100


def make_run(
    folder: Path,
    name: str,
    scores: Sequence[float] | None,
    *,
    strategy: str = "none",
    keep: float | None = None,
    layer: int = 2,
    seed: int = 0,
    image_scale: float = 1.0,
    positions: str = "original",
    asked: str = "what?",
    kinds: Sequence[str] = ("all",),
    accuracy: float | None = None,
    pictures: Sequence[str] | None = None,
    config: dict[str, Any] | None = None,
    versions: dict[str, str] | None = None,
) -> None:
    """Writes a run; without scores its predictions have none. Its kinds take turns."""
    values = [0.5] if scores is None else list(scores)
    metrics = {
        "strategy": strategy,
        "schedule": None if keep is None else "one_shot",
        "layers": None if keep is None else [layer],
        "keeps": None if keep is None else [keep],
        "num_stages": None if keep is None else 2,
        "image_scale": image_scale,
        "positions": positions,
        "seed": seed,
        "model": "tiny",
        "data": "scenes",
        "num_samples": len(values),
        "accuracy": sum(values) / len(values) if accuracy is None else accuracy,
        "accuracy_low": 0.0,
        "accuracy_high": 1.0,
        "avg_tokens": NUM_VISUAL * (1 if keep is None else keep),
        "final_tokens": NUM_VISUAL * (1 if keep is None else keep),
        "num_visual": NUM_VISUAL,
        "tflops": 1.0,
        "tflops_ratio": 1.0,
        "prefill_ms": 1.0,
        "kv_mb": None,
    }
    predictions: list[dict[str, Any]] = [
        {
            "id": str(index),
            "kind": kinds[index % len(kinds)],
            "question": asked,
            "answer": "a",
            "prediction": "b",
        }
        | ({} if scores is None else {"score": score, "correct": score >= 0.5})
        | ({} if pictures is None else {"picture": pictures[index]})
        for index, score in enumerate(values)
    ]
    results.write_run(
        folder=folder / name,
        config={"seed": seed, "data": {"image_scale": image_scale}} | (config or {}),
        metrics=metrics,
        predictions=predictions,
        kept=[],
        images={},
        versions=versions or {"data.path": "0"},
    )


def methods_in(folder: Path) -> list[Method]:
    """What is in a sweep's folder."""
    return gather(read_runs(folder, results.collect(folder)))
