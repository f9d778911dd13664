"""Questions and conversations about images, from a local folder or a Hugging Face data set.

All rows are checked when a data set is built, missing image files included, so that a run does not
fail half-way; images are opened when they are asked for. Rows count from 1. Evaluation copies
pictures into its results, so a data set may name no image outside its own folder.
"""

from __future__ import annotations

import io
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps
from torch.utils.data import Dataset

from tokenprune.data.rows import Columns, check_places, no_value, text_of, turns_of
from tokenprune.data.sample import Sample, Turn, num_places

#: What a sample is: see `CheckedRows`.
TURNS = ("all", "last", "each")
# Id, turns, and what opens each image.
_Row = tuple[str, tuple[Turn, ...], list[Callable[[], Image.Image]]]
#: Ends of data files that `HubDataset` reads, with the builder that `datasets` has for them.
BUILDERS = {
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".json": "json",
    ".jsonl": "json",
    ".csv": "csv",
}


class CheckedRows(Dataset[Sample]):
    """Rows that were looked at once, when the data set was built.

    Args:
        source: Names the data in errors.
        turns: What a sample is: `"all"`, a whole conversation, to train on; `"last"`, the same with
            its last answer asked for; or `"each"`, one sample per answer, with the turns before it.
            A sample that is asked for needs an image.
        skip_bad: Leaves out rows that are not as expected, and those whose images cannot be read:
            every image is read when the data set is built. How many, and which first, is said.

    Attributes:
        skipped: What was wrong with each row that was left out.

    Raises:
        ValueError: `turns` is not one of the three.
    """

    def __init__(self, source: str, turns: str, skip_bad: bool) -> None:
        if turns not in TURNS:
            raise ValueError(
                f"data.turns: expected one of {list(TURNS)}, got {turns!r}. Set data.turns=last."
            )
        self.source, self.turns, self.skip_bad = source, turns, skip_bad
        self.skipped: list[str] = []
        # Place among the rows, and how many of its turns, of each sample.
        self._samples: list[tuple[int, int]] = []

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: int) -> Sample:
        place, number = self._samples[index]
        name, turns, images = self._row(place)
        if num_places(turns):
            images = images[: num_places(turns[:number])]
        if self.turns == "each" and len(turns) > 1:
            name = f"{name}/{number}"
        return Sample(name, tuple(own() for own in images), turns[:number])

    def _row(self, place: int) -> _Row:
        raise NotImplementedError

    def _keep(self, place: int, turns: Sequence[Turn], images: int, where: str) -> None:
        """Makes the samples of a row that is as expected."""
        check_places(turns, images, where)
        numbers = range(1, len(turns) + 1) if self.turns == "each" else (len(turns),)
        if self.turns != "all":
            first = turns[: numbers[0]]
            if images == 0 or (num_places(turns) and not num_places(first)):
                raise ValueError(
                    f"{where}: expected an image in front of each answer that is evaluated, got "
                    "none. Remove the row; texts alone are for training."
                )
        self._samples += [(place, number) for number in numbers]

    def _skip(self, error: ValueError) -> None:
        """Notes a bad row, or raises its error."""
        if not self.skip_bad:
            raise error
        self.skipped.append(str(error))

    def _finish(self, rows: int, remedy: str) -> None:
        """Reads all images where bad ones are to be skipped, and tells what was."""
        if self.skip_bad:
            places = list(dict.fromkeys(place for place, _ in self._samples))
            with ThreadPoolExecutor() as pool:
                found = dict(zip(places, pool.map(self._complaint, places), strict=True))
            self.skipped += [own for own in found.values() if own is not None]
            self._samples = [own for own in self._samples if found[own[0]] is None]
        if self.skipped:
            print(
                f"{self.source}: skipped {len(self.skipped)} of {rows} rows, the first: "
                f"{self.skipped[0]}",
                file=sys.stderr,
            )
        if not self._samples:
            told = f" that is as expected: {self.skipped[0]}" if self.skipped else f". {remedy}"
            raise ValueError(
                f"{type(self).__name__}: expected at least one row, got none in "
                f"{self.source!r}{told}"
            )

    def _complaint(self, place: int) -> str | None:
        """What is wrong with a row's images."""
        try:
            for image in self._row(place)[2]:
                image()
        except ValueError as error:
            return str(error)
        return None


