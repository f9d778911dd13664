"""Questions about images from a local folder or from a Hugging Face data set.

All rows are checked when a data set is built, missing image files included, so that a run does not
fail half-way; images are opened when they are asked for. Rows count from 1. Evaluation copies
pictures into its results, so a data set may name no image outside its own folder.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps
from torch.utils.data import Dataset

from tokenprune.data.sample import Sample, Turn

#: Ends of data files that `HubDataset` reads, with the builder that `datasets` has for them.
BUILDERS = {
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".json": "json",
    ".jsonl": "json",
    ".csv": "csv",
}


class FolderDataset(Dataset[Sample]):
    """JSON lines with `image`, `question`, `answer` and, if wanted, `id` and `kind`.

    Args:
        path: The .jsonl file, or a folder that holds exactly one. Image paths are relative to it.
        allow_outside: Opens images outside the file's folder, too: absolute paths, and `..`.

    Raises:
        ValueError: The file is missing or empty, or a row is not as expected.
    """

    def __init__(self, path: str | Path, allow_outside: bool = False) -> None:
        self.path = _lines_file(Path(path).expanduser())
        self._rows: list[tuple[str, Path, Turn]] = []
        ids: dict[str, int] = {}
        try:
            # Not splitlines: JSON text may hold U+2028 and others that split there.
            lines = self.path.read_text(encoding="utf-8").split("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(
                f"FolderDataset: expected a file with UTF-8 text, got {str(self.path)!r}: "
                f"{_first_line(error)}. Save it as UTF-8."
            ) from error
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            where = f"{self.path.name}, row {number}"
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(
                    f"{where}: expected a JSON object, got {line[:40]!r}: {error.msg}. "
                    "Write one object per line."
                ) from error
            if not isinstance(row, dict):
                raise ValueError(
                    f"{where}: expected a JSON object, got {line[:40]!r}. "
                    "Write one object with image, question and answer per line."
                )
            name = _name(row.get("id"), number, where)
            where = _where(self.path.name, number, name)
            if name in ids:
                raise ValueError(
                    f"{where}: expected an id of its own, got that of row {ids[name]}. "
                    "Leave out id to number the rows."
                )
            ids[name] = number
            turn = _turn(row, "question", "answer", "kind" if "kind" in row else None, where)
            image = self.path.parent / _text(row, "image", where)
            if not allow_outside:
                _check_inside(image, [self.path.parent], where, ", or set data.allow_outside=true")
            _check_file(image, where)
            self._rows.append((name, image, turn))
        if not self._rows:
            raise ValueError(
                f"FolderDataset: expected at least one row, got none in {str(self.path)!r}. "
                "Write one JSON object with image, question and answer per line."
            )
        self._numbers = list(ids.values())

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Sample:
        name, path, turn = self._rows[index]
        where = _where(self.path.name, self._numbers[index], name)
        return Sample(id=name, image=_open(path, where), turns=(turn,))


class HubDataset(Dataset[Sample]):
    """A data set that the `datasets` library loads; code that comes with one is never run.

    Args:
        path: Hub id, folder written by `save_to_disk`, folder of data files, or one data file.
        name: Configuration on the Hub, where a data set has several.
        split: Split to use; a folder or file without splits takes any name.
        image_column: Column of images, or of paths relative to the data's folder.
        question_column: Column of questions.
        answer_column: Column of answers.
        id_column: Column of ids; None numbers the rows.
        kind_column: Column of question kinds, for the metrics; None has one kind, `all`.
        revision: Branch, tag or commit on the Hub.

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
        id_column: str | None = None,
        kind_column: str | None = None,
        revision: str | None = None,
    ) -> None:
        try:
            import datasets
        except ImportError as error:
            raise ValueError(
                "HubDataset: expected the datasets library, got none. "
                'Install it with pip install "tokenprune[hub]".'
            ) from error
        self.path, self.split = path, split
        self.image_column = image_column
        self.question_column, self.answer_column = question_column, answer_column
        self.id_column, self.kind_column = id_column, kind_column
        data = _load(path, name, split, revision)
        columns = (image_column, question_column, answer_column, id_column, kind_column)
        missing = [column for column in columns if column and column not in data.column_names]
        if missing:
            raise ValueError(
                f"HubDataset: expected the column {missing[0]!r} in {path!r}, got "
                f"{data.column_names}. Set image_column, question_column or answer_column."
            )
        if len(data) == 0:
            raise _empty(path, split)
        feature = data.features[image_column]
        if isinstance(feature, datasets.Image):
            # Undecoded, so that we open the image and can name the row of a broken one.
            data = data.cast_column(image_column, datasets.Image(decode=False))
        elif getattr(feature, "dtype", None) not in ("string", "large_string"):
            raise ValueError(
                f"HubDataset: expected images or paths in the column {image_column!r} of {path!r}, "
                f"got {type(feature).__name__}. Set image_column."
            )
        local = Path(path).expanduser()
        self._folder = local if local.is_dir() else local.parent
        # Where images may be; what `datasets` fetched or unpacked is in its cache.
        self._roots = [self._folder] if local.exists() else []
        if isinstance(feature, datasets.Image):
            from huggingface_hub.constants import HF_HUB_CACHE

            self._roots += [Path(datasets.config.HF_DATASETS_CACHE), Path(HF_HUB_CACHE)]
        self._data = data.select_columns(list(dict.fromkeys(c for c in columns if c)))
        self._check_rows()

    def __len__(self) -> int:
        return len(self._data)

    def __getitem__(self, index: int) -> Sample:
        row = self._data[index]
        where = f"{self.path}, row {index + 1}"
        name = str(index + 1)
        if self.id_column is not None:
            name = _name(row[self.id_column], index + 1, where)
            where = _where(self.path, index + 1, name)
        turn = _turn(row, self.question_column, self.answer_column, self.kind_column, where)
        return Sample(id=name, image=self._image(row[self.image_column], where), turns=(turn,))

    def _image(self, value: Any, where: str) -> Image.Image:
        if isinstance(value, str):
            return _open(self._folder / value, where)
        if value["bytes"] is not None:
            return _open(io.BytesIO(value["bytes"]), where)
        if not _is_address(value["path"]):
            return _open(self._folder / value["path"], where)
        import datasets

        try:
            image: Image.Image = datasets.Image().decode_example(value)
        except Exception as error:  # whatever the file systems behind an address make of it
            raise _unreadable(value["path"], where, error) from error
        return image.convert("RGB")

    def _check_rows(self) -> None:
        """Looks at every row, images in Arrow's memory: none is read."""
        number = 0
        ids: dict[str, int] = {}
        columns = (self.question_column, self.answer_column, self.id_column, self.kind_column)
        texts = list(dict.fromkeys(column for column in columns if column))
        for table in self._data.with_format("arrow").iter(batch_size=1000):
            column = table[self.image_column].combine_chunks()
            embedded = None
            if str(column.type).startswith("struct"):
                embedded = column.field("bytes").is_valid().to_pylist()
                column = column.field("path")
            rows = table.select(texts).to_pylist()
            for index, (row, path) in enumerate(zip(rows, column.to_pylist(), strict=True)):
                number += 1
                where = f"{self.path}, row {number}"
                if self.id_column is not None:
                    name = _name(row[self.id_column], number, where)
                    where = _where(self.path, number, name)
                    if ids.setdefault(name, number) != number:
                        raise ValueError(
                            f"{where}: expected an id of its own, got that of row {ids[name]}. "
                            "Set id_column=null to number the rows."
                        )
                _turn(row, self.question_column, self.answer_column, self.kind_column, where)
                if embedded is not None and embedded[index]:
                    continue
                if not path:
                    raise _no_value(self.image_column, where)
                if not _is_address(path):
                    _check_inside(self._folder / path, self._roots, where)
                    _check_file(self._folder / path, where)


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
            f"{_first_line(error)}. Check the name, the configuration and the connection."
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


