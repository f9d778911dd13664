"""Questions and conversations about images, from a Hugging Face data set."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from tokenprune.data.cells import id_of
from tokenprune.data.checked import CheckedRows, Row
from tokenprune.data.errors import first_line, no_value, place_of
from tokenprune.data.images import check_file, check_inside, is_address, open_image, unreadable
from tokenprune.data.rows import Columns, turns_of

#: Ends of data files that `HubDataset` reads, with the builder that `datasets` has for them.
BUILDERS = {
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".json": "json",
    ".jsonl": "json",
    ".csv": "csv",
}


class HubDataset(CheckedRows):
    """A data set that the `datasets` library loads; code that comes with one is never run.

    Args:
        path: Hub id, folder written by `save_to_disk`, folder of data files, or one data file.
        name: Configuration on the Hub, where a data set has several.
        split: Split to use; a folder or file without splits takes any name.
        image_column: Column of images, of lists of images, or of paths relative to the data's
            folder.
        question_column: Column of questions.
        answer_column: Column of answers, or of lists of accepted ones.
        conversations_column: Column of conversations, in place of questions and answers; see
            `tokenprune.data.rows`.
        id_column: Column of ids; None numbers the rows.
        kind_column: Column of question kinds, for the metrics; None has one kind, `all`.
        revision: Branch, tag or commit on the Hub.
        turns: See `CheckedRows`.
        skip_bad: See `CheckedRows`.

    Raises:
        ValueError: `datasets` is not installed, the data set cannot be loaded or is empty, a column
            is missing, or a row is not as expected.
    """

    def __init__(
        self,
        path: str,
        name: str | None = None,
        split: str = "test",
        image_column: str = "image",
        question_column: str = "question",
        answer_column: str = "answer",
        conversations_column: str | None = None,
        id_column: str | None = None,
        kind_column: str | None = None,
        revision: str | None = None,
        *,
        turns: str = "all",
        skip_bad: bool = False,
    ) -> None:
        try:
            import datasets
        except ImportError as error:
            raise ValueError(
                "HubDataset: expected the datasets library, got none. "
                'Install it with pip install "tokenprune[hub]".'
            ) from error
        super().__init__(path, turns, skip_bad)
        self.path, self.split = path, split
        self.image_column, self.id_column = image_column, id_column
        self.columns = Columns(question_column, answer_column, conversations_column, kind_column)
        data = _load(path, name, split, revision)
        asked = [question_column, answer_column]
        if conversations_column is not None:
            asked = [conversations_column]
        self._texts = [column for column in (*asked, id_column, kind_column) if column]
        columns = list(dict.fromkeys((image_column, *self._texts)))
        missing = [column for column in columns if column not in data.column_names]
        if missing:
            raise ValueError(
                f"HubDataset: expected the column {missing[0]!r} in {path!r}, got "
                f"{data.column_names}. Set image_column, question_column, answer_column or "
                "conversations_column."
            )
        if len(data) == 0:
            raise _empty(path, split)
        feature = data.features[image_column]
        one = getattr(feature, "feature", feature)  # of a list
        if isinstance(one, datasets.Image):
            # Undecoded, so that we open the image and can name the row of a broken one.
            whole = datasets.Image(decode=False)
            data = data.cast_column(image_column, whole if one is feature else type(feature)(whole))
        elif getattr(one, "dtype", None) not in ("string", "large_string"):
            raise ValueError(
                f"HubDataset: expected images or paths in the column {image_column!r} of {path!r}, "
                f"got {type(feature).__name__}. Set image_column."
            )
        local = Path(path).expanduser()
        self._folder = local if local.is_dir() else local.parent
        # Where images may be; what `datasets` fetched or unpacked is in its cache.
        self._roots = [self._folder] if local.exists() else []
        if isinstance(one, datasets.Image):
            from huggingface_hub.constants import HF_HUB_CACHE

            self._roots += [Path(datasets.config.HF_DATASETS_CACHE), Path(HF_HUB_CACHE)]
        self._data = data.select_columns(columns)
        self._check_rows()
        self._finish(len(data), "Choose another split.")

    def _row(self, place: int) -> Row:
        row = self._data[place]
        name, where = self._named(row, place + 1)
        images = row[self.image_column]
        own = images if isinstance(images, list) else [] if images is None else [images]
        opened: list[Callable[[], Image.Image]] = [
            partial(self._image, value, where) for value in own
        ]
        return name, turns_of(row, self.columns, where), opened

    def _named(self, row: Mapping[str, Any], number: int) -> tuple[str, str]:
        """A row's id, and how errors call it."""
        where = f"{self.path}, row {number}"
        if self.id_column is None:
            return str(number), where
        name = id_of(row[self.id_column], number, where)
        return name, place_of(self.path, number, name)

    def _image(self, value: Any, where: str) -> Image.Image:
        if isinstance(value, str):
            return open_image(self._folder / value, where)
        if value["bytes"] is not None:
            return open_image(io.BytesIO(value["bytes"]), where)
        if not is_address(value["path"]):
            return open_image(self._folder / value["path"], where)
        import datasets

        try:
            image: Image.Image = datasets.Image().decode_example(value)
        except Exception as error:  # whatever the file systems behind an address make of it
            raise unreadable(value["path"], where, error) from error
        return image.convert("RGB")

    def _check_rows(self) -> None:
        """Looks at every row, images in Arrow's memory: none is read."""
        place = 0
        ids: dict[str, int] = {}
        texts = list(dict.fromkeys(self._texts))
        for table in self._data.with_format("arrow").iter(batch_size=1000):
            rows = table.select(texts).to_pylist()
            references = _references(table[self.image_column].combine_chunks())
            for row, images in zip(rows, references, strict=True):
                try:
                    self._check_row(place, row, images, ids)
                except ValueError as error:
                    self._skip(error)
                place += 1

    def _check_row(
        self,
        place: int,
        row: Mapping[str, Any],
        images: Sequence[tuple[bool, str | None]],
        ids: dict[str, int],
    ) -> None:
        name, where = self._named(row, place + 1)
        if ids.setdefault(name, place + 1) != place + 1:
            raise ValueError(
                f"{where}: expected an id of its own, got that of row {ids[name]}. "
                "Set id_column=null to number the rows."
            )
        turns = turns_of(row, self.columns, where)
        if not images and self.columns.conversations is None:
            raise no_value(self.image_column, where)
        for embedded, path in images:
            if embedded:
                continue
            if not path:
                raise no_value(self.image_column, where)
            if not is_address(path):
                check_inside(self._folder / path, self._roots, where)
                check_file(self._folder / path, where)
        self._keep(place, turns, len(images), where)


