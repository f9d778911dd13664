"""Supervised fine-tuning of a vision-language model, with its visual tokens pruned or whole.

A model trained under the schedule that it will run with loses less than one that was never pruned.
What is trained is in `tuning.py`, how a step's loss comes about in `module.py` and `window.py`, how
a training is interrupted and goes on in `checkpoints.py` and `resume.py`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from omegaconf import DictConfig, OmegaConf
from pytorch_lightning.callbacks import EarlyStopping

from tokenprune.runs import compose, files, results, targets
from tokenprune.runs.devices import check_training
from tokenprune.runs.launchers import is_alone, is_first
from tokenprune.runs.loggers import begin, build_logger, close, log_config, log_results
from tokenprune.runs.models import LoadedModel
from tokenprune.runs.trainers import build_trainer
from tokenprune.training import resume
from tokenprune.training.check import MONITORS, Lora, check_saving
from tokenprune.training.checkpoints import BEST, LAST, Checkpoints, Stopped, StopSignals
from tokenprune.training.module import FineTune
from tokenprune.training.quiet import quiet
from tokenprune.training.randomness import RandomStates
from tokenprune.training.sharding import META, Sharded
from tokenprune.training.summary import SUMMARY, sentence, summarise
from tokenprune.training.throughput import Throughput, length, size

#: What a training leaves, and the file by which it is known.
_MADE = {"model": "config.json", "adapter": "adapter_config.json"}


def train(config: DictConfig, output_dir: Path) -> None:
    """Fine-tunes a model and saves it in Hugging Face format.

    The folder gets `model/` (weights and processor, for `from_pretrained` and `model=hub
    model.path=...`), with LoRA `adapter/` as well (for peft), `checkpoints/last.ckpt` and
    `best.ckpt`, the curves of the logger, `config.yaml`, `versions.json` and, last,
    `training.json`. A finished training that is asked to go on is left as it is.

    Args:
        config: As `configs/train.yaml` composes it.
        output_dir: The run's folder.

    Raises:
        ValueError: If something in the config cannot be honoured.
        Stopped: A signal came while it trained; `checkpoints/last.ckpt` holds all steps.
    """
    training = _prepare(_placed(config, output_dir), output_dir)
    loggers = training.trainer.loggers
    try:
        _fit(training)
        if training.found_all_done:
            if is_first():
                print(f"nothing left to train: {output_dir}", flush=True)
            return
        _gather(training)
        counts = {
            "num_trained": sum(p.numel() for p in training.trained.values()),
            "num_parameters": sum(p.numel() for p in training.module.parameters()),
        }
        _save(training)
        numbers = _last_numbers(training, loggers)
        if training.trainer.is_global_zero:
            summary = summarise(numbers) | {"positions": training.positions} | counts
            results.write_text(output_dir / SUMMARY, json.dumps(summary, indent=2))
            log_results(loggers, _flat(summary), {})
            print(sentence(summary, output_dir / "model"), flush=True)
    finally:
        close(loggers)


@dataclass
class _Training:
    """A training with all that it needs.

    Attributes:
        config: As `train` takes it.
        folder: The run's.
        start: The checkpoint to go on from; None to start anew.
        module: The model, to be trained or trained.
        data: Its data.
        trainer: Lightning's.
        signals: What a signal was noted by.
        notes: What was noted of the run once there was something to train.
    """

    config: DictConfig
    folder: Path
    start: str | None
    module: FineTune
    data: Any
    trainer: pl.Trainer
    signals: StopSignals
    notes: _Begin

    @property
    def trained(self) -> dict[str, torch.nn.Parameter]:
        """The weights that are trained, by name."""
        return {n: p for n, p in self.module.named_parameters() if p.requires_grad}

    @property
    def positions(self) -> str:
        pruning = self.module.pruning
        return pruning.positions if pruning is not None else "original"

    @property
    def found_all_done(self) -> bool:
        """Whether the checkpoint had it all, and an earlier command has saved it."""
        began = self.start is None or self.notes.begun
        return not began and (self.folder / SUMMARY).is_file()


def _placed(config: DictConfig, folder: Path) -> DictConfig:
    """A config whose logger writes to the run's folder, outside Hydra as well."""
    logs = config.get("logger")
    if logs and "save_dir" in logs.keys() and OmegaConf.is_interpolation(logs, "save_dir"):  # noqa: SIM118
        config = config.copy()
        config.logger.save_dir = str(folder)
    return config


