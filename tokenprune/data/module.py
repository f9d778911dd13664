"""The data module: data sets and collators as Lightning's loops want them."""

from __future__ import annotations

import math
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.overrides.distributed import UnrepeatedDistributedSampler
from torch.utils.data import DataLoader, Dataset, Sampler
from transformers import ProcessorMixin

from tokenprune.data.collate import ConversationCollator, PromptCollator
from tokenprune.data.folder import FolderDataset
from tokenprune.data.hub import HubDataset
from tokenprune.data.images import check_scale
from tokenprune.data.order import EpochShuffle
from tokenprune.data.sample import Sample


class VQADataModule(pl.LightningDataModule):
    """Conversations with labels to train and validate on, prompts to test and predict on.

    Args:
        train: Data set of the training loop, shuffled anew in every epoch.
        validation: Data set of the validation loop.
        test: Data set of the test and predict loops: a sample's last turn is asked.
        processor: Belongs to the model.
        batch_size: Samples per batch.
        num_workers: Processes that prepare batches; 0 does it in the main process.
        seed: Of the order of training samples.
        image_scale: Share of each image's pixels that the processor is given, in every loop.
        group_by_size: Training steps, and batches to predict, have samples of similar size: less
            padding. The data sets have `sizes()` for it, a number a sample.

    Raises:
        ValueError: `batch_size`, `num_workers` or `image_scale` is out of range.
    """

    def __init__(
        self,
        *,
        train: Dataset[Sample] | None = None,
        validation: Dataset[Sample] | None = None,
        test: Dataset[Sample] | None = None,
        processor: ProcessorMixin | None = None,
        batch_size: int = 32,
        num_workers: int = 0,
        seed: int = 0,
        image_scale: float = 1.0,
        group_by_size: bool = False,
    ) -> None:
        super().__init__()
        self.group_by_size = group_by_size
        for name, value, lowest in (("batch_size", batch_size, 1), ("num_workers", num_workers, 0)):
            if isinstance(value, bool) or not isinstance(value, int) or value < lowest:
                raise ValueError(
                    f"data.{name}: expected an integer >= {lowest}, got {value!r}. "
                    f"Set data.{name}={max(lowest, 8)}."
                )
        self.image_scale = check_scale(image_scale)
        self.train, self.validation, self.test = train, validation, test
        self.processor = processor
        self.batch_size, self.num_workers, self.seed = batch_size, num_workers, seed
        self._start = (0, 0)
        self._interrupted: dict[str, Any] | None = None
        self.resumed: tuple[int, int] | None = None

    @classmethod
    def from_folder(
        cls,
        *,
        path: str | None = None,
        train_path: str | None = None,
        validation_path: str | None = None,
        image_folder: str | None = None,
        allow_outside: bool = False,
        turns: str = "last",
        skip_bad: bool = False,
        processor: ProcessorMixin | None = None,
        batch_size: int = 32,
        num_workers: int = 0,
        seed: int = 0,
        image_scale: float = 1.0,
        group_by_size: bool = False,
    ) -> VQADataModule:
        """Data sets from local files; see `FolderDataset`.

        Args:
            path: What is evaluated.
            train_path: What is trained on.
            validation_path: What training is validated on.
            image_folder: What image paths are relative to; None for each file's own folder.
            allow_outside: Opens images outside the folder, too.
            turns: Which answers of a conversation are evaluated: `"last"` or `"each"`.
            skip_bad: Leaves out bad rows; how many is said.
            processor: Belongs to the model.
            batch_size: Samples per batch.
            num_workers: Processes that prepare batches.
            seed: Of the order of training samples.
            image_scale: Share of each image's pixels that the processor is given.
            group_by_size: See above; sizes are pixels.

        Raises:
            ValueError: No path is given, or a data set is not as expected.
        """
        if path is None and train_path is None and validation_path is None:
            raise ValueError(
                "data: expected the path of a .json, .jsonl, .ndjson, .csv or .tsv file, got none. "
                "Set data.path to evaluate, data.train_path to train."
            )

        def load(own: str | None, turns: str) -> FolderDataset | None:
            if own is None:
                return None
            return FolderDataset(
                own, allow_outside, image_folder=image_folder, turns=turns, skip_bad=skip_bad
            )

        return cls(
            train=load(train_path, "all"),
            validation=load(validation_path, "all"),
            test=load(path, turns),
            processor=processor,
            batch_size=batch_size,
            num_workers=num_workers,
            seed=seed,
            image_scale=image_scale,
            group_by_size=group_by_size,
        )

    @classmethod
    def from_hub(
        cls,
        *,
        path: str,
        name: str | None = None,
        split: str | None = "test",
        train_split: str | None = None,
        validation_split: str | None = None,
        image_column: str = "image",
        question_column: str = "question",
        answer_column: str = "answer",
        conversations_column: str | None = None,
        id_column: str | None = None,
        kind_column: str | None = None,
        revision: str | None = None,
        turns: str = "last",
        skip_bad: bool = False,
        processor: ProcessorMixin | None = None,
        batch_size: int = 32,
        num_workers: int = 0,
        seed: int = 0,
        image_scale: float = 1.0,
    ) -> VQADataModule:
        """Splits of one Hugging Face data set; see `HubDataset`.

        Args:
            path: Hub id, local folder or data file.
            name: Configuration on the Hub.
            split: What is evaluated.
            train_split: What is trained on.
            validation_split: What training is validated on.
            image_column: Column of images.
            question_column: Column of questions.
            answer_column: Column of answers.
            conversations_column: Column of conversations, in place of questions and answers.
            id_column: Column of ids.
            kind_column: Column of question kinds.
            revision: Branch, tag or commit on the Hub.
            turns: Which answers of a conversation are evaluated: `"last"` or `"each"`.
            skip_bad: Leaves out bad rows; how many is said.
            processor: Belongs to the model.
            batch_size: Samples per batch.
            num_workers: Processes that prepare batches.
            seed: Of the order of training samples.
            image_scale: Share of each image's pixels that the processor is given.

        Raises:
            ValueError: The data set is not as expected.
        """

        def load(own: str | None, turns: str) -> HubDataset | None:
            if own is None:
                return None
            return HubDataset(
                path,
                name,
                own,
                image_column=image_column,
                question_column=question_column,
                answer_column=answer_column,
                conversations_column=conversations_column,
                id_column=id_column,
                kind_column=kind_column,
                revision=revision,
                turns=turns,
                skip_bad=skip_bad,
            )

        return cls(
            train=load(train_split, "all"),
            validation=load(validation_split, "all"),
            test=load(split, turns),
            processor=processor,
            batch_size=batch_size,
            num_workers=num_workers,
            seed=seed,
            image_scale=image_scale,
        )

    @property
    def commit(self) -> str | None:
        """The commit on the Hub that its data sets are of, where that is known."""
        own = (getattr(data, "commit", None) for data in (self.test, self.train, self.validation))
        return next((commit for commit in own if commit is not None), None)

    def train_dataloader(self) -> DataLoader[Sample]:
        data = self._data(self.train, "train")
        trainer: Any = self.trainer
        processes = self._processes(data, "train")
        shuffle = EpochShuffle(
            _length(data),
            self.batch_size,
            self.seed,
            processes=processes,
            rank=0 if trainer is None else trainer.global_rank,
            start=self._start,
            sizes=self._sizes(data),
            accumulated=1 if trainer is None else trainer.accumulate_grad_batches,
        )
        collate = ConversationCollator(self._processor(), self.image_scale)
        return self._loader(data, collate, shuffle)

    def val_dataloader(self) -> DataLoader[Sample]:
        data = self._data(self.validation, "validation")
        sampler: Any = None
        trainer: Any = self.trainer
        if (processes := self._processes(data, "validation")) > 1:
            # The trainer's own would repeat samples until all processes have as many.
            rank = trainer.global_rank
            sampler = UnrepeatedDistributedSampler(data, processes, rank, shuffle=False)
        collate = ConversationCollator(self._processor(), self.image_scale)
        return self._loader(data, collate, sampler)

    def test_dataloader(self) -> DataLoader[Sample]:
        data = self._data(self.test, "test")
        self._processes(data, "test")
        return self._loader(data, PromptCollator(self._processor(), self.image_scale))

    def predict_dataloader(self) -> DataLoader[Sample]:
        return self.test_dataloader()

    def predict_order(self) -> list[int] | None:
        """The samples to predict, large ones first; None where they stay in the data's order."""
        sizes = self._sizes(self._data(self.test, "test"))
        if sizes is None:
            return None
        return sorted(range(len(sizes)), key=lambda sample: -sizes[sample])

    def _sizes(self, data: Dataset[Sample]) -> list[int] | None:
        own: Any = data
        if not self.group_by_size:
            return None
        if not hasattr(own, "sizes"):
            raise ValueError(
                f"data.group_by_size: expected samples whose sizes are known, got "
                f"{type(own).__name__}. Leave it out, or use data=folder."
            )
        sizes: list[int] = own.sizes()
        return sizes

    def state_dict(self) -> dict[str, Any]:
        """Where training stands: Lightning counts batches, but starts an epoch's data anew."""
        trainer: Any = self.trainer
        if trainer is None or self.train is None:
            return {}
        # Over all epochs: what `current` means depends on the hook that saves.
        batches = trainer.fit_loop.epoch_loop.batch_progress.total.processed
        before = 0 if self._interrupted is None else self._interrupted["batches"]
        epochs, batch = divmod(
            self._start[1] + batches - before, max(1, int(trainer.num_training_batches))
        )
        return {"epoch": self._start[0] + epochs, "batch": batch, "batches": batches} | self._order(
            _length(self.train), trainer.world_size
        )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on where `state_dict` stood, with as many processes as there are now.

        Raises:
            ValueError: In the middle of an epoch, steps would have other samples than before.
        """
        if not state_dict or self.train is None:
            return
        trainer: Any = self.trainer
        length, epoch, batch = _length(self.train), state_dict["epoch"], state_dict["batch"]
        before, now = state_dict, self._order(length, trainer.world_size)
        if batch > 0:
            self._check_resumed(before, now)
        sizes = [order["batch_size"] * order["processes"] for order in (before, now)]
        batch = batch * sizes[0] // sizes[1]
        batches = epoch * math.ceil(length / sizes[1]) + batch
        self._start, self._interrupted = (epoch, batch), state_dict | {"batches": batches}
        #: Batches until then, and those of an epoch at its end, as the trainer counts them now.
        self.resumed = batches, batch or (math.ceil(length / sizes[1]) if epoch > 0 else 0)

    def _order(self, length: int, processes: int) -> dict[str, int]:
        """What the order of samples, and their place in batches, follows from."""
        trainer: Any = self.trainer
        return {
            "num_samples": length,
            "batch_size": self.batch_size,
            "seed": self.seed,
            "processes": processes,
            "accumulated": trainer.accumulate_grad_batches,
            "grouped": int(self.group_by_size),
        }

    def _check_resumed(self, before: dict[str, int], now: dict[str, int]) -> None:
        """In the middle of an epoch, nothing that decides the order may have changed."""
        whole = "as when training was interrupted in the middle of an epoch"
        for name, key in _ORDERED:
            if before.get(name, 0) != now[name]:
                raise ValueError(
                    f"{key}: expected {before.get(name, 0)}, {whole}, got {now[name]}. Set it "
                    "back, or ckpt_path=null to start anew."
                )
        parts = ("batch_size", "processes", "accumulated")
        old, new = (math.prod(order.get(part, 1) for part in parts) for order in (before, now))
        if old != new:
            each = now["processes"] * now["batch_size"]
            remedy = f"data.batch_size={before['batch_size']} with as many processes as before"
            if old % each == 0:
                remedy = f"trainer.accumulate_grad_batches={old // each}"
            elif old % (now["processes"] * now["accumulated"]) == 0:
                remedy = f"data.batch_size={old // (now['processes'] * now['accumulated'])}"
            raise ValueError(
                f"data.batch_size: expected {old} samples a step, {whole}, got {new}: "
                f"{now['processes']} processes with {now['accumulated']} batches of "
                f"{now['batch_size']}. Set {remedy}, or ckpt_path=null to start anew."
            )

    def _loader(
        self,
        data: Dataset[Sample],
        collate: PromptCollator | ConversationCollator,
        sampler: Sampler[int] | None = None,
    ) -> DataLoader[Sample]:
        if getattr(data, "has_systems", False):
            collate.check_system()  # before the batch in which the first one is
        return DataLoader(
            data,
            batch_size=self.batch_size,
            sampler=sampler,
            num_workers=self.num_workers,
            collate_fn=collate,
            # Without one of its own a loader draws its workers' seed from the global generator.
            generator=torch.Generator().manual_seed(self.seed),
        )

    def _processes(self, data: Dataset[Sample], name: str) -> int:
        """How many processes share a loop's samples; each needs one."""
        trainer: Any = self.trainer
        number = 1 if trainer is None else int(trainer.world_size)
        if number > _length(data):
            raise ValueError(
                f"trainer.devices: expected at most one process per sample of {name!r}, got "
                f"{number} for {_length(data)}. Lower trainer.devices."
            )
        return number

    def _processor(self) -> ProcessorMixin:
        if self.processor is None:
            raise ValueError(
                "VQADataModule: expected a processor, got None. Pass the one of the model."
            )
        return self.processor

    def _data(self, data: Dataset[Sample] | None, name: str) -> Dataset[Sample]:
        if data is None:
            raise ValueError(
                f"data: expected a data set for {name!r}, got none. "
                f"{_REMEDIES[name]}, or choose data=scenes."
            )
        return data


#: What an order follows from besides steps, and the key that says it.
_ORDERED = (
    ("num_samples", "the data"),
    ("seed", "data.seed"),
    ("grouped", "data.group_by_size"),
)
_REMEDIES = {
    "train": "Set data.train_path (folder) or data.train_split (hub)",
    "validation": "Set data.validation_path (folder) or data.validation_split (hub)",
    "test": "Set data.path (folder) or data.split (hub)",
}


def _length(data: Dataset[Sample]) -> int:
    sized: Any = data
    return len(sized)
