"""Benchmarks by lmms-eval: its tasks ask and judge, a run's folder is as that of any evaluation."""

from __future__ import annotations

import contextlib
import json
import math
import statistics
from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from tokenprune.evaluation.generation import pruned
from tokenprune.evaluation.loading import device_of, load_model
from tokenprune.evaluation.run import run_names
from tokenprune.evaluation.scores import interval, likeliest, question_score, said, task_score
from tokenprune.evaluation.shares import Notes
from tokenprune.evaluation.summary import cost_of, kv_megabytes
from tokenprune.runs import compose, results
from tokenprune.runs.devices import default_device
from tokenprune.runs.images import num_images

PACKAGE = "lmms-eval"
#: What lmms-eval itself reports, in a run's folder; files that tasks write lie beside it.
REPORT = "harness/results.json"
#: Tasks that lmms-eval lacks.
TASKS = Path(__file__).parent / "tasks"
#: Options of lmms-eval's command that it, or one of its tasks, reads.
_READ = {"model": "tokenprune", "process_with_media": False, "log_samples_suffix": ""}
#: What does not change the answer to a question: a run goes on with others of these.
_FREE = ("tasks", "include_path", "limit", "batch_size")
#: Tasks that fail if one of two questions about an image was not asked.
_PAIRED = ("mme",)


def benchmark(config: DictConfig, folder: Path, names: Mapping[str, str]) -> dict[str, Any] | None:
    """Runs tasks of lmms-eval on a pruned model and writes the run's files, unless they are there.

    Answers are noted as they come (see `shares.NOTES`), and what is noted is not asked again.

    Args:
        config: As `configs/benchmark.yaml` composes it.
        folder: The run's folder.
        names: What to call `strategy`, `schedule`, `model` and `data` in the metrics.

    Returns:
        The metrics, as in metrics.json: `accuracy` is the mean of the tasks' own values, each a
        share of the best; every task is a kind. None if no task's value is such a share: then what
        lmms-eval reports is all that is written.

    Raises:
        ValueError: Something in the config cannot be honoured.
    """
    resolved = compose.plain(config)
    marks = fingerprint(resolved)
    if results.changes(folder, resolved, marks) == []:
        return results.read_metrics(folder)
    tasks = find_tasks(resolved)
    from tokenprune.evaluation.harness import ChatHarness, Harness, NotPruned

    loaded = load_model(config, marks)
    pruning = compose.fit_pruning(config, loaded.model)
    with pruned(loaded, pruning):
        pass  # refuses here, before any data is read, what the model does not support
    device = config.device or default_device()
    own = {key: value for key, value in resolved.items() if key not in _FREE} | {"device": device}
    files = {key: mark for key, mark in marks.items() if key not in _FREE}
    notes = Notes.of(folder, own, files | results.own_code(resolved))
    kind = Harness if config.form == "simple" else ChatHarness
    model = kind(
        loaded,
        pruning,
        config.batch_size,
        device,
        config.num_pictures,
        config.data.image_scale,
        notes,
        warn=print,
    )
    place = folder / Path(REPORT).parent
    try:
        report = _ask(resolved, tasks, model, place)
        results.write_text(
            folder / REPORT, json.dumps(_plain(report), indent=2, ensure_ascii=False)
        )
        metrics, predictions, kept, images = _gather(report, model)
    except NotPruned:
        notes.forget()
        raise
    on = {"device": device_of(loaded.model)}
    names = run_names(config, names, pruning) | {"metric": PACKAGE} | on
    if not metrics["kinds"]:
        return None
    results.write_run(folder, resolved, names | metrics, predictions, kept, images, marks | on)
    notes.forget()
    return results.read_metrics(folder)


def fingerprint(config: Mapping[str, Any]) -> dict[str, str]:
    """What decides about a run besides its config; tasks are part of lmms-eval."""
    marks = results.fingerprint(config) | {PACKAGE: metadata.version(PACKAGE)}
    if config["include_path"] is not None:
        marks["include_path"] = results.digest(Path(config["include_path"]).expanduser())
    return marks