class FolderDataset(CheckedRows):
    """A JSON list, or JSON lines, of questions or conversations about images in a folder.

    A row has `image` or `images` (a path, or several), what `tokenprune.data.rows` describes and,
    if wanted, an `id`. Rows without an image are for training.

    Args:
        path: The .json or .jsonl file, or a folder that holds exactly one.
        allow_outside: Opens images outside the folder, too: absolute paths, and `..`.
        image_folder: What image paths are relative to; None for the file's own folder.
        turns: See `CheckedRows`.
        skip_bad: See `CheckedRows`.

    Raises:
        ValueError: The file is missing or empty, or a row is not as expected.
    """

    def __init__(
        self,
        path: str | Path,
        allow_outside: bool = False,
        *,
        image_folder: str | Path | None = None,
        turns: str = "all",
        skip_bad: bool = False,
    ) -> None:
        self.path = _data_file(Path(path).expanduser())
        super().__init__(str(self.path), turns, skip_bad)
        self.folder = self.path.parent
        if image_folder is not None:
            self.folder = Path(image_folder).expanduser()
            if not self.folder.is_dir():
                raise ValueError(
                    f"data.image_folder: expected a folder, got {str(image_folder)!r}, which is "
                    "none. Check the path."
                )
        self.allow_outside = allow_outside
        self._rows: list[tuple[int, str, tuple[Turn, ...], tuple[Path, ...]]] = []
        self._ids: dict[str, int] = {}
        rows = self._read()
        for number, row in rows:
            try:
                self._add(number, row)
            except ValueError as error:
                self._skip(error)
        self._finish(len(rows), "Write JSON objects with image, question and answer.")

    def _read(self) -> list[tuple[int, Any]]:
        """Numbers and contents of all rows: mappings, or text that is no JSON."""
        try:
            # Not splitlines: JSON text may hold U+2028 and others that split there.
            text = self.path.read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(
                f"FolderDataset: expected a file with UTF-8 text, got {str(self.path)!r}: "
                f"{_first_line(error)}. Save it as UTF-8."
            ) from error
        if self.path.suffix == ".json":
            try:
                whole = json.loads(text)
            except json.JSONDecodeError as error:
                # Many files of JSON lines are called .json.
                if error.msg != "Extra data":
                    raise ValueError(
                        f"{self.path.name}, line {error.lineno}: expected a JSON list, got "
                        f"{error.msg} at character {error.colno}. Correct the file."
                    ) from error
            else:
                if not isinstance(whole, list):
                    raise ValueError(
                        f"{self.path.name}: expected a JSON list of rows, got "
                        f"{type(whole).__name__}. Put the rows into one list."
                    )
                return list(enumerate(whole, 1))
        return [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]

    def _add(self, number: int, row: Any) -> None:
        where = f"{self.path.name}, row {number}"
        shown = repr(row)[:40] if not isinstance(row, str) else repr(row[:40])
        if isinstance(row, str):
            try:
                row = json.loads(row)
            except json.JSONDecodeError as error:
                raise ValueError(
                    f"{where}: expected a JSON object, got {shown}: {error.msg}. "
                    "Write one object per line."
                ) from error
        if not isinstance(row, dict):
            raise ValueError(
                f"{where}: expected a JSON object, got {shown}. "
                "Write one object with image, question and answer per line."
            )
        name = _name(row.get("id"), number, where)
        where = _where(self.path.name, number, name)
        if self._ids.setdefault(name, number) != number:
            raise ValueError(
                f"{where}: expected an id of its own, got that of row {self._ids[name]}. "
                "Leave out id to number the rows."
            )
        talks = next((key for key in ("conversations", "messages") if key in row), None)
        answer = "answers" if "answers" in row and "answer" not in row else "answer"
        kind = "kind" if "kind" in row else None
        turns = turns_of(row, Columns("question", answer, talks, kind), where)
        images = []
        for own in _images(row, where, needed=talks is None):
            image = self.folder / own
            if not self.allow_outside:
                remedy = ", or set data.allow_outside=true"
                _check_inside(image, [self.folder], where, remedy)
            _check_file(image, where)
            images.append(image)
        self._keep(len(self._rows), turns, len(images), where)
        self._rows.append((number, name, turns, tuple(images)))

    def _row(self, place: int) -> _Row:
        number, name, turns, images = self._rows[place]
        where = _where(self.path.name, number, name)
        return name, turns, [partial(_open, image, where) for image in images]


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
                'Install it with pip install "tokenprune-vlm[hub]".'
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

    def _row(self, place: int) -> _Row:
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
        name = _name(row[self.id_column], number, where)
        return name, _where(self.path, number, name)

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
            if not _is_address(path):
                _check_inside(self._folder / path, self._roots, where)
                _check_file(self._folder / path, where)
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


def _data_file(path: Path) -> Path:
    if path.is_file():
        return path
    if not path.is_dir():
        raise ValueError(
            f"FolderDataset: expected a .jsonl file or its folder, got {str(path)!r}, which does "
            "not exist. Check the path."
        )
    files = sorted(path.glob("*.jsonl")) or sorted(path.glob("*.json"))
    if len(files) != 1:
        raise ValueError(
            f"FolderDataset: expected exactly one .jsonl or .json file in {str(path)!r}, got "
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


def _images(row: Mapping[str, Any], where: str, needed: bool) -> list[str]:
    """Paths of a row's images."""
    key = "images" if "images" in row and "image" not in row else "image"
    value = row.get(key)
    if isinstance(value, list):
        if not value and needed:
            raise no_value(key, where, "[]")
        return [text_of({key: own}, key, where) for own in value]
    if not needed and value in (None, ""):
        return []
    return [text_of(row, key, where)]


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
