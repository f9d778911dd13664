"""The module that Lightning's predict loop runs: answers, what each cost, the run's files."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from transformers import BatchFeature

import tokenprune as tp
from tokenprune.evaluation.answering import answer
from tokenprune.evaluation.kept import kept_tokens
from tokenprune.evaluation.loading import device_of
from tokenprune.evaluation.metrics import SUMMARIES, build_metric
from tokenprune.evaluation.shares import Share
from tokenprune.evaluation.summary import summarise
from tokenprune.runs import results, team
from tokenprune.runs.compose import Pruning
from tokenprune.runs.folders import occupied
from tokenprune.runs.loggers import CSVCurve, log_config
from tokenprune.runs.models import LoadedModel
from tokenprune.runs.targets import load_imports

_PREDICTION = ("id", "kind", "question", "answer", "prediction", "score", "correct")


class Evaluator(pl.LightningModule):
    """Answers the questions of a data set under pruning, and writes what came of it.

    Runs in Lightning's predict loop, which gives every sample to exactly one process.

    Args:
        load: Gives model and processor. Every process calls it for itself: a transformers model
            that was sent to another process has lost the hooks by which it collects vision states.
        share: This process's samples, and what is noted of all of them.
        pruning: Strategy, schedule and positions; None for the unpruned model.
        folder: Where the run's files go.
        config: The run's resolved config.
        marks: Its `results.fingerprint`.
        names: Entries of metrics.json that name the run.
        patience: Seconds that the process which writes the run's files waits for another's answer.
        num_graphs: CUDA graphs of prefills that are kept.
        max_new_tokens: Longest answer.
        num_pictures: First so many samples whose kept tokens are stored.
        metric: Scores an answer, see `tokenprune.evaluation.metrics`.

    Raises:
        KeyError: There is no such metric.
    """

    def __init__(
        self,
        load: Callable[[], LoadedModel],
        share: Share,
        pruning: Pruning | None,
        folder: Path,
        config: Mapping[str, Any],
        marks: Mapping[str, str],
        names: Mapping[str, Any],
        max_new_tokens: int,
        num_pictures: int,
        metric: str = "exact",
        patience: float = 1800.0,
        num_graphs: int = 0,
    ) -> None:
        super().__init__()
        self.score, self.metric = build_metric(metric), metric
        self.load = load
        self.pruning = pruning
        self.folder = folder
        self.config = dict(config)
        self.marks = dict(marks)
        self.names = dict(names)
        self.max_new_tokens = max_new_tokens
        self.num_pictures = num_pictures
        #: Whether this process has written the run's files.
        self.wrote = False
        self.share, self.patience = share, patience
        self.num_graphs = num_graphs

    def configure_model(self) -> None:
        """Loads the model, in the process that runs it."""
        load_imports(self.config)
        self.loaded = self.load()
        self.graphs = tp.Graphs(self.num_graphs) if self.num_graphs else None
        self.shape = tp.cost.DecoderShape.from_config(self.loaded.model.config)
        if getattr(self.loaded.model, "hf_device_map", None) is None:
            self.model = self.loaded.model  # registered: the trainer moves it to its device

    def transfer_batch_to_device(
        self, batch: dict[str, Any], device: torch.device, dataloader_idx: int
    ) -> dict[str, Any]:
        # Samples hold pictures, which stay where they are; Lightning would copy them.
        model = self.loaded.model
        # `to` changes what it is called on, and the batch may be seen again.
        own = BatchFeature(dict(batch["inputs"]))
        return batch | {"inputs": own.to(model.device, dtype=model.dtype)}

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Answers a batch and notes what the metrics need."""
        samples = batch["samples"]
        answers = answer(
            self.loaded,
            self.pruning,
            batch["inputs"],
            self.max_new_tokens,
            batch.get("whole_ids"),
            self.graphs,
        )
        numbers, records = self.share.numbered(batch_idx, len(samples)), []
        for index, (sample, text) in enumerate(zip(samples, answers.texts, strict=True)):
            turn = sample.turns[-1]
            score = self.score(text, turn.accepted or (turn.answer,))
            record: dict[str, Any] = {
                "id": sample.id,
                "kind": turn.kind,
                "question": turn.question,
                "answer": turn.answer,
                "prediction": text,
                "score": score,
                "correct": score >= 0.5,
                "picture": sample.mark,
            } | answers.costs[index]
            if numbers[index] < self.num_pictures:
                given = answers.costs[index]["given"]
                record["kept"] = kept_tokens(answers.trace, answers.rows[index], given)
                self.share.images[numbers[index]] = sample.image
            records.append(record)
        self.share.note(numbers, records, answers.seconds / len(samples))

    def on_predict_epoch_end(self) -> None:
        """Writes the run's files once all is answered."""
        share, notes = self.share, self.share.notes
        share.end()
        rank, size = share.place()
        if share.shard is None:
            if rank > 0:
                return
            notes.wait(size, self.patience, team.check)
        with self._alone() if share.shard is not None else nullcontext():
            if len(notes.ended(size)) < size:  # or another shard has written
                return
            records, seconds = notes.answers()
            share.check(records)
            for number in sorted(records):
                if "kept" in records[number]:
                    records[number]["image"] = share.image(number)
            self._write([records[number] for number in sorted(records)], seconds)
            notes.remove()

    def _alone(self) -> AbstractContextManager[None]:
        """Inside its `with` no other shard looks whether it is the last."""
        return occupied(self.folder, "-writes", waits=True)

    def _write(self, records: list[dict[str, Any]], seconds: list[float]) -> None:
        """Writes the run's files, and tells its loggers.

        Args:
            records: In the order of the samples.
            seconds: One entry a batch.
        """
        metrics = self.names | summarise(
            records, seconds, self.shape, self.loaded.model.dtype.itemsize
        )
        if self.metric in SUMMARIES:
            metrics["metric_summary"] = SUMMARIES[self.metric](records)
        metrics["device"] = on = device_of(self.loaded.model)
        pictured = [record for record in records if "kept" in record]
        pictures = [results.image_name(i, record["id"]) for i, record in enumerate(pictured)]
        row = results.row(metrics, self.folder.name)
        if self.trainer.loggers:
            numbers = {k: float(v) for k, v in row.items() if isinstance(v, int | float)}
            log_config(self.trainer, self.config)
            for logger in self.trainer.loggers:
                if isinstance(logger, CSVCurve):
                    logger.begin()  # an earlier run may have left one
                logger.log_metrics(numbers)
                logger.save()
        results.write_run(
            folder=self.folder,
            config=self.config,
            metrics=metrics,
            predictions=[
                {key: record[key] for key in _PREDICTION} | {"picture": record.get("picture")}
                for record in records
            ],
            kept=[
                {key: record[key] for key in _PREDICTION if key not in ("score", "correct")}
                | {"image": picture}
                | record["kept"]
                for picture, record in zip(pictures, pictured, strict=True)
            ],
            images={
                picture: record["image"] for picture, record in zip(pictures, pictured, strict=True)
            },
            versions=self.marks | {"device": on},
        )
        self.wrote = True