def find_tasks(config: Mapping[str, Any]) -> Any:
    """lmms-eval's manager of tasks, which knows all that are asked for.

    Raises:
        ValueError: One of them is unknown, has no metric, or cannot be asked so few questions.
    """
    own = [] if config["include_path"] is None else [Path(config["include_path"]).expanduser()]
    folders = [str(folder.resolve()) for folder in (*own, TASKS)]
    with _quiet():
        manager: Any = import_module("lmms_eval.tasks").TaskManager("ERROR", include_path=folders)
    known = set(manager.all_tasks)
    for task in config["tasks"]:
        if task not in known:
            near = sorted(name for name in known if task.split("_")[0] in name)[:8]
            hint = f" Near: {', '.join(near)}." if near else ""
            raise ValueError(
                f"tasks: expected tasks of lmms-eval, got {task!r}.{hint} `lmms-eval tasks list` "
                "has all; include_path=FOLDER adds yours."
            )
        for part in _parts(manager, task):
            _check_task(manager, part, config["limit"])
    return manager


def _parts(manager: Any, task: Any) -> list[str]:
    """Names of the tasks in a group, or under a tag, of lmms-eval's; a task's own."""
    if isinstance(task, list):
        return [name for part in task for name in _parts(manager, part)]
    if isinstance(task, Mapping):
        return _parts(manager, task.get("task", []))
    entry = manager.task_index.get(task, {"type": "python_task"})
    if entry["type"] == "python_task":
        return []  # a class of Python: what it measures is seen when it has run
    if entry["type"] == "task":
        return [task]
    listed = entry["task"]
    return _parts(manager, _written(manager, task)["task"] if listed == -1 else listed)


def _written(manager: Any, task: str) -> Any:
    """A task's file, with what it includes, functions left out."""
    path = manager.task_index[task]["yaml_path"]
    return import_module("lmms_eval.utils").load_yaml_config(path, mode="simple")


def _check_task(manager: Any, task: str, limit: int | None) -> None:
    """Refuses before any question what would fail when all are answered."""
    if not metrics_of(_written(manager, task)):
        own = [
            name
            for name, entry in manager.task_index.items()
            if entry["type"] == "task" and name.split("_")[0] == task.split("_")[0]
        ]
        near = sorted(name for name in own if metrics_of(_written(manager, name)))[:8]
        hint = f" Near: {', '.join(near)}." if near else ""
        raise ValueError(
            f"tasks: expected tasks that judge answers, got {task!r}, which writes them to a file "
            f"for others to judge.{hint}"
        )
    if task in _PAIRED and limit is not None and limit % 2:
        raise ValueError(
            f"limit: expected an even number for {task!r}, whose questions are judged in pairs, "
            f"got {limit}. Set limit={limit + 1}."
        )


def metrics_of(task: Mapping[str, Any]) -> dict[str, bool]:
    """A task's metrics in the order in which it lists them; whether they are means over questions.

    Args:
        task: Its config.
    """
    import_module("lmms_eval.api.metrics")  # registers its own
    known: Any = import_module("lmms_eval.api.registry")
    usual = known.DEFAULT_METRIC_REGISTRY.get(task.get("output_type"), [])
    found: dict[str, bool] = {}
    listed = task.get("metric_list") or [{"metric": name} for name in usual]
    for entry in filter(None, listed):  # one task of lmms-eval's has an empty entry
        name = str(entry["metric"])
        if "submission" not in name:  # files for servers
            how = entry.get("aggregation") or known.METRIC_AGGREGATION_REGISTRY.get(name)
            found[name] = how in ("mean", known.AGGREGATION_REGISTRY["mean"])
    return found


def _ask(config: Mapping[str, Any], manager: Any, model: Any, place: Path) -> dict[str, Any]:
    """lmms-eval's report; its tasks write their own files below `place`."""
    place.mkdir(parents=True, exist_ok=True)
    with _quiet(), contextlib.chdir(place):
        found = import_module("lmms_eval.evaluator").simple_evaluate(
            model,
            tasks=list(config["tasks"]),
            batch_size=config["batch_size"],
            limit=config["limit"],
            task_manager=manager,
            bootstrap_iters=0,
            log_samples=True,
            cli_args=Namespace(output_path=str(place.resolve()), **_READ),
            random_seed=config["seed"],
            numpy_random_seed=config["seed"],
            torch_random_seed=config["seed"],
        )
    assert isinstance(found, dict)
    return found


