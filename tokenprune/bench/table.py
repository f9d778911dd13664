"""The table of a run's or a sweep's rows: bench.csv for programs, and one for people."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenprune.bench.check import MEASURES
from tokenprune.bench.plot import plot
from tokenprune.runs import results, tables

RESULT, TABLE, PLOT = "bench.json", "bench.csv", "bench.png"
#: Of captured prefills, where they are asked for.
_CAPTURED = (
    *("unpruned_graph_ms", "unpruned_graph_ms_low", "unpruned_graph_ms_high"),
    *("pruned_graph_ms", "pruned_graph_ms_low", "pruned_graph_ms_high"),
    *("graph_ratio", "graph_ratio_low", "graph_ratio_high"),
    *("graph_ratio_captured", "graph_ratio_captured_low", "graph_ratio_captured_high"),
    *("unpruned_graph_peak_mb", "pruned_graph_peak_mb"),
)
#: Columns of bench.csv: what ran, what came out (medians; low and high are quartiles), on what.
COLUMNS = (
    *("measure", "shape", "strategy", "schedule", "positions", "batch_size", "num_visual"),
    *("num_text", "avg_tokens", "tuning", "logits", "way", "status"),
    *("unpruned_ms", "unpruned_ms_low", "unpruned_ms_high"),
    *("pruned_ms", "pruned_ms_low", "pruned_ms_high"),
    *("time_ratio", "time_ratio_low", "time_ratio_high", "flops_ratio", "over_flops"),
    *("over_product", "over_product_low", "over_product_high"),
    *_CAPTURED,
    *("pruning_ms", "pruning_share", "keys_ms", "pruning_over_keys"),
    *("unpruned_peak_mb", "pruned_peak_mb", "unpruned_kv_mb", "pruned_kv_mb", "expected_kv_mb"),
    *("weights_mb", "rounds", "dtype", "attention", "machine", "threads", "torch", "transformers"),
    "run",
)
#: What a row of another way of pruning leaves open.
PRODUCT_ONLY = (
    *("pruning_ms", "pruning_share", "keys_ms", "pruning_over_keys", "expected_kv_mb"),
    *_CAPTURED,
)


def read(folder: Path) -> dict[str, Any]:
    """What a complete run measured."""
    found = json.loads((folder / RESULT).read_text(encoding="utf-8"))
    assert isinstance(found, dict)
    return found


def publish(folder: Path) -> list[dict[str, Any]]:
    """Writes bench.csv and bench.png of a run's or a sweep's folder; the rows."""
    return results.settle(lambda: _collect(folder), lambda rows: _write(folder, rows))


def _collect(folder: Path) -> list[dict[str, Any]]:
    paths = sorted(folder.rglob(RESULT))
    runs = [read(path.parent) | {"run": path.parent.name} for path in paths]
    rows = [row for run in runs for row in with_ways(run)]
    # A stable sort: the rows of a run stay together, its ways in their order.
    rows.sort(key=lambda row: [MEASURES.index(row["measure"]), str(row["shape"]), row["num_visual"],
                               row["batch_size"], row["run"]])  # fmt: skip
    return rows


def _write(folder: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, restval="", extrasaction="ignore")
    writer.writeheader()
    writer.writerows([{key: _rounded(value) for key, value in row.items()} for row in rows])
    results.write_text(folder / TABLE, text.getvalue())
    picture = plot([r for r in rows if r.get("flops_ratio") and not r.get("way")])
    results.write_bytes(folder / PLOT, picture)


def with_ways(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A run's row, and one for each way measured beside it."""
    row = {key: value for key, value in found.items() if key != "ways"}
    others = {key: value for key, value in row.items() if key not in PRODUCT_ONLY}
    return [row, *(others | own for own in found.get("ways", []))]


def _rounded(value: Any) -> Any:
    return f"{value:.6g}" if isinstance(value, float) else value


def print_table(rows: Sequence[Mapping[str, Any]], title: str) -> None:
    """Prints what was measured as a table for people."""
    cells = []
    for row in [line for found in rows for line in with_ways(found)]:
        head = [row["measure"], row["shape"], row["strategy"]]
        head[2] += f" ({row['way']})" if row.get("way") else ""
        head += [f"{row['num_visual']}+{row['num_text']}", str(row["batch_size"])]
        if row["status"] != "ok":
            cells.append([*head, row["status"], *[""] * 5])
            continue
        kept = [row.get(key) for key in ("unpruned_kv_mb", "pruned_kv_mb")]
        cells.append(
            [
                *head,
                f"{row['unpruned_ms']:.4g} ms",
                f"{row['pruned_ms']:.4g} ms",
                f"{100 * row['time_ratio']:.1f} %",
                f"{100 * row['flops_ratio']:.1f} %" if row["flops_ratio"] else "unknown",
                f"{100 * row['pruning_share']:.1f} %" if "pruning_share" in row else "",
                "" if None in kept else f"{kept[0]:.4g} -> {kept[1]:.4g} MB",
            ]
        )
        if "graph_ratio" in row:
            head[2] += " (captured)"
            cells.append(
                [
                    *head,
                    f"{row['unpruned_graph_ms']:.4g} ms",
                    f"{row['pruned_graph_ms']:.4g} ms",
                    f"{100 * row['graph_ratio_captured']:.1f} %",
                    *(cells[-1][8], "", cells[-1][10]),
                ]
            )
    measured = ("unpruned", "pruned", "time", "FLOPs", "pruning", "KV cache")
    texts = ("measure", "shape", "strategy")
    tables.print_table(title, texts, ("tokens", "rows", *measured), cells)
