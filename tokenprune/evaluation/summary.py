"""What a run comes to: right answers with their interval, tokens, FLOPs, time and memory."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from typing import Any

import tokenprune as tp
from tokenprune.runs.images import num_images, share_interval


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

    def accuracy(part: Sequence[Mapping[str, Any]]) -> tuple[float, float, float]:
        scores = [record["score"] for record in part]
        pictures = [record.get("picture") for record in part]
        return sum(scores) / len(part), *share_interval(scores, pictures)

    num = len(records)
    kinds: dict[str, dict[str, float]] = {}
    for kind in sorted({record["kind"] for record in records}):
        part = [record for record in records if record["kind"] == kind]
        share, low, high = accuracy(part)
        kinds[kind] = {"accuracy": share, "low": low, "high": high, "num_samples": len(part)}
    share, low, high = accuracy(records)
    return {
        "num_samples": num,
        "num_images": num_images([record.get("picture") for record in records]),
        "accuracy": share,
        "accuracy_low": low,
        "accuracy_high": high,
        "kinds": kinds,
        **cost_of(records, shape),
        "prefill_ms": 1000 * statistics.median(seconds),
        "kv_mb": kv_megabytes(records, shape, bytes_per_value),
    }


def cost_of(records: Sequence[Mapping[str, Any]], shape: tp.cost.DecoderShape) -> dict[str, Any]:
    """Visual tokens and FLOPs of a run, on average; at least one record.

    Args:
        records: Each with `visual`, the visual tokens of every layer, and `num_visual`, those of
            the prompt.
        shape: Sizes of the decoder.
    """

    @cache
    def flops(lengths: tuple[int, ...]) -> float:
        return tp.cost.flops(shape, lengths, convention="pyramiddrop")

    num = len(records)
    per_layer = [sum(counts) / num for counts in zip(*(r["visual"] for r in records), strict=True)]
    mean = sum(flops(tuple(record["visual"])) for record in records) / num
    whole = sum(flops((record["num_visual"],) * shape.num_layers) for record in records)
    return {
        "visual_tokens_per_layer": per_layer,
        "avg_tokens": sum(per_layer) / len(per_layer),
        "final_tokens": per_layer[-1],
        "tflops": mean / 1e12,
        "tflops_ratio": mean / (whole / num) if whole else 1.0,
        "num_visual": sum(record["num_visual"] for record in records) / num,
        # A budget is solved for one size of image: what the data's sizes gave.
        "num_visual_range": _range(record["num_visual"] for record in records),
        "avg_tokens_range": _range(sum(r["visual"]) / len(r["visual"]) for r in records),
        "tflops_range": _range(flops(tuple(r["visual"])) / 1e12 for r in records),
    }


def kv_megabytes(
    records: Sequence[Mapping[str, Any]], shape: tp.cost.DecoderShape, bytes_per_value: int
) -> float | None:
    """Key-value cache of a sample's prompt, on average; None where layers' caches differ.

    Args:
        records: Each with `real`, the tokens of every layer.
        shape: Sizes of the decoder.
        bytes_per_value: Of the cache.
    """
    if not shape.caches_alike:
        return None
    sizes = (tp.cost.kv_bytes(shape, r["real"], bytes_per_value=bytes_per_value) for r in records)
    return sum(sizes) / len(records) / 1e6


def _range(values: Iterable[float]) -> list[float]:
    """Smallest and largest of the samples' values."""
    known = list(values)
    return [min(known), max(known)]
