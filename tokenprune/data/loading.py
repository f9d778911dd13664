"""A table from what the `datasets` library finds: on the Hub, in a folder, in a file.

Parquet, Arrow and the like are its to read. JSON and CSV are not: it would take their columns for
numbers, dates and missing values, so it only says which files a split has, and fetches them.
"""

from __future__ import annotations

import posixpath
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from tokenprune.data.errors import first_line
from tokenprune.data.files import CSV, JSON, LINES, Form, Line, form_of, read_rows
from tokenprune.data.tables import ArrowTable, Table, WrittenTable

#: Ends of data files that `HubDataset` reads.
ENDS = (".arrow", ".parquet", *CSV, *LINES, *JSON)
# What may differ from the usual in a data set's card, of the options that CSV has there.
_CSV_OPTIONS = ("sep", "delimiter", "names", "column_names", "header", "encoding", "features")


@dataclass(frozen=True)
class _File:
    """A text file of rows on this machine.

    Attributes:
        path: Where it is.
        form: How it is written.
        labels: Names of the classes that some columns give by number.
        base: What it calls pictures from, in a folder of pictures.
        pictures: Where those are.
    """

    path: Path
    form: Form
    labels: Mapping[str, Sequence[str]] = field(default_factory=dict)
    base: str | None = None
    pictures: Mapping[str, str] = field(default_factory=dict)

    def rows(self, source: str, before: int) -> Iterator[Line]:
        for number, row in read_rows(self.path, source, self.form, before):
            yield number, row if isinstance(row, ValueError) else self._row(row)

    def _row(self, row: Mapping[str, Any]) -> dict[str, Any]:
        own = dict(row)
        for key, names in self.labels.items():
            if isinstance(own.get(key), str) and own[key].isdecimal():
                own[key] = dict(enumerate(names)).get(int(own[key]), own[key])
        if self.base is None:
            return own
        return {_picture_key(key): self._cell(key, cell) for key, cell in own.items()}

    def _cell(self, key: str, cell: Any) -> Any:
        if _picture_key(key) == key:
            return cell
        if isinstance(cell, list):
            return [self._picture(one) for one in cell]
        return self._picture(cell)

    def _picture(self, name: Any) -> Any:
        if self.base is None or not isinstance(name, str):
            return name
        whole = f"{self.base}/{posixpath.normpath(name)}"
        return self.pictures.get(whole, name if "://" in whole else posixpath.join(self.base, name))


def _picture_key(key: str) -> str:
    """The column of images that `datasets` makes of a column of their files' names."""
    for end, alone in (("file_name", "image"), ("file_names", "images")):
        if key == end or key.endswith(f"_{end}"):
            return key.removesuffix(end).removesuffix("_") or alone
    return key


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
    found = _find(path, name, split, revision)
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
        return WrittenTable(lines, fetched=any(file.pictures for file in found))
    try:
        return ArrowTable(found, texts, image_column)
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


def _find(path: str, name: str | None, split: str, revision: str | None) -> Any:
    """A `datasets.Dataset`, or a list of text files."""
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
        return [_File(local, form_of(local.name))]
    try:
        if local.is_file():
            files = {split: str(local)}
            return datasets.load_dataset(end[1:], data_files=files, split=split)
        if (local / "dataset_dict.json").is_file() or (local / "state.json").is_file():
            loaded = datasets.load_from_disk(str(local))
        else:
            source = str(local) if is_local else path
            builder = datasets.load_dataset_builder(source, name, revision=revision)
            loaded = _text_files(builder, split)
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
    return loaded[split]


def _text_files(builder: Any, split: str) -> dict[str, list[_File]] | None:
    """The text files of each split, of which only those of one are fetched; None if others are."""
    import datasets

    kind, config = builder.info.builder_name, builder.config
    splits = {str(own): [str(file) for file in files] for own, files in config.data_files.items()}
    files = splits.get(split, [])
    manager = datasets.DownloadManager(builder.dataset_name, base_path=builder.base_path)
    found: list[_File] = []
    if kind in ("csv", "json"):
        features = builder.info.features or {}
        labels = {key: own.names for key, own in features.items() if hasattr(own, "names")}
        for file, fetched in zip(files, manager.download_and_extract(files), strict=True):
            form = _form(config, kind, file)
            found += [_File(Path(own), form, labels) for own in manager.iter_files(fetched)]
    elif kind == "imagefolder" and not config.drop_metadata:
        pairs = []
        for file, fetched in zip(files, manager.download(files), strict=True):
            if file.endswith(".zip"):
                pairs += [(own, own) for own in manager.iter_files(manager.extract(fetched))]
            else:
                pairs.append((file, fetched))
        names = config.metadata_filenames or ("metadata.csv", "metadata.jsonl")
        pictures = {file: str(fetched) for file, fetched in pairs}
        found = [
            _File(Path(own), form_of(file), base=posixpath.dirname(file), pictures=pictures)
            for file, own in pictures.items()
            if posixpath.basename(file) in names and not file.endswith(".parquet")
        ]
        if not found:
            return None
    else:
        return None
    return {own: [] for own in splits} | ({split: found} if split in splits else {})


def _form(config: Any, kind: str, file: str) -> Form:
    """How a data set's files are written, by its card."""
    usual = form_of(file)
    if kind == "json":
        end = usual.end if usual.end not in CSV else JSON[0]
        encoding = usual.encoding if config.encoding == "utf-8" else config.encoding
        return replace(usual, end=end, field=config.field, encoding=encoding)
    shared = {own.name for own in fields(type(config).__mro__[1])}
    for own in fields(config):
        value = getattr(config, own.name)
        if own.name not in (*shared, *_CSV_OPTIONS) and value != own.default:
            raise ValueError(
                f"CSV with the option {own.name}={value!r} in its card, which is not known here"
            )
    if config.header not in ("infer", 0, None):
        raise ValueError(f"CSV with the option header={config.header!r} in its card")
    return Form(
        CSV[0],
        separator=config.sep,
        columns=None if config.names is None else tuple(config.names),
        encoding=config.encoding or usual.encoding,
    )


def _empty(path: str, split: str) -> ValueError:
    return ValueError(
        f"HubDataset: expected at least one row, got none in {path!r}, split {split!r}. "
        "Choose another split."
    )