def _lines_file(path: Path) -> Path:
    if path.is_file():
        return path
    if not path.is_dir():
        raise ValueError(
            f"FolderDataset: expected a .jsonl file or its folder, got {str(path)!r}, which does "
            "not exist. Check the path."
        )
    files = sorted(path.glob("*.jsonl"))
    if len(files) != 1:
        raise ValueError(
            f"FolderDataset: expected exactly one .jsonl file in {str(path)!r}, got "
            f"{[file.name for file in files]}. Give the path of the file."
        )
    return files[0]


def _where(source: str, number: int, name: str | None) -> str:
    return f"{source}, row {number}" + ("" if name in (None, str(number)) else f" (id {name!r})")


def _name(value: Any, number: int, where: str) -> str:
    if value is None:
        return str(number)
    if isinstance(value, str | int) and not isinstance(value, bool) and str(value).strip():
        return str(value)
    raise ValueError(
        f"{where}: expected an id that is text or an integer, got {value!r}. Leave it out."
    )


def _no_value(key: str, where: str, got: str = "none") -> ValueError:
    return ValueError(f"{where}: expected {key!r}, got {got}. Fill it in or remove the row.")


def _text(row: Mapping[str, Any], key: str, where: str) -> str:
    value = row.get(key)
    if value is None or (isinstance(value, str) and not value.strip()):
        got = f"only the keys {sorted(row)}" if key not in row else repr(value)
        raise _no_value(key, where, got)
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        shown = repr(value)
        raise ValueError(
            f"{where}: expected text as {key!r}, got {shown[:60]}. Write one string per row."
        )
    return str(value)


def _turn(row: Mapping[str, Any], question: str, answer: str, kind: str | None, where: str) -> Turn:
    asked, told = _text(row, question, where), _text(row, answer, where)
    return Turn(asked, told) if kind is None else Turn(asked, told, _text(row, kind, where))


def _is_address(path: str) -> bool:
    """Whether an image is fetched; `file://` and chains such as `zip://a.png::/b.zip` are not."""
    return path.startswith(("https://", "http://", "hf://")) and "::" not in path


def _check_inside(path: Path, roots: Sequence[Path], where: str, remedy: str = "") -> None:
    """Refuses absolute paths and `..` that lead out; links inside are the owner's own doing."""
    own = Path(os.path.abspath(path))
    if not any(own.is_relative_to(os.path.abspath(root)) for root in roots):
        raise ValueError(
            f"{where}: expected an image in the data's own folder, got {str(path)!r}. "
            f"Move it there{remedy}."
        )


def _check_file(path: Path, where: str) -> None:
    if not path.is_file():
        raise ValueError(
            f"{where}: expected an image file, got {str(path)!r}, which does not exist. "
            "Check the path or remove the row."
        )


def _open(source: Path | io.BytesIO, where: str) -> Image.Image:
    """An upright RGB image, read in full."""
    try:
        with Image.open(source) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    except Exception as error:  # Pillow's readers raise OSError, SyntaxError, ValueError and others
        shown = source.name if isinstance(source, Path) else "its bytes"
        raise _unreadable(shown, where, error) from error


def _unreadable(shown: str, where: str, error: Exception) -> ValueError:
    reason = _first_line(error).split("<_io", 1)[0].strip()
    return ValueError(
        f"{where}: expected an image that Pillow reads, got {shown}: {reason}. "
        "Replace the image or remove the row."
    )


def _first_line(error: Exception) -> str:
    lines: Sequence[str] = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__).rstrip(".")