def _prepare(config: DictConfig, folder: Path) -> _Training:
    """Builds all that is needed, in an order that refuses before anything large is read."""
    resolved = compose.plain(config)
    options = dict(resolved["trainer"])
    check_training(options)
    start = resume.find_checkpoint(config.ckpt_path, folder)
    marks = results.fingerprint(resolved)
    changes = results.changes(folder, resolved, marks, LAST) if start is not None else None
    if changes and is_first():
        print(f"ckpt_path: goes on with another {', '.join(changes)} than before", flush=True)
    module = _build_module(config)
    _check_precision(module.loaded.model, options)
    if start is not None:
        resume.check_weights(start, module)
    module.attach(config.logits)  # refuses here, before any data is read, what is not supported
    module.detach()
    processor = module.loaded.processor
    data = targets.build(config.data, "data", pl.LightningDataModule, processor=processor)
    data.train_dataloader()  # refuses a config without training data
    signals = StopSignals()
    own = _callbacks(config, folder, signals, validates=data.validation is not None)
    given = [
        targets.build(callback, "trainer.callbacks", pl.Callback)
        for callback in options.pop("callbacks", None) or []
    ]
    if 0 < (options.get("max_steps") or 0) < (options.get("log_every_n_steps") or 0):
        options["log_every_n_steps"] = options["max_steps"]  # the curve has its end at least
    if data.validation is None:
        options["limit_val_batches"] = 0
    logger = build_logger(config.get("logger"))
    known = results.commit_of(data) | marks
    notes = _Begin(folder, resolved, known, anew=start is None)
    trainer = build_trainer(
        options,
        callbacks=[*given, notes, RandomStates(config.seed), *own],
        logger=logger,
        enable_model_summary=False,
    )
    return _Training(config, folder, start, module, data, trainer, signals, notes)


def _fit(training: _Training) -> None:
    """Trains to the end.

    Raises:
        Stopped: A signal came.
    """
    trainer, signals, start = training.trainer, training.signals, training.start
    signals.tell(trainer)
    if start is not None:
        resume.check_strategy(start, trainer.strategy)
    if is_first():
        resume.cut_curves(trainer, start)
    if trainer.world_size > 1 and is_alone():
        begin(trainer.loggers)
    module, data = training.module, training.data
    with quiet():
        try:
            with signals:
                trainer.fit(module, datamodule=data, ckpt_path=start, weights_only=True)
        except Exception as error:
            if signum := signals.cause(error):
                raise Stopped(signum) from error
            raise
    if signals.received:  # as training ended by itself
        raise Stopped(signals.received)


def _gather(training: _Training) -> None:
    """Has whole weights in this process, where the launcher's processes still hold shards."""
    strategy = training.trainer.strategy
    if not isinstance(strategy, Sharded) or is_alone():
        return
    # A plain module takes their place.
    before, whole = training.module, strategy.whole_weights(list(training.trained))
    training.module = _build_module(training.config)
    training.module.load_state_dict(whole, strict=False)
    training.module.num_unsupervised = before.num_unsupervised


def _save(training: _Training) -> None:
    """Saves the weights that were asked for: all this before anything else can go wrong."""
    module, folder = training.module, training.folder
    writes = training.trainer.is_global_zero
    if training.config.keep == "best" and (folder / BEST).is_file():  # else none was validated
        best = torch.load(folder / BEST, map_location="cpu", weights_only=True)
        module.load_state_dict(best["state_dict"], strict=False)
    if writes and module.adapters is not None:
        with files.draft(folder / "adapter") as place:
            module.adapters.save(place)
    module.merge()
    if writes:
        model: Any = module.loaded.model
        model.eval()
        with files.draft(folder / "model") as place:
            model.save_pretrained(place)
            module.loaded.processor.save_pretrained(place)


def _last_numbers(training: _Training, loggers: Sequence[Any]) -> dict[str, float]:
    """What a training came to, with a validation of the weights that were saved."""
    module, trainer = training.module, training.trainer
    numbers = {name: float(value) for name, value in trainer.callback_metrics.items()}
    if training.data.validation is not None:
        trainer.loggers = []
        with quiet():
            found = trainer.validate(module, datamodule=training.data, verbose=False)
        # None where trainer.limit_val_batches=0.
        last = {name: float(value) for own in found for name, value in own.items()}
        # A curve ends with a validation of the last step.
        keeps_last = training.config.keep == "last"
        ends = keeps_last and numbers.get("step") != numbers.get("validated_step")
        for logger in loggers if ends and last else []:
            logger.log_metrics(last, step=int(numbers["step"]))
            logger.save()
        numbers |= last
    numbers.setdefault("unsupervised_batches", float(module.num_unsupervised))
    numbers.setdefault("step", trainer.global_step)  # logged by the last step, where one ran
    return numbers


