"""The JSON and CSV files of a Hugging Face data set, as its builder in `datasets` lists them.

A folder of pictures has such a file, too: `metadata.csv` or `metadata.jsonl`, whose `file_name`
says where a row's picture lies beside it.
"""

from __future__ import annotations

import posixpath
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from tokenprune.data.files import CSV, JSON, Form, Line, form_of, read_rows

# What may differ from the usual in a data set's card, of the options that CSV has there.
_CSV_OPTIONS = ("sep", "delimiter", "names", "column_names", "header", "encoding", "features")


@dataclass(frozen=True)
class TextFile:
    """A text file with rows of a split, on this machine.

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
        """Its rows; see `read_rows`."""
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


def text_files(builder: Any, split: str) -> dict[str, list[TextFile]] | None:
    """The text files of each split, of which only those of one are fetched; None if others are."""
    import datasets

    kind, config = builder.info.builder_name, builder.config
    splits = {
        str(own): [str(file) for file in files] for own, files in (config.data_files or {}).items()
    }
    files = splits.get(split, [])
    manager = datasets.DownloadManager(builder.dataset_name, base_path=builder.base_path)
    found: list[TextFile] = []
    if kind in ("csv", "json"):
        features = builder.info.features or {}
        labels = {key: own.names for key, own in features.items() if hasattr(own, "names")}
        for file, fetched in zip(files, manager.download_and_extract(files), strict=True):
            form = _form(config, kind, file)
            found += [TextFile(Path(own), form, labels) for own in manager.iter_files(fetched)]
    elif kind == "imagefolder" and not config.drop_metadata:
        pairs = []
        for file, fetched in zip(files, manager.download(files), strict=True):
            if file.endswith(".zip"):
                inner = manager.iter_files(manager.extract(fetched))
                pairs += [(f"{file}::{own}", own) for own in inner]
            else:
                pairs.append((file, fetched))
        named = getattr(config, "metadata_filenames", None)  # of newer versions
        names = named or ("metadata.csv", "metadata.jsonl")
        pictures = {file: str(fetched) for file, fetched in pairs}
        found = [
            TextFile(Path(own), form_of(file), base=posixpath.dirname(file), pictures=pictures)
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
    known = ("infer", 0) if config.names is None else ("infer", None)
    if config.header not in known:
        raise ValueError(f"CSV with the option header={config.header!r} in its card")
    return Form(
        CSV[0],
        separator=config.sep,
        columns=None if config.names is None else tuple(config.names),
        encoding=config.encoding or usual.encoding,
    )
