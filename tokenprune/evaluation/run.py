"""Evaluation of a pruned model: greedy answers, how many are right, and what they cost.

Shape suffixes: B batch rows, T prompt positions, L decoder layers.
"""

from __future__ import annotations

import json
import math
import statistics
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache, lru_cache, partial
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor
from transformers import BatchFeature, LogitsProcessor, LogitsProcessorList

import tokenprune as tp
from tokenprune.evaluation.metrics import build_metric
from tokenprune.runs import compose, results
from tokenprune.runs.compose import Pruning
from tokenprune.runs.devices import check_evaluation
from tokenprune.runs.loggers import CSVCurve, build_logger
from tokenprune.runs.models import LoadedModel

_Z95 = 1.959963984540054  # two-sided 95 % of the normal distribution


def wilson(correct: float, total: int) -> tuple[float, float]:
    """95 % interval of a proportion (Wilson, 1927); never leaves [0, 1], sound at 0 and 1.

    Scores between 0 and 1 vary less than right and wrong do: of their mean it is no too narrow one.
    """
    if total == 0:
        return 0.0, 1.0
    share, z2 = correct / total, _Z95**2
    centre = (share + z2 / (2 * total)) / (1 + z2 / total)
    half = _Z95 * math.sqrt(share * (1 - share) / total + z2 / (4 * total**2)) / (1 + z2 / total)
    return max(0.0, centre - half), min(1.0, centre + half)


class FirstToken(LogitsProcessor):
    """Notes when the first token's logits are there; changes nothing."""

    def __init__(self) -> None:
        self.time: float | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if self.time is None:
            self.time = now(scores.device)
        return scores


