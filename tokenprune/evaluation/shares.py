"""An evaluation's answers, noted in the run's folder as they come, by one process or by several.

What is noted is not asked again, by however many processes an evaluation goes on after one was
lost; a run's files are written once all is there, by one of them. No process waits for another but
the one that writes, and that one not for ever.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from torch.utils.data import DataLoader, IterableDataset, SequentialSampler, Subset

from tokenprune.evaluation.loading import RememberedBatches
from tokenprune.runs import files, results

#: Folder of the notes, in that of the run; it goes once the run is complete.
NOTES = "parts"


@dataclass(frozen=True)
class Notes:
    """The answers of an evaluation so far.

    Attributes:
        folder: The run's.
        mark: Names the evaluation: notes of another one are not looked at.
    """

    folder: Path
    mark: str

    @classmethod
    def of(cls, folder: Path, config: Mapping[str, Any], marks: Mapping[str, str]) -> Notes:
        """The notes of a run.

        Args:
            folder: The run's.
            config: Its resolved config.
            marks: What its files are, see `results.fingerprint`.
        """
        own = {key: value for key, value in config.items() if key not in results.ASIDE}
        trainer = config.get("trainer") or {}
        own["trainer"] = {key: trainer.get(key) for key in results.DECISIVE_TRAINER}
        text = json.dumps([own, dict(marks)], sort_keys=True, default=str)
        return cls(folder, hashlib.blake2b(text.encode(), digest_size=6).hexdigest())

    def path(self, rank: int, size: int) -> Path:
        """The file of one of `size` processes."""
        return self.folder / NOTES / f"{self.mark}-{rank}-of-{size}.jsonl"

    def add(self, rank: int, size: int, note: Mapping[str, Any]) -> None:
        """Adds a line to a process's file, whole or not at all."""
        path = self.path(rank, size)
        with files.growing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(note, ensure_ascii=False) + "\n")

    def mend(self, rank: int, size: int) -> None:
        """Cuts off a line that a killed process has not written to its end."""
        path = self.path(rank, size)
        if path.is_file():
            content = path.read_bytes()
            whole = content[: content.rfind(b"\n") + 1]
            if whole != content:
                path.write_bytes(whole)

    def answers(self) -> tuple[dict[Any, dict[str, Any]], list[float]]:
        """Records by their sample's number, each once, and the seconds of their batches."""
        records: dict[Any, dict[str, Any]] = {}
        seconds: list[float] = []
        for note in self.all():
            numbers = note.get("numbers", [])
            new = any(number not in records for number in numbers)
            if new and note["seconds"] is not None:
                seconds.append(note["seconds"])
            for number, record in zip(numbers, note.get("records", []), strict=True):
                records.setdefault(number, record)
        return records, seconds

    def ended(self, size: int) -> list[int]:
        """Which of `size` processes have answered all that is theirs."""
        ends = [note["ends"] for note in self.all() if "ends" in note]
        return sorted({rank for rank, own in ends if own == size})

    def exist(self) -> bool:
        """Whether somebody has noted anything."""
        return any((self.folder / NOTES).glob(f"{self.mark}-*.jsonl"))

    def forget(self) -> None:
        """Removes the notes of this evaluation."""
        for path in (self.folder / NOTES).glob(f"{self.mark}-*.jsonl"):
            path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # others are there
            (self.folder / NOTES).rmdir()

    def remove(self) -> None:
        """Removes all notes, of other evaluations as well."""
        with contextlib.suppress(OSError):
            files.remove(self.folder / NOTES)

    def length(self) -> int:
        """Bytes of all notes: more where somebody still answers."""
        paths = (self.folder / NOTES).glob(f"{self.mark}-*.jsonl")
        return sum(path.stat().st_size for path in paths)

    def all(self) -> Iterator[dict[str, Any]]:
        """Them all, as they stand."""
        for path in sorted((self.folder / NOTES).glob(f"{self.mark}-*.jsonl")):
            for line in path.read_bytes().split(b"\n"):  # texts may hold other ends of lines
                with contextlib.suppress(ValueError):  # one that is being written
                    note = json.loads(line)
                    yield note

    def wait(self, size: int, limit: float, check: Callable[[], None] = lambda: None) -> None:
        """Waits until all of `size` processes have answered what is theirs.

        Args:
            size: Processes.
            limit: Seconds without an answer of any.
            check: Called meanwhile; raises where one of them is known to be lost.

        Raises:
            ValueError: None of those that are left has noted anything for `limit` seconds.
        """
        length, since = self.length(), time.monotonic()
        while len(ended := self.ended(size)) < size:
            time.sleep(min(1.0, limit / 10))
            check()
            if (now := self.length()) != length:
                length, since = now, time.monotonic()
            elif time.monotonic() - since > limit:
                late = ", ".join(str(rank) for rank in range(size) if rank not in ended)
                raise ValueError(
                    f"evaluate: expected an answer of process {late} of {size} within "
                    f"shard_timeout={limit:g} seconds, got none; {len(self.answers()[0])} answers "
                    "are there. Look at what that process has said."
                )


