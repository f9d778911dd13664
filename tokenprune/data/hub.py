"""Questions and conversations about images, from a Hugging Face data set."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from tokenprune.data.checked import CheckedRows, Content
from tokenprune.data.errors import no_value
from tokenprune.data.loading import caches, load_table
from tokenprune.data.references import cells_of, check_reference, open_cell, reference_of
from tokenprune.data.rows import Columns, images_of, turns_of
from tokenprune.data.sample import Turn


class HubDataset(CheckedRows):
    """A data set that the `datasets` library finds; code that comes with one is never run.

    JSON and CSV are read as they are written, not as `datasets` reads them, which takes columns for
    numbers, dates and missing values; see docs/data.md.

    Args:
        path: Hub id, folder written by `save_to_disk`, folder of data files, or one data file.
        name: Configuration on the Hub, where a data set has several.
        split: Split to use; a folder or file without splits takes any name.
        image_column: Column of images or of lists of images: paths relative to the data's folder,
            addresses, or files as bytes.
        question_column: Column of questions.
        answer_column: Column of answers, or of lists of accepted ones.
        conversations_column: Column of conversations, in place of questions and answers; see
            `tokenprune.data.rows`.
        id_column: Column of ids; None numbers the rows.
        kind_column: Column of question kinds, for the metrics; None has one kind, `all`.
        revision: Branch, tag or commit on the Hub.
        turns: See `CheckedRows`.
        skip_bad: See `CheckedRows`.

    Attributes:
        commit: On the Hub, of what was read, where that is known.

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
            import datasets  # noqa: F401
        except ImportError as error:
            raise ValueError(
                "HubDataset: expected the datasets library, got none. "
                'Install it with pip install "tokenprune-vlm[hub]".'
            ) from error
        super().__init__(path, turns, skip_bad)
        self.path, self.split = path, split
        self.image_column = image_column
        self.columns = Columns(question_column, answer_column, conversations_column, kind_column)
        asked = [question_column, answer_column]
        if conversations_column is not None:
            asked = [conversations_column]
        texts = [column for column in (*asked, id_column, kind_column) if column]
        self._table = load_table(path, name, split, revision, image_column, texts)
        self.commit = self._table.commit
        local = Path(path).expanduser()
        self._folder = local if local.is_dir() else local.parent
        # `datasets` follows a link to the folder itself.
        self._roots = [self._folder, self._folder.resolve()] if local.exists() else []
        if self._table.fetched:
            self._roots += caches()
        for number, row in self._table.scan():
            self._look(number, row, id_column)
        self._finish("Choose another split.")

    def _check(self, place: int, row: Mapping[str, Any], where: str) -> tuple[Sequence[Turn], int]:
        turns = self._turns(row, where)
        key = self.image_column
        images = [reference_of(cell, key, where) for cell in self._images(row, where)]
        if not images and self.columns.conversations is None:
            raise no_value(key, where)
        for image in images:
            check_reference(image, key, self._folder, self._roots, where)
        return turns, len(images)

    def _content(self, place: int, where: str) -> Content:
        row = self._table.row(place)
        return self._turns(row, where), [
            partial(open_cell, cell, self._folder, where) for cell in self._images(row, where)
        ]

    def _images(self, row: Mapping[str, Any], where: str) -> list[Any]:
        key = self.image_column
        return images_of(row, self.columns, cells_of(row.get(key)), key, where)

    def _turns(self, row: Mapping[str, Any], where: str) -> tuple[Turn, ...]:
        # The column of images may be called `video`: frames are images.
        texts = {key: cell for key, cell in row.items() if key != self.image_column}
        return turns_of(texts, self.columns, where)