def _gather(
    report: Mapping[str, Any], model: Any
) -> tuple[dict[str, Any], list[dict[str, Any]], list[dict[str, Any]], dict[str, Any]]:
    """Metrics, predictions, kept tokens and pictures of a run."""
    records: list[dict[str, Any]] = []
    predictions: list[dict[str, Any]] = []
    kinds: dict[str, dict[str, Any]] = {}
    kept: list[dict[str, Any]] = []
    images: dict[str, Any] = {}
    for task, samples in report["samples"].items():
        listed = metrics_of(report["configs"][task])
        name, share = task_score(task, report["results"][task], list(listed))
        scores, marks = [], []
        for sample in samples:
            record = model.records[task, sample["doc_id"]]
            records.append(record)
            ranked = record.get("ranked")
            answer = said(sample) if ranked is None else likeliest(ranked)
            scores.append(question_score(sample, name, answer))
            marks.append(record["picture"])
            told = {
                "id": f"{task}/{sample['doc_id']}",
                "kind": task,
                "question": record["question"],
                "answer": _text(sample["target"]),
                "prediction": answer,
            }
            judged = {"score": scores[-1], "correct": scores[-1] >= 0.5, "picture": marks[-1]}
            predictions.append(told | judged)
            if "kept" in record:
                picture = results.image_name(len(kept), told["id"])
                images[picture] = record["image"]
                kept.append(told | {"image": picture} | record["kept"])
        if share is None:
            print(f"{task}: {name} is no share of the best, and is left out of the mean")
            continue
        low, high = interval(scores, share, listed.get(name, False), marks)
        kinds[task] = {"accuracy": share, "low": low, "high": high, "num_samples": len(samples)}
        kinds[task]["metric"] = name
    shares = [kind["accuracy"] for kind in kinds.values()]
    low, high = (_mean_end(kinds, end) for end in ("low", "high"))
    own = {
        "num_samples": len(records),
        "num_images": num_images([record["picture"] for record in records]),
        "accuracy": statistics.fmean(shares) if shares else None,
        "accuracy_low": low,
        "accuracy_high": high,
        "kinds": kinds,
        **cost_of(records, model.shape),
        "prefill_ms": 1000 * statistics.median(model.times) if model.times else None,
        "kv_mb": kv_megabytes(records, model.shape, model.loaded.model.dtype.itemsize),
    }
    return own, predictions, kept, images


def _mean_end(kinds: Mapping[str, Mapping[str, Any]], end: str) -> float | None:
    """An end of the interval of the mean over tasks, which are independent of one another."""
    ends = [kind[end] for kind in kinds.values()]
    if not ends or None in ends:
        return None
    shares = [kind["accuracy"] for kind in kinds.values()]
    mean = statistics.fmean(shares)
    half = math.dist(ends, shares) / len(shares)
    return mean - half if end == "low" else mean + half


def _text(target: Any) -> str:
    return (
        target if isinstance(target, str) else json.dumps(target, ensure_ascii=False, default=str)
    )


def _plain(report: Mapping[str, Any]) -> dict[str, Any]:
    """What lmms-eval reports, without samples and in types that JSON has."""
    left_out = ("samples", "config")
    kept = {key: value for key, value in report.items() if key not in left_out}
    found = json.loads(json.dumps(kept, default=str))
    assert isinstance(found, dict)
    return found


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what lmms-eval tells on the way."""
    logger: Any = import_module("loguru").logger
    logger.disable("lmms_eval")
    logger.disable("tokenprune")
    try:
        yield
    finally:
        logger.enable("lmms_eval")
        logger.enable("tokenprune")


def names_of_tasks(tasks: Sequence[str]) -> str:
    """What results call the data of a run."""
    return ",".join(tasks)