@dataclass(frozen=True)
class Unwritten(Notes):
    """Notes that end with their process: of samples that come in an order of their own.

    Attributes:
        lines: What was noted.
    """

    lines: list[dict[str, Any]] = field(default_factory=list)

    def add(self, rank: int, size: int, note: Mapping[str, Any]) -> None:
        self.lines.append(dict(note))

    def all(self) -> Iterator[dict[str, Any]]:
        yield from self.lines


def order_of(loader: Any, data: Any) -> list[int] | None:
    """The order in which a data module's samples are predicted, or None where only it knows.

    Args:
        loader: Its predict loader.
        data: The data module; it may have an order of its own, `predict_order`.
    """
    numbered = (
        isinstance(loader, DataLoader)
        and not isinstance(loader.dataset, IterableDataset)
        and loader.batch_size is not None
        and type(loader.sampler) is SequentialSampler
    )
    if not numbered:
        return None
    own = getattr(data, "predict_order", lambda: None)()
    return list(range(len(loader.dataset)) if own is None else own)


class Share(pl.LightningDataModule):
    """What is left of one process's share of the samples, in the order of the data.

    Of n processes number r has samples r, r + n, r + 2n, ... Its batches are the same ones again
    where as many processes go on, so that it answers as if nothing had happened. Samples that come
    in an order which only their loader knows are one process's, and numbered as they come.

    Args:
        data: Its predict loader has the samples.
        notes: What is answered already.
        shard: Number and how many there are, where each shard is a run of its own.
        batches: All that the predict loader gives, where one process asks for all.
    """

    def __init__(
        self,
        data: pl.LightningDataModule,
        notes: Notes,
        shard: tuple[int, int] | None = None,
        batches: RememberedBatches | None = None,
    ) -> None:
        super().__init__()
        self.data, self.notes, self.shard, self.batches = data, notes, shard, batches
        #: The samples that are left, by their numbers, and how many make a batch.
        self.numbers: list[int] = []
        self.batch_size = 1
        self.loader: Any = None
        self.limit: float | None = None
        #: How many are asked about; None where the loader alone knows.
        self.num_asked: int | None = None
        #: Images that are to be shown, by their samples' numbers.
        self.images: dict[int, Any] = {}
        self._next = 0

    def place(self) -> tuple[int, int]:
        """This process's number and how many there are."""
        trainer: Any = self.trainer
        return self.shard or (trainer.global_rank, trainer.world_size)

    def prepare_data(self) -> None:
        if self.batches is None:  # else it is there
            self.data.prepare_data()

    def setup(self, stage: str) -> None:
        if self.batches is None:
            self.data.setup(stage)

    def predict_dataloader(self) -> Any:
        whole, order = self._whole()
        self.loader = whole
        rank, size = self.place()
        if order is None:
            if size > 1:
                raise ValueError(
                    f"data: expected a predict loader whose samples are numbered, for {size} "
                    f"processes or shards to share, got a {type(whole).__name__} with an order of "
                    "its own. Leave its sampler out, or use one process."
                )
            print(
                f"answers are not noted as they come: the loader of {type(self.data).__name__} has "
                "an order of its own",
                flush=True,
            )
            self._count()
            return whole if self.batches is None else self.batches
        self.batch_size = whole.batch_size
        asked = order[: self._most(len(whole))]
        self.num_asked = length = len(asked)
        if size > length:
            raise ValueError(
                f"shard: expected at most one process or shard per sample, got {size} for "
                f"{length}. Lower trainer.devices, or the number of shards."
            )
        self.notes.mend(rank, size)
        known, _ = self.notes.answers()
        mine = asked[rank::size]
        left = [number for number in mine if number not in known]
        if known and (rank == 0 or self.shard is not None):
            print(f"{len(mine) - len(left)} of {len(mine)} answers are there already", flush=True)
        # A loop over nothing would not come to its end.
        self.numbers = left or mine[-self.batch_size :]
        if self.batches is not None and left == list(range(len(whole.dataset))):
            return self.batches
        return DataLoader(
            Subset(whole.dataset, self.numbers),
            batch_size=whole.batch_size,
            num_workers=whole.num_workers,
            collate_fn=whole.collate_fn,
            generator=whole.generator,
            pin_memory=whole.pin_memory,
            worker_init_fn=whole.worker_init_fn,
            multiprocessing_context=whole.multiprocessing_context,
        )

    def _whole(self) -> tuple[Any, list[int] | None]:
        """The loader of all samples, and their order."""
        own: Any = self.data
        own.trainer = self.trainer
        try:
            loader = own.predict_dataloader() if self.batches is None else self.batches.loader
            return loader, order_of(loader, own)
        finally:
            own.trainer = None  # the data may outlive it

    def _most(self, num_batches: int) -> int:
        """So many samples are asked about: by `trainer.limit_predict_batches`, of all of them.

        Lightning would limit what each process has, and once more what is left of it.
        """
        if self.trainer is not None and self.limit is None:
            self.limit = self.trainer.limit_predict_batches
            self.trainer.limit_predict_batches = 1.0
        limit = 1.0 if self.limit is None else self.limit
        number = limit if isinstance(limit, int) else int(num_batches * limit)
        if number < 1:
            raise ValueError(
                f"trainer.limit_predict_batches: expected one batch at least, got {limit} of "
                f"{num_batches}. Raise it, or leave it out."
            )
        return number * self.batch_size

    def numbered(self, batch: int, length: int) -> list[int]:
        """The numbers of the samples in a batch of this process.

        Args:
            batch: Its number.
            length: Samples that it has.

        Raises:
            ValueError: A collator leaves some out or adds some, and several processes share them.
        """
        if self.num_asked is not None:
            start = batch * self.batch_size
            numbers = self.numbers[start : start + self.batch_size]
            if len(numbers) == length:
                return numbers
            if self.place()[1] > 1:
                raise ValueError(
                    f"data: expected a collator that makes a sample of each row, for "
                    f"{self.place()[1]} processes or shards to share, got {length} of "
                    f"{len(numbers)} rows. Let the data set choose, or use one process."
                )
            self._count()
        return list(range(self._next, self._next + length))

    def _count(self) -> None:
        """From here on samples are numbered as they come, after those that are noted."""
        noted = list(self.notes.all())
        self.notes.forget()
        self.notes = Unwritten(self.notes.folder, self.notes.mark, noted)
        self._next = 1 + max((n for note in noted for n in note.get("numbers", [])), default=-1)
        self.num_asked = None

    def note(
        self, numbers: Sequence[int], records: Sequence[Mapping[str, Any]], seconds: float
    ) -> None:
        """Notes the records of a batch of this process.

        Args:
            numbers: Of the samples.
            records: One for each.
            seconds: For each.
        """
        told = {"numbers": list(numbers), "seconds": seconds, "records": list(records)}
        self.notes.add(*self.place(), told)
        self._next += len(records)

    def image(self, number: int) -> Any:
        """The image of a sample, which another process may have asked about."""
        if number not in self.images:
            read = self.loader.collate_fn([self.loader.dataset[number]])
            self.images[number] = read["samples"][0].image
        return self.images[number]

    def check(self, records: Mapping[int, Mapping[str, Any]]) -> None:
        """Refuses to end with answers missing.

        Raises:
            ValueError: Some are.
        """
        if self.num_asked is not None and len(records) != self.num_asked:
            raise ValueError(
                f"evaluate: expected {self.num_asked} answers, got {len(records)}: notes in "
                f"{str(self.notes.folder / NOTES)!r} were lost. The same command asks for the rest."
            )

    def end(self) -> None:
        """Notes that this process has answered all that is its."""
        rank, size = self.place()
        self.notes.add(rank, size, {"ends": [rank, size]})
