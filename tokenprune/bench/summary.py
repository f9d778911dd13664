"""What the rounds come to: medians with quartiles, ratios round by round, theory beside them."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from tokenprune.bench.timing import Timing
from tokenprune.bench.variants import CAPTURED, Bench


def summarise(bench: Bench, measure: str, timing: Timing) -> dict[str, Any]:
    """Columns of a run's row, and every round under `rounds_s`.

    Args:
        bench: What was timed.
        measure: `prefill`, `decode` or `train`.
        timing: Of its rounds.
    """
    # Decoding is told per token.
    scale = 1e3 / (bench.load.new_tokens if measure == "decode" else 1)
    unpruned, pruned = timing.seconds["unpruned"], timing.seconds["pruned"]
    ratios = [b / a for a, b in zip(unpruned, pruned, strict=True)]
    flops_ratio = None  # of layers that the cost model does not know
    if not bench.shape.unlike:
        flops_ratio = bench.theory.flops(measure, True) / bench.theory.flops(measure, False)
    lengths = bench.theory.lengths()
    found: dict[str, Any] = {
        **_spread("unpruned_ms", [scale * value for value in unpruned]),
        **_spread("pruned_ms", [scale * value for value in pruned]),
        **_spread("time_ratio", ratios),
        "flops_ratio": flops_ratio,
        "over_flops": flops_ratio and statistics.median(ratios) / flops_ratio,
        "avg_tokens": sum(lengths) / len(lengths),
        "pruning_ms": scale * statistics.median(timing.hooks),
        "pruning_share": statistics.median(
            hooks / whole
            for hooks, whole in zip(timing.hooks, timing.seconds.get("marked", pruned), strict=True)
        ),
        "unpruned_peak_mb": timing.peaks["unpruned"] / 1e6,
        "pruned_peak_mb": timing.peaks["pruned"] / 1e6,
        "rounds_s": timing.seconds | {"hooks": timing.hooks},
    }
    if "keys" in timing.seconds:
        keys = timing.seconds["keys"]
        found["keys_ms"] = scale * statistics.median(keys)
        found["pruning_over_keys"] = statistics.median(
            hooks / alone for hooks, alone in zip(timing.hooks, keys, strict=True)
        )
    if bench.graphs is not None:
        found |= _captured(timing, scale)
    if bench.ways:
        found["ways"] = [_way_summary(way, timing, scale, flops_ratio) for way in bench.ways]
    return found


def _captured(timing: Timing, scale: float) -> dict[str, Any]:
    """Captured prefills: times, and the pruned one's by the unpruned model's, run and captured."""
    own = timing.seconds["pruned_graph"]
    found: dict[str, Any] = {}
    for name in CAPTURED:
        found |= _spread(f"{name}_ms", [scale * value for value in timing.seconds[name]])
        found[f"{name}_peak_mb"] = timing.peaks[name] / 1e6
    for name, other in (("graph_ratio", "unpruned"), ("graph_ratio_captured", "unpruned_graph")):
        pairs = zip(timing.seconds[other], own, strict=True)
        found |= _spread(name, [b / a for a, b in pairs])
    return found


def _way_summary(
    way: str, timing: Timing, scale: float, flops_ratio: float | None
) -> dict[str, Any]:
    """A way's columns of its own: what is `pruned` there is the way."""
    own = timing.seconds[way]
    by_unpruned, by_product = (
        [b / a for a, b in zip(timing.seconds[name], own, strict=True)]
        for name in ("unpruned", "pruned")
    )
    return {
        "way": way,
        **_spread("pruned_ms", [scale * value for value in own]),
        **_spread("time_ratio", by_unpruned),
        **_spread("over_product", by_product),
        "over_flops": flops_ratio and statistics.median(by_unpruned) / flops_ratio,
        "pruned_peak_mb": timing.peaks[way] / 1e6,
    }


def _spread(name: str, values: Sequence[float]) -> dict[str, float]:
    """Median and quartiles; the ends themselves where there are fewer than four."""
    ends = (min(values), max(values))
    if len(values) >= 4:
        low, _, high = statistics.quantiles(values, n=4, method="inclusive")
        ends = (low, high)
    return {name: statistics.median(values), f"{name}_low": ends[0], f"{name}_high": ends[1]}
