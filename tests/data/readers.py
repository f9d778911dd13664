"""The same rows through every reader of data sets."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from tokenprune.data import FolderDataset, HubDataset

Rows = list[dict[str, Any]]
Reader = Callable[..., FolderDataset | HubDataset]


def _pictures(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, colour in (("a.png", "red"), ("b.png", "blue")):
        Image.new("RGB", (20, 10), colour).save(folder / name)
    return folder


def _written(folder: Path, name: str, rows: Rows) -> Path:
    """A text file, with pictures beside it."""
    path = _pictures(folder) / name
    if name.endswith(".csv"):
        columns = list(dict.fromkeys(key for row in rows for key in row))
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(rows)
    elif name.endswith(".json") and name != "lines.json":
        path.write_text(json.dumps(rows), encoding="utf-8")
    else:
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
        path.write_text("".join(lines), encoding="utf-8")
    return path


def folder_of(name: str) -> Reader:
    return lambda folder, rows, **options: FolderDataset(_written(folder, name, rows), **options)


def _columns(rows: Rows, options: Mapping[str, Any]) -> dict[str, Any]:
    """The optional columns, which the Hub's reader wants to be told."""
    named = {f"{key}_column": key for key in ("id", "kind") if any(key in row for row in rows)}
    talks = [key for key in ("conversations", "messages") if any(key in row for row in rows)]
    return named | ({"conversations_column": talks[0]} if talks else {}) | dict(options)


def hub_file(name: str) -> Reader:
    def read(folder: Path, rows: Rows, **options: Any) -> HubDataset:
        return HubDataset(str(_written(folder, name, rows)), **_columns(rows, options))

    return read


def hub_folder(name: str) -> Reader:
    """A folder in which `datasets` finds the file of the split."""

    def read(folder: Path, rows: Rows, **options: Any) -> HubDataset:
        # Pictures alone would make it a folder of pictures.
        path = _written(folder / "pictures", name, rows)
        path.rename(folder / name)
        moved = [_moved(row) for row in rows]
        _written(folder / "again", name, moved).replace(folder / name)
        return HubDataset(str(folder), **_columns(rows, options))

    return read


def _moved(row: dict[str, Any]) -> dict[str, Any]:
    image = row.get("image")
    return row | ({"image": f"pictures/{image}"} if image else {})


def image_folder(name: str) -> Reader:
    def read(folder: Path, rows: Rows, **options: Any) -> HubDataset:
        own = [{"file_name" if key == "image" else key: row[key] for key in row} for row in rows]
        _written(folder / "test", name, own)
        return HubDataset(str(folder), **_columns(rows, options))

    return read


def _table(rows: Rows) -> Any:
    import pyarrow as pa

    columns = list(dict.fromkeys(key for row in rows for key in row))
    return pa.table({key: pa.array([row.get(key) for row in rows]) for key in columns})


def parquet(folder: Path, rows: Rows, **options: Any) -> HubDataset:
    import pyarrow.parquet as pq

    path = _pictures(folder) / "rows.parquet"
    pq.write_table(_table(rows), path)
    return HubDataset(str(path), **_columns(rows, options))


def arrow(folder: Path, rows: Rows, **options: Any) -> HubDataset:
    import pyarrow as pa

    path = _pictures(folder) / "rows.arrow"
    table = _table(rows)
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table)
    return HubDataset(str(path), **_columns(rows, options))


def saved(folder: Path, rows: Rows, **options: Any) -> HubDataset:
    import datasets

    datasets.Dataset(_table(rows)).save_to_disk(str(folder))
    _pictures(folder)
    return HubDataset(str(folder), **_columns(rows, options))


JSON: dict[str, Reader] = {
    "json": folder_of("rows.json"),
    "lines": folder_of("rows.jsonl"),
    "lines called json": folder_of("lines.json"),
    "hub json": hub_file("rows.json"),
    "hub lines": hub_file("rows.jsonl"),
    "hub folder of lines": hub_folder("test.jsonl"),
    "image folder of lines": image_folder("metadata.jsonl"),
}
CSV: dict[str, Reader] = {
    "csv": folder_of("rows.csv"),
    "hub csv": hub_file("rows.csv"),
    "hub folder of csv": hub_folder("test.csv"),
    "image folder of csv": image_folder("metadata.csv"),
}
ARROW: dict[str, Reader] = {"parquet": parquet, "arrow": arrow, "saved": saved}
READERS = JSON | CSV | ARROW