def now(device: torch.device) -> float:
    """Seconds, once the device has done its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def pruned(loaded: LoadedModel, pruning: Pruning | None) -> AbstractContextManager[tp.Trace | None]:
    """Prunes the model inside the `with`, or leaves it alone."""
    if pruning is None:
        return nullcontext()
    return tp.prune(loaded.model, pruning.strategy, pruning.schedule, pruning.positions)


def generate(
    loaded: LoadedModel, inputs: Mapping[str, Any], max_new_tokens: int, clock: FirstToken
) -> list[str]:
    """Greedy answers to a batch of prompts padded on the left."""
    tokenizer = loaded.processor.tokenizer
    model: Any = loaded.model
    output_BT = model.generate(
        **inputs,
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        pad_token_id=tokenizer.pad_token_id,
        logits_processor=LogitsProcessorList([clock]),
    )
    answers: list[str] = tokenizer.batch_decode(
        output_BT[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True
    )
    return [answer.strip() for answer in answers]


class Evaluator(pl.LightningModule):
    """Answers the questions of a data set under pruning, and writes what came of it.

    Runs in Lightning's predict loop, which gives every sample to exactly one process.

    Args:
        load: Gives model and processor. Every process calls it for itself: a transformers model
            that was sent to another process has lost the hooks by which it collects vision states.
        pruning: Strategy, schedule and positions; None for the unpruned model.
        folder: Where the run's files go.
        config: The run's resolved config.
        marks: Its `results.fingerprint`.
        names: Entries of metrics.json that name the run.
        max_new_tokens: Longest answer.
        num_pictures: First so many samples whose kept tokens are stored.
        metric: Scores an answer, see `tokenprune.evaluation.metrics`.

    Raises:
        KeyError: There is no such metric.
    """

    def __init__(
        self,
        load: Callable[[], LoadedModel],
        pruning: Pruning | None,
        folder: Path,
        config: Mapping[str, Any],
        marks: Mapping[str, str],
        names: Mapping[str, Any],
        max_new_tokens: int,
        num_pictures: int,
        metric: str = "exact",
    ) -> None:
        super().__init__()
        self.score = build_metric(metric)
        self.load = load
        self.pruning = pruning
        self.folder = folder
        self.config = dict(config)
        self.marks = dict(marks)
        self.names = dict(names)
        self.max_new_tokens = max_new_tokens
        self.num_pictures = num_pictures
        self.records: list[dict[str, Any]] = []
        self.seconds: list[float] = []

    def configure_model(self) -> None:
        """Loads the model, in the process that runs it."""
        self.loaded = self.load()
        self.shape = tp.cost.DecoderShape.from_config(self.loaded.model.config)
        if getattr(self.loaded.model, "hf_device_map", None) is None:
            self.model = self.loaded.model  # registered: the trainer moves it to its device

    def transfer_batch_to_device(
        self, batch: dict[str, Any], device: torch.device, dataloader_idx: int
    ) -> dict[str, Any]:
        # Samples hold pictures, which stay where they are; Lightning would copy them.
        model = self.loaded.model
        own = BatchFeature(
            dict(batch["inputs"])
        )  # `to` changes it, and the batch may be seen again
        return batch | {"inputs": own.to(model.device, dtype=model.dtype)}

    def on_predict_start(self) -> None:
        self.records, self.seconds = [], []

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Answers a batch and keeps what the metrics need."""
        inputs, samples = batch["inputs"], batch["samples"]
        clock = FirstToken()
        with pruned(self.loaded, self.pruning) as trace:
            start = now(self.loaded.model.device)
            answers = generate(self.loaded, inputs, self.max_new_tokens, clock)
        assert clock.time is not None
        self.seconds.append((clock.time - start) / len(samples))
        visual_BL, real_BL = self._lengths(inputs, trace)
        original_B = tp.visual_mask(self.loaded.model, inputs["input_ids"]).sum(1).tolist()
        for index, (sample, answer) in enumerate(zip(samples, answers, strict=True)):
            turn = sample.turns[-1]
            score = self.score(answer, turn.accepted or (turn.answer,))
            record: dict[str, Any] = {
                "id": sample.id,
                "kind": turn.kind,
                "question": turn.question,
                "answer": turn.answer,
                "prediction": answer,
                "score": score,
                "correct": score >= 0.5,
                "num_visual": original_B[index],
                "visual": visual_BL[index],
                "real": real_BL[index],
            }
            if len(self.records) < self.num_pictures:
                record["kept"] = kept_tokens(trace, index, original_B[index])
                record["image"] = sample.image
            self.records.append(record)

    def _lengths(
        self, inputs: Mapping[str, Any], trace: tp.Trace | None
    ) -> tuple[list[list[int]], list[list[int]]]:
        """Visual and real tokens that each layer processed, per row."""
        if trace is not None:
            return trace.visual_lengths.T.tolist(), trace.lengths.T.tolist()
        ids_BT = inputs["input_ids"]
        visual_B = tp.visual_mask(self.loaded.model, ids_BT).sum(1).tolist()
        mask_BT = inputs.get("attention_mask")
        real_B = (torch.ones_like(ids_BT) if mask_BT is None else mask_BT).sum(1).tolist()
        layers = self.shape.num_layers
        return [[count] * layers for count in visual_B], [[count] * layers for count in real_B]

    def on_predict_epoch_end(self) -> None:
        """Gathers all processes' answers; the first process writes the run's files."""
        parts: list[Any] = [(self.records, self.seconds)]
        if self.trainer.world_size > 1:
            parts = [None] * self.trainer.world_size
            torch.distributed.all_gather_object(parts, (self.records, self.seconds))
        if not self.trainer.is_global_zero:
            return
        # Process r answered samples r, r + n, r + 2n, ...
        numbered = [
            (number * len(parts) + rank, record)
            for rank, (records, _) in enumerate(parts)
            for number, record in enumerate(records)
        ]
        records = [record for _, record in sorted(numbered, key=lambda pair: pair[0])]
        seconds = [value for _, values in parts for value in values]
        metrics = self.names | summarise(
            records, seconds, self.shape, self.loaded.model.dtype.itemsize
        )
        device = self.loaded.model.device
        on = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        pictured = records[: self.num_pictures]
        pictures = [results.image_name(i, record["id"]) for i, record in enumerate(pictured)]
        results.write_run(
            folder=self.folder,
            config=self.config,
            metrics=metrics,
            predictions=[{key: record[key] for key in _PREDICTION} for record in records],
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
        if self.trainer.loggers:
            row = results.row(metrics, self.folder.name)
            numbers = {k: float(v) for k, v in row.items() if isinstance(v, int | float)}
            for logger in self.trainer.loggers:
                logger.log_metrics(numbers)
                logger.save()


# Lightning's advice on what is meant to be so, and one line that its own code causes.
_HARMLESS = (
    ".*does not have many workers.*",
    ".*GPU available but not used.*",
    ".*overridden `transfer_batch_to_device`.*",
    ".*predict returned None.*",
    ".*isinstance.treespec, LeafSpec.*",
)
_PREDICTION = ("id", "kind", "question", "answer", "prediction", "score", "correct")


def kept_tokens(trace: tp.Trace | None, row: int, num_visual: int) -> dict[str, Any]:
    """Kept tokens of one sample, for kept.json."""
    places = trace.places[row].tolist() if trace is not None and trace.places else []
    sizes: dict[tuple[int, int], list[int]] = {}
    for image, grid, grid_row, column in places:
        if image == 0 and grid >= 0:  # pictures show the first image
            size = sizes.setdefault((image, grid), [0, 0])
            size[:] = [max(size[0], grid_row + 1), max(size[1], column + 1)]
    stages = trace.stages if trace is not None else []
    return {
        "grids": list(sizes.values()),
        "places": places,
        "num_visual": num_visual,
        "stages": [{"layer": stage.layer, "kept": stage.kept[row].tolist()} for stage in stages],
    }


def summarise(
    records: Sequence[Mapping[str, Any]],
    seconds: Sequence[float],
    shape: tp.cost.DecoderShape,
    bytes_per_value: int,
) -> dict[str, Any]:
    """Metrics of a run.

    Args:
        records: One mapping per sample, as `Evaluator.predict_step` makes them.
        seconds: Prefill time per sample, one entry per batch.
        shape: Sizes of the decoder.
        bytes_per_value: Of the key-value cache.

    Raises:
        ValueError: If there are no samples.
    """
    if not records:
        raise ValueError(
            "evaluate: expected at least one sample, got an empty data set. Check the data config."
        )

    @cache
    def visual_flops(lengths: tuple[int, ...]) -> float:
        return tp.cost.flops(shape, lengths, convention="pyramiddrop")

    def accuracy(part: Sequence[Mapping[str, Any]]) -> tuple[float, float, float]:
        correct = sum(record["score"] for record in part)
        return correct / len(part), *wilson(correct, len(part))

    num = len(records)
    kinds: dict[str, dict[str, float]] = {}
    for kind in sorted({record["kind"] for record in records}):
        part = [record for record in records if record["kind"] == kind]
        share, low, high = accuracy(part)
        kinds[kind] = {"accuracy": share, "low": low, "high": high, "num_samples": len(part)}
    share, low, high = accuracy(records)
    per_layer = [sum(counts) / num for counts in zip(*(r["visual"] for r in records), strict=True)]
    flops = sum(visual_flops(tuple(record["visual"])) for record in records) / num
    whole = sum(visual_flops((record["num_visual"],) * shape.num_layers) for record in records)
    kv = None
    if shape.caches_alike:
        sizes = (
            tp.cost.kv_bytes(shape, r["real"], bytes_per_value=bytes_per_value) for r in records
        )
        kv = sum(sizes) / num / 1e6
    return {
        "num_samples": num,
        "accuracy": share,
        "accuracy_low": low,
        "accuracy_high": high,
        "kinds": kinds,
        "visual_tokens_per_layer": per_layer,
        "avg_tokens": sum(per_layer) / len(per_layer),
        "final_tokens": per_layer[-1],
        "tflops": flops / 1e12,
        "tflops_ratio": flops / (whole / num) if whole else 1.0,
        "prefill_ms": 1000 * statistics.median(seconds),
        "kv_mb": kv,
        "num_visual": sum(record["num_visual"] for record in records) / num,
        # A budget is solved for one size of image: what the data's sizes gave.
        "num_visual_range": _range(record["num_visual"] for record in records),
        "avg_tokens_range": _range(sum(r["visual"]) / len(r["visual"]) for r in records),
        "tflops_range": _range(visual_flops(tuple(r["visual"])) / 1e12 for r in records),
    }


def _range(values: Iterable[float]) -> list[float]:
    """Smallest and largest of the samples' values."""
    known = list(values)
    return [min(known), max(known)]


class RememberedBatches:
    """A loader whose batches stay in memory if they are small: a sweep prepares them once.

    Args:
        loader: Gives batches with tensors under `inputs`.
        limit: Bytes of tensors and pictures that may stay.
    """

    def __init__(self, loader: Any, limit: int = 2**29) -> None:
        self.loader, self.limit = loader, limit
        self.batches: list[dict[str, Any]] | None = None

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        if self.batches is not None:
            yield from self.batches
            return
        seen: list[dict[str, Any]] = []
        size = 0
        for batch in self.loader:
            size += sum(v.nbytes for v in batch["inputs"].values() if isinstance(v, Tensor))
            images = [image for sample in batch["samples"] for image in sample.images]
            size += sum(image.width * image.height * len(image.getbands()) for image in images)
            if size <= self.limit:
                seen.append(batch)
            else:
                seen.clear()
            yield batch
        if size <= self.limit:
            self.batches = seen


# One model and one data set stay in memory, so that a sweep loads them once per process.
@lru_cache(maxsize=1)
def _load_model(config: str) -> LoadedModel:
    from hydra.utils import instantiate

    loaded = instantiate(OmegaConf.create(json.loads(config)[0]))
    assert isinstance(loaded, LoadedModel)
    return loaded


@lru_cache(maxsize=1)
def _load_data(config: str, model: str) -> pl.LightningDataModule:
    from hydra.utils import instantiate

    own = OmegaConf.create(json.loads(config)[0])
    data = instantiate(own, processor=_load_model(model).processor)
    assert isinstance(data, pl.LightningDataModule)
    return data


@lru_cache(maxsize=1)
def _load_batches(config: str, model: str) -> RememberedBatches:
    data = _load_data(config, model)
    data.prepare_data()
    data.setup("predict")
    return RememberedBatches(data.predict_dataloader())


def load_model(config: DictConfig, marks: Mapping[str, str] | None = None) -> LoadedModel:
    """The model of a run, from memory if the run before had the same."""
    return _load_model(_key(config.model, marks))


def _key(config: DictConfig, marks: Mapping[str, str] | None) -> str:
    """Names what is in memory: files that changed since are read again."""
    return json.dumps([compose.plain(config), marks])


def _leave_signals() -> None:
    """Registers no handlers: a signal ends the process."""


def evaluate(config: DictConfig, folder: Path, names: Mapping[str, str]) -> dict[str, Any]:
    """Runs one evaluation and writes its files, unless they are there already.

    Args:
        config: As `configs/eval.yaml` composes it.
        folder: The run's folder.
        names: What to call `strategy`, `schedule`, `model` and `data` in the metrics.

    Returns:
        The metrics, as in metrics.json.

    Raises:
        ValueError: If something in the config cannot be honoured.
    """
    from hydra.utils import instantiate

    resolved = compose.plain(config)
    marks = results.fingerprint(resolved)
    if results.changes(folder, resolved, marks) == []:
        return results.read_metrics(folder)
    check_evaluation(resolved["trainer"])
    logger = build_logger(config.get("logger"))
    trainer = instantiate(
        config.trainer, logger=logger, enable_checkpointing=False, enable_model_summary=False
    )
    for own in trainer.loggers:
        if isinstance(own, CSVCurve):
            own.cut(-1)  # of an earlier run
    # Lightning's own handlers note a SIGTERM, and act on it in training only.
    trainer._signal_connector.register_signal_handlers = _leave_signals
    loaded = load_model(config, marks)
    pruning = compose.fit_pruning(config, loaded.model)
    if pruning is not None:
        with tp.prune(loaded.model, pruning.strategy, pruning.schedule, pruning.positions):
            pass  # refuses here, before any data is read, what the model does not support
    source: dict[str, Any]
    model, data = _key(config.model, marks), _key(config.data, marks)
    if trainer.world_size == 1:
        source = {"dataloaders": _load_batches(data, model)}
    else:
        source = {"datamodule": _load_data(data, model)}
        del loaded  # the processes have their own
        _load_model.cache_clear()
    stages = pruning.schedule.stages if pruning is not None else None
    schedule = dict(config.schedule) if pruning is not None else {}
    if pruning is not None and pruning.solution is not None:  # a budget asked for another value
        schedule |= dict([pruning.solution.solved])
    labels = {
        "strategy": names["strategy"],
        "schedule": names["schedule"] if pruning is not None else None,
        "lam": schedule.get("lam"),
        "num_stages": None if stages is None else len(stages) + 1,
        "layers": None if stages is None else [stage.layer for stage in stages],
        "keeps": None if stages is None else [stage.keep for stage in stages],
        "positions": pruning.positions if pruning is not None else "original",
        # A strategy's own seed counts, whether it was set or follows the run's.
        "seed": config.seed
        if config.strategy is None
        else config.strategy.get("seed", config.seed),
        "model": names["model"],
        "data": names["data"],
        "metric": config.metric,
    }
    evaluator = Evaluator(
        load=partial(_load_model, model),
        pruning=pruning,
        folder=folder,
        config=resolved,
        marks=marks,
        names=labels,
        max_new_tokens=config.max_new_tokens,
        num_pictures=config.num_pictures,
        metric=config.metric,
    )
    with warnings.catch_warnings():
        for message in _HARMLESS:
            warnings.filterwarnings("ignore", message=message)
        trainer.predict(evaluator, **source, return_predictions=False)
    return results.read_metrics(folder)
