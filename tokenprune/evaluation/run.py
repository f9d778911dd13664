"""Evaluation of a pruned model: greedy answers, how many are right, and what they cost."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from tokenprune.evaluation import loading
from tokenprune.evaluation.evaluator import Evaluator
from tokenprune.evaluation.generation import pruned
from tokenprune.evaluation.shares import Notes, Share
from tokenprune.runs import compose, results
from tokenprune.runs.compose import Pruning
from tokenprune.runs.devices import check_evaluation, parse_shard
from tokenprune.runs.launchers import is_alone, is_first
from tokenprune.runs.loggers import begin, build_logger, close, log_results
from tokenprune.runs.trainers import build_trainer, quiet

# Lightning's advice on what is meant to be so.
_HARMLESS = (".*predict returned None",)


def _leave_signals() -> None:
    """Registers no handlers: a signal ends the process."""


def evaluate(
    config: DictConfig,
    folder: Path,
    names: Mapping[str, str],
    draw: Callable[[Path], Mapping[str, Any]] | None = None,
) -> dict[str, Any] | None:
    """Runs one evaluation and writes its files, unless they are there already.

    Args:
        config: As `configs/eval.yaml` composes it.
        folder: The run's folder.
        names: What to call `strategy`, `schedule`, `model` and `data` in the metrics.
        draw: Gives pictures of the run's folder by their names, for loggers that show them.

    Returns:
        The metrics, as in metrics.json; None where other shards are still to come.

    Raises:
        ValueError: If something in the config cannot be honoured.
    """
    resolved = compose.plain(config)
    marks = results.fingerprint(resolved)
    if results.changes(folder, resolved, marks) == []:
        return results.read_metrics(folder)
    check_evaluation(resolved["trainer"])
    shard = parse_shard(config.get("shard"))
    logger = build_logger(config.get("logger"))
    trainer: Any = build_trainer(
        config.trainer,
        logger=logger,
        enable_checkpointing=False,
        enable_model_summary=False,
        use_distributed_sampler=False,  # a share is taken by `Share`
    )
    check_shard(shard, trainer.world_size)
    # Lightning's own handlers note a SIGTERM, and act on it in training only.
    trainer._signal_connector.register_signal_handlers = _leave_signals
    loaded = loading.load_model(config, marks)
    pruning = compose.fit_pruning(config, loaded.model)
    with pruned(loaded, pruning):
        pass  # refuses here, before any data is read, what the model does not support
    model, data = (loading.key_of(config[part], marks) for part in ("model", "data"))
    whole = loading.cached_data(data, model)
    versions = results.commit_of(whole) | marks
    alone = trainer.world_size == 1 and shard is None
    batches = loading.cached_batches(data, model) if alone else None
    # What decides about answers to come, but not about a run that is complete.
    beside = results.own_code(resolved)
    if shard is None:
        beside["accelerator"] = type(trainer.accelerator).__name__
    share = Share(whole, Notes.of(folder, resolved, versions | beside), shard, batches)
    if trainer.world_size > 1 and is_alone():
        del loaded  # the processes have their own
        loading.cached_model.cache_clear()
    evaluator = Evaluator(
        load=partial(loading.cached_model, model),
        share=share,
        pruning=pruning,
        folder=folder,
        config=resolved | {"shard": None},
        marks=versions,
        names=run_names(config, names, pruning) | {"metric": config.metric},
        max_new_tokens=config.max_new_tokens,
        num_pictures=config.num_pictures,
        metric=config.metric,
        patience=config.get("shard_timeout", 1800.0),
        num_graphs=config.get("graphs", 0),
    )
    own = trainer.world_size > 1 and is_alone()  # processes of its own wrote the files
    try:
        begin(trainer.loggers if own else [])
        with quiet(_HARMLESS):
            trainer.predict(evaluator, datamodule=share, return_predictions=False)
        if trainer.loggers and (own or evaluator.wrote):
            row = results.row(results.read_metrics(folder), folder.name)
            log_results(trainer.loggers, row, draw(folder) if draw is not None else {})
    finally:
        close(trainer.loggers)
    if not is_first() or results.changes(folder, resolved, marks) != []:
        return None  # others are still to come
    return results.read_metrics(folder)


def check_shard(shard: tuple[int, int] | None, processes: int) -> None:
    """Refuses a shard that several processes would share.

    Raises:
        ValueError: They would.
    """
    if shard is not None and processes > 1:
        raise ValueError(
            f"shard: expected one process for each shard, got {processes}. Leave shard out: "
            "processes of one command share the samples by themselves."
        )


def run_names(
    config: DictConfig, names: Mapping[str, str], pruning: Pruning | None
) -> dict[str, Any]:
    """Entries of metrics.json that name the run."""
    stages = pruning.schedule.stages if pruning is not None else None
    schedule = dict(config.schedule) if pruning is not None else {}
    if pruning is not None and pruning.solution is not None:  # a budget asked for another value
        schedule |= dict([pruning.solution.solved])
    scale = OmegaConf.select(config, "data.image_scale") or 1.0  # another's data need not have it
    return {
        "strategy": results.DOWNSAMPLE if pruning is None and scale < 1 else names["strategy"],
        "schedule": names["schedule"] if pruning is not None else None,
        "lam": schedule.get("lam"),
        "num_stages": None if stages is None else len(stages) + 1,
        "layers": None if stages is None else [stage.layer for stage in stages],
        "keeps": None if stages is None else [stage.keep for stage in stages],
        "image_scale": scale,
        "positions": pruning.positions if pruning is not None else "original",
        # A strategy's own seed counts, whether it was set or follows the run's.
        "seed": config.seed
        if config.strategy is None or OmegaConf.is_list(config.strategy)
        else config.strategy.get("seed", config.seed),
        "model": names["model"],
        "data": names["data"],
    }
