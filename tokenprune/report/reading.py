"""What an evaluation wrote: its runs, and the files beside each."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenprune.runs import results
from tokenprune.runs.methods import Run, as_text


def load(folder: Path) -> tuple[list[str], list[Run]]:
    """The columns and rows of `results.csv`, or the same from the runs' `metrics.json`.

    Raises:
        ValueError: If there is neither, or no row has an accuracy.
    """
    table = folder / results.TABLE
    if not folder.is_dir():
        raise ValueError(
            f"report: expected a folder with results, got {folder}, which is not a folder. "
            "Give the output folder of an evaluation or a sweep."
        )
    if table.is_file():
        with table.open(newline="", encoding="utf-8") as stream:
            reader = csv.DictReader(stream, restkey="", restval="")
            rows = [{k: v for k, v in row.items() if k} for row in reader]
            columns = [name for name in reader.fieldnames or [] if name]
        where = str(table)
    else:
        files = [folder / results.METRICS]
        if not files[0].is_file():
            files = sorted(folder.glob(f"**/{results.METRICS}"))
        rows = [
            as_text(results.row(_read_object(file), file.parent.relative_to(folder).as_posix()))
            for file in files
        ]
        columns = list(dict.fromkeys(name for row in rows for name in row))
        where = str(folder)
        if not rows:
            raise ValueError(
                f"report: expected results.csv or a run's metrics.json in {folder}, got neither. "
                "Run `tokenprune eval` first, and give its output folder."
            )
    places = [inside(folder, row.get("run", "")) for row in rows]
    runs = [Run.read(row, place) for row, place in zip(rows, places, strict=True)]
    if not any(run.number("accuracy") is not None for run in runs):
        raise ValueError(
            f"report: expected rows with a column accuracy in {where}, got {len(runs)} rows with "
            f"columns {columns}. Run the evaluation again, or give another folder."
        )
    return columns, runs


def kind_intervals(run: Run) -> dict[str, tuple[float | None, float | None]]:
    """(low, high) per kind from a run's metrics.json; results.csv has no room for them."""
    path = run.file(results.METRICS)
    if path is None:
        return {}
    kinds = _read_object(path).get("kinds") or {}
    return {kind: (entry.get("low"), entry.get("high")) for kind, entry in kinds.items()}


def kept_records(run: Run) -> list[dict[str, Any]]:
    """The records of a run's kept.json that have stages and places to draw."""
    path = run.file(results.KEPT)
    if path is None:
        return []
    records = _read_json(path)
    needed = {"id", "question", "answer", "image", "grids", "places", "stages"}
    if not isinstance(records, list) or any(
        not isinstance(record, dict) or not needed <= set(record) for record in records
    ):
        raise ValueError(
            f"report: expected a list of records with {sorted(needed)} in {path}, got something "
            "else. Run that evaluation again."
        )
    return [record for record in records if record["stages"]]


def predictions(run: Run, ids: set[Any]) -> dict[str, dict[str, Any]]:
    """The wanted lines of a run's predictions.jsonl by id; empty where there is no such file."""
    path = run.file(results.PREDICTIONS)
    if path is None:
        return {}
    wanted = {str(name) for name in ids}
    lines = results.read_predictions(path)
    return {str(line["id"]): line for line in lines if str(line.get("id")) in wanted}


def versions(runs: Sequence[Run]) -> list[tuple[str, str]]:
    """Every version that any run was made with; several values where the runs differ."""
    found: dict[str, list[str]] = {}
    for run in runs:
        if (path := run.file(results.VERSIONS)) is not None:
            for name, value in _read_object(path).items():
                text = value if isinstance(value, str) else json.dumps(value)
                if text not in found.setdefault(name, []):
                    found[name].append(text)
    return [(name, ", ".join(values)) for name, values in found.items()]


def first_config(runs: Sequence[Run]) -> tuple[str, str] | None:
    """The first run's resolved config, with the run's name."""
    for run in runs:
        if (path := run.file(results.CONFIG)) is not None:
            return run.text("run"), path.read_text(encoding="utf-8", errors="replace")
    return None


def inside(folder: Path, relative: str) -> Path | None:
    """`folder / relative`, or None where that leads out of the folder."""
    root = folder.resolve()
    path = (root / relative).resolve()
    return path if path.is_relative_to(root) else None


def _read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file; ValueError where there is something else."""
    value = _read_json(path)
    if not isinstance(value, dict):
        raise ValueError(
            f"report: expected a JSON object in {path}, got {type(value).__name__}. "
            "Run that evaluation again."
        )
    return value


def _read_json(path: Path) -> Any:
    """The JSON in a file; ValueError where there is none."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(
            f"report: expected JSON in {path}, got {error}. Run that evaluation again."
        ) from error
