"""Data sets whose rows were all looked at when they were built.

Missing image files are found then, so that a run does not fail half-way; images are opened when
they are asked for. Rows count from 1.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from PIL import Image
from torch.utils.data import Dataset

from tokenprune.data.cells import id_of
from tokenprune.data.errors import place_of
from tokenprune.data.rows import check_places
from tokenprune.data.sample import Sample, Turn, num_places

#: What a sample is: see `CheckedRows`.
TURNS = ("all", "last", "each")
#: Turns, and what opens each image.
Content = tuple[tuple[Turn, ...], Sequence[Callable[[], Image.Image]]]
# How many of the rows that were left out are named.
_NUM_TOLD = 5


class CheckedRows(Dataset[Sample]):
    """Rows that were looked at once, when the data set was built.

    A sample is named by its row's id, or by the row's number. Where several rows have one id, all
    are read, and from the second on they are called `id#2`, `id#3`, in the order of the file.

    Args:
        source: Where the data is.
        turns: What a sample is: `"all"`, a whole conversation, to train on; `"last"`, the same with
            its last answer asked for; or `"each"`, one sample per answer, with the turns before it.
            A sample that is asked for needs an image.
        skip_bad: Leaves out rows that are not as expected, and those whose images cannot be read:
            every image is read when the data set is built. How many, and the first few, is said.
        called: Names the data in errors about a row; None is `source`.

    Attributes:
        skipped: What was wrong with each row that was left out.
        has_systems: Whether some row has a system message.

    Raises:
        ValueError: `turns` is not one of the three.
    """

    def __init__(self, source: str, turns: str, skip_bad: bool, called: str | None = None) -> None:
        if turns not in TURNS:
            raise ValueError(
                f"data.turns: expected one of {list(TURNS)}, got {turns!r}. Set data.turns=last."
            )
        self.source, self.turns, self.skip_bad = source, turns, skip_bad
        self.skipped: list[str] = []
        self.has_systems = False
        self._called = source if called is None else called
        self._numbers: list[int] = []  # of all rows, good or bad, in the order of the file
        self._names: list[str] = []
        self._bad: dict[int, str] = {}
        # Place among the rows, and how many of its turns, of each sample; and the sample's name.
        self._samples: list[tuple[int, int]] = []
        self._ids: list[str] = []

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: int) -> Sample:
        place, number = self._samples[index]
        turns, images = self._content(place, self._where(place))
        if num_places(turns):
            images = images[: num_places(turns[:number])]
        return Sample(self._ids[index], tuple(own() for own in images), turns[:number])

    def _check(self, place: int, row: Mapping[str, Any], where: str) -> tuple[Sequence[Turn], int]:
        """Looks at a row: its turns, and how many images it has."""
        raise NotImplementedError

    def _content(self, place: int, where: str) -> Content:
        """What a row holds that was found good."""
        raise NotImplementedError

    def _look(
        self, number: int, row: Mapping[str, Any] | ValueError, id_column: str | None
    ) -> None:
        """Looks at the next row."""
        place = len(self._numbers)
        self._numbers.append(number)
        self._names.append(str(number))
        try:
            if isinstance(row, ValueError):
                raise row
            if id_column is not None:
                self._names[place] = id_of(row.get(id_column), number, self._where(place))
            where = self._where(place)
            self._keep(place, *self._check(place, row, where), where)
        except ValueError as error:
            if not self.skip_bad:
                raise
            self._bad[place] = str(error)

    def _where(self, place: int) -> str:
        return place_of(self._called, self._numbers[place], self._names[place])

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
        self.has_systems = self.has_systems or any(turn.system for turn in turns)

    def _finish(self, remedy: str) -> None:
        """Names the samples, reads all images where bad ones are to be skipped, tells what was."""
        self._names = _distinct(self._names)
        if self.skip_bad:
            places = list(dict.fromkeys(place for place, _ in self._samples))
            with ThreadPoolExecutor() as pool:
                found = zip(places, pool.map(self._complaint, places), strict=True)
                self._bad |= {place: told for place, told in found if told is not None}
            self._samples = [own for own in self._samples if own[0] not in self._bad]
        counts = Counter(place for place, _ in self._samples)
        self._ids = _distinct(
            [
                self._names[place] if counts[place] == 1 else f"{self._names[place]}/{number}"
                for place, number in self._samples
            ]
        )
        self.skipped = [told for _, told in sorted(self._bad.items())]
        if self.skipped:
            print(self._summary(), file=sys.stderr)
        if not self._samples:
            told = f" that is as expected: {self.skipped[0]}" if self.skipped else f". {remedy}"
            raise ValueError(
                f"{type(self).__name__}: expected at least one row, got none in "
                f"{self.source!r}{told}"
            )

    def _summary(self) -> str:
        """How many rows were left out, and why the first few."""
        share = f"skipped {len(self.skipped)} of {len(self._numbers)} rows"
        lines = [f"{self.source}: {share}, the first: {self.skipped[0]}"]
        lines += [f"  then: {told}" for told in self.skipped[1:_NUM_TOLD]]
        if len(self.skipped) > _NUM_TOLD:
            lines.append(f"  and {len(self.skipped) - _NUM_TOLD} more")
        return "\n".join(lines)

    def _complaint(self, place: int) -> str | None:
        """What is wrong with a row's images."""
        try:
            for image in self._content(place, self._where(place))[1]:
                image()
        except ValueError as error:
            return str(error)
        return None


def _distinct(names: Sequence[str]) -> list[str]:
    """Names that differ: the second `x` is `x#2`, the next `x#3`, if no other is called so."""
    given, seen = set(names), Counter[str]()
    if len(given) == len(names):
        return list(names)
    own = []
    for name in names:
        seen[name] += 1
        if seen[name] > 1:
            while f"{name}#{seen[name]}" in given:
                seen[name] += 1
            name = f"{name}#{seen[name]}"
        own.append(name)
    return own
