"""Files of a run and of a sweep.

A run is complete once `metrics.json` is there: it is written last, and every file appears whole or
not at all.
"""

from __future__ import annotations

import csv
import json
import os
import platform
import re
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from PIL import Image

CONFIG, METRICS, PREDICTIONS = "config.yaml", "metrics.json", "predictions.jsonl"
VERSIONS, KEPT, TABLE = "versions.json", "kept.json", "results.csv"
#: First columns of results.csv; one `accuracy_<kind>` per question kind follows `accuracy_high`.
COLUMNS = (
    *("strategy", "schedule", "lam", "num_stages", "layers", "keeps", "positions", "seed"),
    *("num_samples", "accuracy", "accuracy_low", "accuracy_high"),
    *("tflops", "tflops_ratio", "avg_tokens", "final_tokens", "prefill_ms", "kv_mb"),
    *("num_visual", "model", "run"),
)
_PACKAGES = ("tokenprune", "torch", "transformers", "pytorch-lightning", "hydra-core", "pillow")


def write_text(path: Path, text: str) -> None:
    """Writes a file that is never seen half-written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    draft.write_text(text, encoding="utf-8")
    os.replace(draft, path)


def write_run(
    folder: Path,
    config: Mapping[str, Any],
    metrics: Mapping[str, Any],
    predictions: Sequence[Mapping[str, Any]],
    kept: Sequence[Mapping[str, Any]],
    images: Mapping[str, Image.Image],
    device: str,
) -> None:
    """Writes everything that a run leaves, `metrics.json` last.

    Args:
        folder: The run's folder.
        config: Its resolved config.
        metrics: What was measured.
        predictions: One mapping per sample.
        kept: Kept tokens of the samples that are pictured.
        images: Pictures by their path within the folder.
        device: What it ran on, in words.
    """
    (folder / METRICS).unlink(missing_ok=True)  # of an earlier run with another config
    for name, image in images.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        image.save(folder / name)
    write_text(folder / CONFIG, OmegaConf.to_yaml(OmegaConf.create(dict(config))))
    lines = [json.dumps(prediction, ensure_ascii=False) for prediction in predictions]
    write_text(folder / PREDICTIONS, "".join(f"{line}\n" for line in lines))
    write_text(folder / VERSIONS, json.dumps(_versions(device), indent=2))
    write_text(folder / KEPT, json.dumps(kept, ensure_ascii=False))
    write_text(folder / METRICS, json.dumps(metrics, indent=2, ensure_ascii=False))


def _versions(device: str) -> dict[str, str]:
    versions = {"python": platform.python_version(), "platform": platform.platform()}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:  # a source tree that is not installed
            versions[package] = "not installed"
    return versions | {"device": device}


def is_complete(folder: Path, config: Mapping[str, Any], last: str = METRICS) -> bool:
    """Whether the folder holds a complete run of exactly this resolved config.

    Args:
        folder: The run's folder.
        config: The resolved config.
        last: The file that the run writes last.
    """
    if not (folder / last).is_file() or not (folder / CONFIG).is_file():
        return False
    return bool(OmegaConf.to_container(OmegaConf.load(folder / CONFIG)) == dict(config))


def read_metrics(folder: Path) -> dict[str, Any]:
    """What `metrics.json` of a complete run says."""
    metrics = json.loads((folder / METRICS).read_text(encoding="utf-8"))
    assert isinstance(metrics, dict)
    return metrics


def image_name(identifier: str) -> str:
    """Where the picture of a sample goes, whatever characters its id has."""
    return f"images/{re.sub(r'[^A-Za-z0-9._-]', '_', identifier).lstrip('.') or '_'}.png"


def row(metrics: Mapping[str, Any], run: str) -> dict[str, Any]:
    """A run as a row of results.csv."""
    values: dict[str, Any] = {key: metrics.get(key) for key in COLUMNS} | {"run": run}
    for key in ("layers", "keeps"):
        if values[key] is not None:
            values[key] = " ".join(str(value) for value in values[key])
    return values | {
        f"accuracy_{kind}": kind_metrics["accuracy"]
        for kind, kind_metrics in metrics.get("kinds", {}).items()
    }


def collect(folder: Path, runs: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Rows of the complete runs in a folder.

    Args:
        folder: A sweep's folder.
        runs: Sub-folders in the order wanted; None for all there are.
    """
    if runs is None:
        runs = sorted(path.parent.name for path in folder.glob(f"*/{METRICS}"))
    return [
        row(read_metrics(folder / run), run)
        for run in dict.fromkeys(runs)
        if (folder / run / METRICS).is_file()
    ]


def write_table(folder: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    """Writes results.csv: a row per run; what a run does not have is empty."""
    kinds = sorted({key for row in rows for key in row} - set(COLUMNS))
    after = COLUMNS.index("accuracy_high") + 1
    columns = [*COLUMNS[:after], *kinds, *COLUMNS[after:]]
    path = folder / TABLE
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    with draft.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, columns, restval="")
        writer.writeheader()
        writer.writerows(rows)
    os.replace(draft, path)
    return path


def finish_sweep(folder: Path, runs: Sequence[str]) -> None:
    """Writes the sweep's results.csv and prints its table; training leaves none."""
    rows = collect(folder, runs)
    if rows:
        path = write_table(folder, rows)
        print_table(rows, f"{len(rows)} runs: {path}")


def print_table(rows: Sequence[Mapping[str, Any]], title: str) -> None:
    """Prints runs as a table for people."""
    from rich import box
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=escape(title), title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1))
    for name in ("strategy", "schedule", "positions"):
        table.add_column(name)
    for name in ("accuracy", "95 %", "tokens", "FLOPs", "prefill", "KV cache"):
        table.add_column(name, justify="right", no_wrap=True)
    for entry in rows:
        pruned = entry["schedule"] is not None
        table.add_row(
            escape(entry["strategy"]),
            escape(_schedule(entry)) if pruned else "",
            entry["positions"] if pruned else "",
            f"{100 * entry['accuracy']:.1f} %",
            f"{100 * entry['accuracy_low']:.1f}-{100 * entry['accuracy_high']:.1f}",
            f"{entry['avg_tokens']:.1f}",
            f"{100 * entry['tflops_ratio']:.0f} %",
            f"{entry['prefill_ms']:.1f} ms",
            f"{entry['kv_mb']:.2f} MB",
        )
    console = Console()
    if not console.is_terminal:  # a log: rich assumes 80 columns and would cut numbers off
        console = Console(width=120)
    console.print(table)


def _schedule(entry: Mapping[str, Any]) -> str:
    """`pyramid λ=0.5, 4 stages`, or the cuts themselves."""
    if entry["lam"] is not None:
        return f"{entry['schedule']} λ={entry['lam']}, {entry['num_stages']} stages"
    cuts = zip(str(entry["layers"]).split(), str(entry["keeps"]).split(), strict=True)
    return ", ".join([entry["schedule"], *(f"{keep} at {layer}" for layer, keep in cuts)])