def _flat(summary: Mapping[str, Any]) -> dict[str, Any]:
    """The summary in one row."""
    row = {name: value for name, value in summary.items() if name != "validation"}
    for name, value in summary["validation"].items():
        row |= {f"validation_{name}": value} if name != "kinds" else {}
    return row


def _build_module(config: DictConfig) -> FineTune:
    """Model and pruning as the config has them, to be trained."""
    resolved = compose.plain(config)
    # Not from the evaluation's memory: this model changes.
    recipe = dict(resolved["model"])
    tuning, lora = recipe.pop("tuning"), recipe.pop("lora")
    loaded = targets.build(recipe, "model", LoadedModel)
    pruning = compose.fit_pruning(config, loaded.model)
    torch.manual_seed(config.seed)  # adapters start at random
    return FineTune(
        loaded,
        pruning,
        tuning=tuning,
        parts=resolved["parts"],
        lora=Lora(**lora),
        learning_rate=config.learning_rate,
        learning_rates=resolved["learning_rates"],
        weight_decay=config.weight_decay,
        warmup=config.warmup,
        schedule_warmup=config.schedule_warmup,
        gradient_checkpointing=config.gradient_checkpointing,
        logits=config.logits,
    )


def _check_precision(model: Any, options: Mapping[str, Any]) -> None:
    """Weights in half precision are frozen ones under adapters in float32: casts are needed."""
    precision = options.get("precision")
    if model.dtype in (torch.float16, torch.bfloat16) and "mixed" not in str(precision):
        name = str(model.dtype).removeprefix("torch.")
        mixed = "16-mixed" if model.dtype == torch.float16 else "bf16-mixed"
        raise ValueError(
            f"model.dtype: expected float32 for training, got {name} with "
            f"trainer.precision={'null' if precision is None else precision}. "
            f"Set model.dtype=float32, or model.tuning=lora and trainer.precision={mixed}."
        )


class _Begin(pl.Callback):
    """Notes what is trained once there is something to train: not when a checkpoint has it all.

    A training that starts anew takes the place of what was in its folder.
    """

    def __init__(
        self, folder: Path, config: Mapping[str, Any], marks: Mapping[str, str], anew: bool
    ) -> None:
        self.folder, self.config, self.marks, self.anew = folder, config, marks, anew
        self.begun = False

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        targets.load_imports(self.config)  # in each process
        if stage == "fit":
            log_config(trainer, self.config)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self.begun:
            return
        self.begun = True
        if trainer.is_global_zero:
            for name in (SUMMARY, LAST, BEST) if self.anew else (SUMMARY,):
                path = self.folder / name
                # A folder that is no checkpoint of shards is somebody's: an error.
                files.remove(path) if (path / META).is_file() else path.unlink(missing_ok=True)
            source = Path(str(self.config["model"].get("path"))).expanduser()
            for name, mark in _MADE.items() if self.anew else ():
                made = self.folder / name
                if (made / mark).is_file() and made.resolve() != source.resolve():
                    files.remove(made)
            text = OmegaConf.to_yaml(OmegaConf.create(dict(self.config)))
            results.write_text(self.folder / results.CONFIG, text)
            results.write_versions(self.folder, self.marks)


def _callbacks(
    config: DictConfig, folder: Path, signals: StopSignals, validates: bool
) -> list[pl.Callback]:
    """Checkpoints, the throughput, and an early end."""
    every, patience = config.checkpoint_every, config.patience
    check_saving(every, config.monitor, config.keep, patience)
    if not validates and (patience is not None or config.keep == "best"):
        key = "keep=best" if config.keep == "best" else f"patience={patience}"
        raise ValueError(
            f"data: expected validation data with {key}, got none. Set data.validation_path "
            "(folder) or data.validation_split (hub), or choose data=scenes."
        )
    callbacks: list[pl.Callback] = []
    mode = MONITORS[config.monitor]
    if patience is not None:
        callbacks.append(
            EarlyStopping(
                config.monitor, patience=patience, mode=mode, check_on_train_epoch_end=False
            )
        )
    if config.get("logger"):
        # Rates from one row to the next; Lightning gives none until its window is full.
        window = max(2, config.trainer.get("log_every_n_steps") or 2)
        callbacks.append(Throughput(size, length, window_size=window))
    # After what may end the training.
    return [*callbacks, Checkpoints(folder, every, signals, config.monitor, mode)]
