"""A table from what the `datasets` library finds: on the Hub, in a folder, in a file.

Parquet, Arrow and the like are its to read. JSON and CSV are not: it would take their columns for
numbers, dates and missing values, so it only says which files a split has, and fetches them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenprune.data.errors import first_line
from tokenprune.data.files import CSV, JSON, LINES, Line, form_of
from tokenprune.data.hub_files import TextFile, text_files
from tokenprune.data.tables import ArrowTable, Table, WrittenTable

#: Ends of data files that `HubDataset` reads.
ENDS = (".arrow", ".parquet", *CSV, *LINES, *JSON)


def load_table(
    path: str,
    name: str | None,
    split: str,
    revision: str | None,
    image_column: str,
    texts: Sequence[str],
) -> Table:
    """The rows of a data set's split.

    Args:
        path: Hub id, folder written by `save_to_disk`, folder of data files, or one data file.
        name: Configuration on the Hub.
        split: Split to use; a folder or file without splits takes any name.
        revision: Branch, tag or commit on the Hub.
        image_column: Column of images.
        texts: Columns of texts.

    Raises:
        ValueError: It cannot be loaded, is empty, or a column is missing.
    """
    found, commit = _find(path, name, split, revision)
    if isinstance(found, list):
        lines: list[Line] = []
        for file in found:
            lines += file.rows(path, lines[-1][0] if lines else 0)
        keys = (key for _, row in lines if isinstance(row, Mapping) for key in row)
        columns, length = list(dict.fromkeys(keys)), len(lines)
    else:
        columns, length = found.column_names, len(found)
    if length == 0:
        raise _empty(path, split)
    missing = [column for column in (image_column, *texts) if column not in columns]
    if missing and columns:
        raise ValueError(
            f"HubDataset: expected the column {missing[0]!r} in {path!r}, got {columns}. "
            "Set image_column, question_column, answer_column or conversations_column."
        )
    if isinstance(found, list):
        pictures = (pair for file in found for pair in file.pictures.items())
        return WrittenTable(lines, any(called != own for called, own in pictures), commit)
    try:
        return ArrowTable(found, texts, image_column, commit)
    except ValueError as error:
        raise ValueError(
            f"HubDataset: expected images or paths in the column {image_column!r} of {path!r}, "
            f"got {error}. Set image_column."
        ) from error


def caches() -> list[Path]:
    """Where `datasets` keeps what it fetched or unpacked."""
    import datasets
    from huggingface_hub.constants import HF_HUB_CACHE

    own = datasets.config
    fetched = (own.HF_DATASETS_CACHE, own.DOWNLOADED_DATASETS_PATH, own.EXTRACTED_DATASETS_PATH)
    return [Path(str(folder)) for folder in (*fetched, HF_HUB_CACHE)]


def _find(path: str, name: str | None, split: str, revision: str | None) -> tuple[Any, str | None]:
    """A `datasets.Dataset`, or a list of text files; and the commit on the Hub that it is of."""
    import datasets

    local = Path(path).expanduser()
    is_local = local.exists() or local.is_absolute() or path.startswith((".", "~"))
    if is_local and not local.exists():
        raise ValueError(
            f"HubDataset: expected a file or a folder, got {path!r}, which does not exist. "
            "Check the path; a Hub id has the form owner/name."
        )
    end = local.suffix.lower()
    if local.is_file() and end not in ENDS:
        raise ValueError(
            f"HubDataset: expected a data file that ends in one of {sorted(ENDS)}, got "
            f"{path!r}. Convert it, or point to its folder."
        )
    if local.is_file() and end in (*CSV, *LINES, *JSON):
        return [TextFile(local, form_of(local.name))], None
    commit = None
    try:
        if local.is_file():
            files = {split: str(local)}
            return datasets.load_dataset(end[1:], data_files=files, split=split), None
        if (local / "dataset_dict.json").is_file() or (local / "state.json").is_file():
            loaded = datasets.load_from_disk(str(local))
        else:
            source = str(local) if is_local else path
            builder = datasets.load_dataset_builder(source, name, revision=revision)
            commit = _commit(builder)
            loaded = text_files(builder, split)
            if loaded is None:
                loaded = datasets.load_dataset(source, name, revision=revision)
    except Exception as error:  # whatever the many readers below make of a broken data set
        # So they fail on data without rows, in files and in folders of `save_to_disk`.
        if "corresponds to no data" in str(error) or isinstance(error, IndexError):
            raise _empty(path, split) from error
        raise ValueError(
            f"HubDataset: expected a data set on the Hub or on disk, got {path!r}: "
            f"{first_line(error)}. Check the name, the configuration and the connection."
        ) from error
    if isinstance(loaded, datasets.Dataset):
        loaded = {split if loaded.split is None else str(loaded.split): loaded}
    if split not in loaded:
        raise ValueError(
            f"HubDataset: expected one of the splits {sorted(loaded)} of {path!r}, got {split!r}. "
            "Set split."
        )
    return loaded[split], commit


def _commit(builder: Any) -> str | None:
    """The commit that a builder's files are of; local ones have another kind of mark."""
    found = re.fullmatch(r"[0-9a-f]{40}", str(builder.hash))
    return found and found[0]


def _empty(path: str, split: str) -> ValueError:
    return ValueError(
        f"HubDataset: expected at least one row, got none in {path!r}, split {split!r}. "
        "Choose another split."
    )
