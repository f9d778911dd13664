"""What an evaluation wrote: its runs, and the files beside each."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from tokenprune.runs import results

UNPRUNED = "unpruned"
# Entries of a config in which the seeds of one experiment may differ, and those without effect on
# the answers. `data.seed` orders training samples; `data.test.seed` asks other questions.
SEEDS = ("seed", "strategy.seed", "data.seed")
NO_EFFECT = ("logger", "num_pictures", "data.num_workers", "trainer.callbacks")
# Entries of a schedule that its row in results.csv tells, as its budget.
BUDGET = ("lam", "num_stages", "layers", "layer", "keep", "stages", "num_layers", "_target_")


@dataclass(frozen=True)
class Run:
    """A row of results.csv, by column name, and the folder that holds the run's other files."""

    values: Mapping[str, str]
    folder: Path | None
    #: The run's resolved config by dotted key; empty where it is not known.
    config: Mapping[str, str] = field(default_factory=dict)

    def text(self, column: str) -> str:
        return self.values.get(column, "").strip()

    def number(self, column: str) -> float | None:
        try:
            value = float(self.text(column))
        except ValueError:
            return None
        return value if math.isfinite(value) else None

    def file(self, name: str) -> Path | None:
        """A file of the run's, where it is there."""
        path = self.folder / name if self.folder else None
        return path if path is not None and path.is_file() else None

    @property
    def strategy(self) -> str:
        name = self.text("strategy")
        return UNPRUNED if name in ("none", "") else name

    @property
    def budget(self) -> tuple[str, ...]:
        """What the runs of several strategies must share to be compared."""
        return tuple(self.text(c) for c in ("schedule", "lam", "num_stages", "layers", "keeps"))

    @property
    def circumstances(self) -> dict[str, str]:
        """All but strategy, schedule, positions and seeds: model, data, how answers are made."""
        own = {"model": self.text("model"), "data": self.text("data")}
        return own | _without(self.config, ("strategy", "schedule", "positions"))

    @property
    def variant(self) -> dict[str, str]:
        """What tells runs of one strategy at one budget apart, seeds left out."""
        if self.strategy == UNPRUNED:
            return {}
        own = {"positions": self.text("positions")}
        inside = {k: v for k, v in self.config.items() if k.startswith(("strategy.", "schedule."))}
        return own | {
            key.split(".", 1)[1]: value
            for key, value in _without(inside, ()).items()
            if not key.startswith("schedule.") or key.split(".")[1] not in BUDGET
        }


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
            _row(_read_object(file), file.parent.relative_to(folder).as_posix()) for file in files
        ]
        columns = list(dict.fromkeys(name for row in rows for name in row))
        where = str(folder)
        if not rows:
            raise ValueError(
                f"report: expected results.csv or a run's metrics.json in {folder}, got neither. "
                "Run `tokenprune eval` first, and give its output folder."
            )
    places = [inside(folder, row.get("run", "")) for row in rows]
    runs = [Run(row, place, _config(place)) for row, place in zip(rows, places, strict=True)]
    if not any(run.number("accuracy") is not None for run in runs):
        raise ValueError(
            f"report: expected rows with a column accuracy in {where}, got {len(runs)} rows with "
            f"columns {columns}. Run the evaluation again, or give another folder."
        )
    return columns, runs


def _without(config: Mapping[str, str], groups: Sequence[str]) -> dict[str, str]:
    """A config without seeds, what has no effect, and whole groups."""
    left_out = (*SEEDS, *NO_EFFECT, *groups, "ckpt_path")
    return {
        key: value
        for key, value in config.items()
        if not any(key == name or key.startswith(f"{name}.") for name in left_out)
    }


def _config(folder: Path | None) -> dict[str, str]:
    """The resolved config of a run by dotted key; empty where there is none to read."""
    path = folder / results.CONFIG if folder else None
    if path is None or not path.is_file():
        return {}
    try:
        loaded = OmegaConf.to_container(OmegaConf.load(path))
    except Exception:  # whatever the readers of YAML make of something else
        return {}  # the report shows it as it is
    return dict(_flat(loaded)) if isinstance(loaded, dict) else {}


def _flat(node: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in node.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", str(value)


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
    result: dict[str, dict[str, Any]] = {}
    with path.open(encoding="utf-8") as stream:
        for number, line in enumerate(stream, 1):
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(
                    f"report: expected JSON in line {number} of {path}, got {error}. "
                    "Run that evaluation again."
                ) from error
            if str(record.get("id")) in wanted:
                result[str(record["id"])] = record
    return result


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


def _row(metrics: Mapping[str, Any], run: str) -> dict[str, str]:
    """metrics.json as the row that results.csv would have."""
    values = results.row(metrics, run)
    return {name: "" if value is None else str(value) for name, value in values.items()}


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
