"""Data sets whose rows were all looked at when they were built.

Missing image files are found then, so that a run does not fail half-way; images are opened when
they are asked for. Rows count from 1. Evaluation copies pictures into its results, so a data set
may name no image outside its own folder.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from PIL import Image
from torch.utils.data import Dataset

from tokenprune.data.rows import check_places
from tokenprune.data.sample import Sample, Turn, num_places

#: What a sample is: see `CheckedRows`.
TURNS = ("all", "last", "each")
#: Id, turns, and what opens each image.
Row = tuple[str, tuple[Turn, ...], list[Callable[[], Image.Image]]]


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

    def _row(self, place: int) -> Row:
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