def _references(column: Any) -> list[list[tuple[bool, str | None]]]:
    """Per row of an Arrow array, whether each image is embedded, and its path."""
    if "list" in str(column.type).partition("<")[0]:
        found = iter(_references(column.flatten()))
        lengths = column.value_lengths().to_pylist()
        lost = [(False, None)]
        return [
            [pair for _ in range(count or 0) for pair in next(found) or lost] for count in lengths
        ]
    if not str(column.type).startswith("struct"):
        return [[] if path is None else [(False, path)] for path in column.to_pylist()]
    embedded = column.field("bytes").is_valid().to_pylist()
    paths = column.field("path").to_pylist()
    return [
        [] if not (inside or path) else [(inside, path)]
        for inside, path in zip(embedded, paths, strict=True)
    ]


def _load(path: str, name: str | None, split: str, revision: str | None) -> Any:
    """A `datasets.Dataset`."""
    import datasets

    local = Path(path).expanduser()
    is_local = local.exists() or local.is_absolute() or path.startswith((".", "~"))
    if is_local and not local.exists():
        raise ValueError(
            f"HubDataset: expected a file or a folder, got {path!r}, which does not exist. "
            "Check the path; a Hub id has the form owner/name."
        )
    if local.is_file() and local.suffix not in BUILDERS:
        raise ValueError(
            f"HubDataset: expected a data file that ends in one of {sorted(BUILDERS)}, got "
            f"{path!r}. Convert it, or point to its folder."
        )
    try:
        if local.is_file():
            builder = BUILDERS[local.suffix]
            return datasets.load_dataset(builder, data_files={split: str(local)}, split=split)
        if (local / "dataset_dict.json").is_file() or (local / "state.json").is_file():
            loaded = datasets.load_from_disk(str(local))
        else:
            source = str(local) if is_local else path
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
        splits = [split if loaded.split is None else str(loaded.split)]
        loaded = {splits[0]: loaded}
    if split not in loaded:
        raise ValueError(
            f"HubDataset: expected one of the splits {sorted(loaded)} of {path!r}, got {split!r}. "
            "Set split."
        )
    return loaded[split]


def _empty(path: str, split: str) -> ValueError:
    return ValueError(
        f"HubDataset: expected at least one row, got none in {path!r}, split {split!r}. "
        "Choose another split."
    )
