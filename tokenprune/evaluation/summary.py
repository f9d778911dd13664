"""What a run comes to: right answers with their interval, tokens, FLOPs, time and memory."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from typing import Any

import tokenprune as tp

_Z95 = 1.959963984540054  # two-sided 95 % of the normal distribution


def wilson(correct: float, total: int) -> tuple[float, float]:
    """95 % interval of a proportion (Wilson, 1927); never leaves [0, 1], sound at 0 and 1.

    Scores between 0 and 1 vary less than right and wrong do: of their mean it is no too narrow one.
    """
    if total == 0:
        return 0.0, 1.0
    share, z2 = correct / total, _Z95**2
    centre = (share + z2 / (2 * total)) / (1 + z2 / total)
    half = _Z95 * math.sqrt(share * (1 - share) / total + z2 / (4 * total**2)) / (1 + z2 / total)
    return max(0.0, centre - half), min(1.0, centre + half)


def summarise(
    records: Sequence[Mapping[str, Any]],
    seconds: Sequence[float],
    shape: tp.cost.DecoderShape,
    bytes_per_value: int,
) -> dict[str, Any]:
    """Metrics of a run.

    Args:
        records: One mapping per sample, as `Evaluator.predict_step` makes them.
        seconds: Prefill time per sample, one entry per batch.
        shape: Sizes of the decoder.
        bytes_per_value: Of the key-value cache.

    Raises:
        ValueError: If there are no samples.
    """
    if not records:
        raise ValueError(
            "evaluate: expected at least one sample, got an empty data set. Check the data config."
        )

    @cache
    def visual_flops(lengths: tuple[int, ...]) -> float:
        return tp.cost.flops(shape, lengths, convention="pyramiddrop")

    def accuracy(part: Sequence[Mapping[str, Any]]) -> tuple[float, float, float]:
        correct = sum(record["score"] for record in part)
        return correct / len(part), *wilson(correct, len(part))

    num = len(records)
    kinds: dict[str, dict[str, float]] = {}
    for kind in sorted({record["kind"] for record in records}):
        part = [record for record in records if record["kind"] == kind]
        share, low, high = accuracy(part)
        kinds[kind] = {"accuracy": share, "low": low, "high": high, "num_samples": len(part)}
    share, low, high = accuracy(records)
    per_layer = [sum(counts) / num for counts in zip(*(r["visual"] for r in records), strict=True)]
    flops = sum(visual_flops(tuple(record["visual"])) for record in records) / num
    whole = sum(visual_flops((record["num_visual"],) * shape.num_layers) for record in records)
    kv = None
    if shape.caches_alike:
        sizes = (
            tp.cost.kv_bytes(shape, r["real"], bytes_per_value=bytes_per_value) for r in records
        )
        kv = sum(sizes) / num / 1e6
    return {
        "num_samples": num,
        "accuracy": share,
        "accuracy_low": low,
        "accuracy_high": high,
        "kinds": kinds,
        "visual_tokens_per_layer": per_layer,
        "avg_tokens": sum(per_layer) / len(per_layer),
        "final_tokens": per_layer[-1],
        "tflops": flops / 1e12,
        "tflops_ratio": flops / (whole / num) if whole else 1.0,
        "prefill_ms": 1000 * statistics.median(seconds),
        "kv_mb": kv,
        "num_visual": sum(record["num_visual"] for record in records) / num,
        # A budget is solved for one size of image: what the data's sizes gave.
        "num_visual_range": _range(record["num_visual"] for record in records),
        "avg_tokens_range": _range(sum(r["visual"]) / len(r["visual"]) for r in records),
        "tflops_range": _range(visual_flops(tuple(r["visual"])) / 1e12 for r in records),
    }


def _range(values: Iterable[float]) -> list[float]:
    """Smallest and largest of the samples' values."""
    known = list(values)
    return [min(known), max(known)]
