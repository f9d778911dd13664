"""The `tokenprune` command.

A run is composed and checked first, so that a mistake costs one line and no folder; only then does
Hydra start it. Exit codes: 0, done; 1, a check failed or we have a bug; 2, bad input.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import logging
import os
import re
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra._internal.utils import _run_hydra, get_args_parser
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from tokenprune.runs.compose import build_pruning, config_dir, describe, fit_pruning
from tokenprune.runs.sweeps import expand, run_name, sweep_name

GROUPS = ("model", "data", "strategy", "schedule", "trainer", "logger", "experiment")
BENCH_GROUPS = ("shape", "strategy", "schedule")
USAGE = """\
tokenprune: visual token pruning for vision-language models

  tokenprune eval [overrides]                      evaluate a model with its visual tokens pruned
  tokenprune eval -m experiment=ablation           sweep: one run after another, and a table
  tokenprune report FOLDER                         a sweep as a page: report.html
  tokenprune show IMAGE "QUESTION" [overrides]     one image, with and without pruning
  tokenprune verify [overrides]                    is pruning exact on this checkpoint?
  tokenprune flops [overrides]                     what a schedule costs; a budget's schedule
  tokenprune train [overrides]                     train a model, pruned or not
  tokenprune bench prefill|decode|train            what pruning saves, measured on random weights
  tokenprune list                                  strategies, models and all other choices

Overrides choose (strategy=fastv, model=tiny) or set (schedule.lam=0.3). `tokenprune COMMAND --help`
says more. Exit codes: 0 done, 1 a check failed, 2 bad input."""


class BadInput(Exception):
    """Something the user can put right; the message is one line."""


class _Parser(argparse.ArgumentParser):
    """An argument parser whose complaints take one line."""

    def error(self, message: str) -> NoReturn:
        # Everything that may be left out is called overrides.
        message = message.replace(", overrides", "")
        command = self.prog.removeprefix("tokenprune ")
        raise BadInput(f"{command}: {message}. See {self.prog} --help.")


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the console script; returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(USAGE)
        return 0 if arguments else 2
    command, rest = arguments[0], arguments[1:]
    try:
        if command == "--version":
            from tokenprune import __version__

            print(__version__)
            return 0
        if command not in COMMANDS:
            raise BadInput(_unknown("command", command, list(COMMANDS)))
        return COMMANDS[command](rest)
    except SystemExit as stop:  # argparse and Hydra stop so
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except KeyboardInterrupt:
        print("tokenprune: stopped", file=sys.stderr)
        return 130
    except Exception as error:
        message = explain(error)
        if isinstance(error, BrokenPipeError):  # `tokenprune list | head`
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 0
        if message is None or os.environ.get("HYDRA_FULL_ERROR"):
            raise
        print(f"tokenprune: {message}", file=sys.stderr)
        return 2


# ------------------------------------------------------------------------------- eval and train


def _run(command: str, arguments: list[str], task: Callable[[DictConfig], Any]) -> int:
    parser = get_args_parser()
    parser.prog = f"tokenprune {command}"
    parser.error = lambda message: _Parser.error(parser, message)  # type: ignore
    args = parser.parse_intermixed_args(arguments)
    if args.cfg and args.multirun:
        raise BadInput("--cfg: expected a single run, got -m as well. Leave one of them out.")
    if args.resolve and not args.cfg:
        raise BadInput("--resolve: expected --cfg beside it, got none. Add --cfg job.")
    if args.config_dir is not None:
        _check_folder(args.config_dir)
    if args.help:
        return _help(command, args)
    if args.hydra_help or args.info or args.shell_completion:
        pass
    elif args.cfg:
        compose(command, args.overrides, args.config_dir)
    else:
        _check_jobs(command, args)
    try:
        _run_hydra(
            args=args,
            args_parser=parser,
            task_function=task,
            config_path=str(config_dir()),
            config_name=command,
        )
    finally:
        GlobalHydra.instance().clear()
    return 0


EXAMPLES = """\
tokenprune eval strategy=fastv                         FastV as published, on the shipped model
tokenprune eval strategy=fastv schedule=pyramid        FastV's choice on PyramidDrop's schedule
tokenprune eval -m strategy=fastv,pyramiddrop schedule=pyramid schedule.lam=0.3,0.5
tokenprune eval -m experiment=ablation                 the ablation: outputs/ablation/results.csv
tokenprune eval model=llava_1_5_7b trainer=gpu data=folder data.path=my/questions.jsonl
tokenprune eval model=hub model.path=/my/checkpoint    any model that transformers loads
tokenprune train strategy=pyramiddrop data=folder data.train_path=my/train.jsonl
tokenprune bench prefill shape=llava_1_5_7b resolution=336x336
tokenprune bench -m measure=prefill,decode batch_size=1,8 resolution=336x336,672x672

--cfg job prints the config and stops; -m sweeps over comma-separated values;
`tokenprune list` describes every choice; --hydra-help has Hydra's own options."""


def _help(command: str, args: Any) -> int:
    """Choices, keys with their comments, examples."""
    from tokenprune.cli.guide import config_lines

    config = compose(command, args.overrides, args.config_dir)
    print("Override anything below: `group=choice` picks a file, `key=value` sets a value.\n")
    print("== Choices (group=choice) ==")
    for group in BENCH_GROUPS if command == "bench" else GROUPS:
        choices = sorted(path.stem for path in (config_dir() / group).glob("*.yaml"))
        print(f"{group}: {', '.join(choices)}")
    print("\n== Config (key=value) ==")
    print("\n".join(config_lines(config)))
    print(f"\n== Examples ==\n{EXAMPLES}")
    return 0


def _eval_task(config: DictConfig) -> float:
    """Evaluates; returns the accuracy, for sweepers that search."""
    folder = Path(HydraConfig.get().runtime.output_dir)
    with _tidy(folder), _quiet():
        from tokenprune.evaluation.run import evaluate
        from tokenprune.runs import compose as recipes
        from tokenprune.runs import results

        resolved = recipes.plain(config)
        changes = results.changes(folder, resolved, results.fingerprint(resolved))
        metrics = evaluate(config, folder, names(resolved))
        if HydraConfig.get().mode == RunMode.MULTIRUN:
            number = HydraConfig.get().job.num
            state = "complete already" if changes == [] else f"{metrics['accuracy']:.3f}"
            state += f", again: {', '.join(changes)} changed" if changes else ""
            print(f"[{number}] {folder.name}: {state}", flush=True)
        else:
            results.print_table([results.row(metrics, folder.name)], str(folder))
    return float(metrics["accuracy"])


def _train_task(config: DictConfig) -> None:
    folder = Path(HydraConfig.get().runtime.output_dir)
    with _tidy(folder), _quiet():
        from tokenprune.runs import compose as recipes
        from tokenprune.runs import results
        from tokenprune.training import SUMMARY, train
        from tokenprune.training.checkpoints import LAST, Stopped

        if HydraConfig.get().mode == RunMode.MULTIRUN:
            resolved = recipes.plain(config)
            marks = results.fingerprint(resolved)
            label = f"[{HydraConfig.get().job.num}] {folder.name}"
            changes = results.changes(folder, resolved, marks, SUMMARY)
            if changes == []:
                print(f"{label}: complete already", flush=True)
                return
            if changes:
                print(f"{label}: again, {', '.join(changes)} changed", flush=True)
            elif results.changes(folder, resolved, marks, LAST) == []:
                print(f"{label}: goes on from its checkpoint", flush=True)
                config.ckpt_path = "last"
            elif config.ckpt_path == "last":  # of a sweep that had not come so far
                config.ckpt_path = None
        try:
            train(config, folder)
        except Stopped as stop:
            again = f"the same command with ckpt_path=last hydra.run.dir={folder}"
            if HydraConfig.get().mode == RunMode.MULTIRUN:
                again = "the same command once more"
            hint = f" To go on: {again}" if (folder / LAST).is_file() else ""
            print(f"tokenprune: training was stopped {stop}.{hint}", file=sys.stderr)
            raise SystemExit(128 + stop.signum) from None


def _bench_task(config: DictConfig) -> float:
    """Measures; returns the pruned model's share of the unpruned one's time."""
    folder = Path(HydraConfig.get().runtime.output_dir)
    sweeps = HydraConfig.get().mode == RunMode.MULTIRUN
    with _tidy(folder):
        from tokenprune.bench import table
        from tokenprune.bench.run import run

        called = names(OmegaConf.to_container(config, resolve=True))  # type: ignore[arg-type]
        shape = OmegaConf.select(config, "shape.path")
        shape = shape or str(HydraConfig.get().runtime.choices.get("shape"))
        told = {"strategy": called["strategy"], "schedule": called["schedule"], "shape": shape}
        row = run(config, folder, told, again=not sweeps)
    home = folder.parent if sweeps else folder
    rows = table.publish(home)
    table.print_table([row] if sweeps else rows, str(folder if sweeps else home / table.TABLE))
    return float(row.get("time_ratio", "nan"))


def names(config: Mapping[str, Any]) -> dict[str, str]:
    """What the metrics call a run's strategy, schedule, model and data.

    Their choices, a strategy's changed fields, and paths instead of `hub` and `folder`.

    Args:
        config: The resolved config.
    """
    hydra = HydraConfig.get()
    choices = hydra.runtime.choices
    changed = [
        override.removeprefix("strategy.")
        for override in hydra.overrides.task
        if override.startswith("strategy.") and not override.startswith("strategy.seed=")
    ]
    strategy = str(choices.get("strategy"))
    named = {key: str(choices.get(key)) for key in ("schedule", "model", "data")}
    for group in ("model", "data"):
        given = any(override.startswith(f"{group}.path=") for override in hydra.overrides.task)
        if given or (named[group] in ("hub", "folder") and config[group].get("path")):
            named[group] = str(config[group]["path"])
    return named | {"strategy": f"{strategy}({', '.join(changed)})" if changed else strategy}


@contextlib.contextmanager
def _tidy(folder: Path) -> Iterator[None]:
    """On an error leaves no half-written folder; tells a user's mistake in one line."""
    before = set(folder.iterdir()) if folder.is_dir() else set()
    try:
        yield
    except BaseException as error:  # an interruption, too
        _discard(folder, before)
        if isinstance(error, SystemExit) and isinstance(error.__context__, KeyboardInterrupt):
            raise KeyboardInterrupt from None  # Lightning makes exit code 1 of it
        if not isinstance(error, Exception):
            raise
        message = explain(error)
        if message is None or os.environ.get("HYDRA_FULL_ERROR"):
            raise
        print(f"tokenprune: {message}", file=sys.stderr)
        # Not an exception: Hydra would print a traceback and exit with 1.
        raise SystemExit(2) from error


def _discard(folder: Path, before: set[Path]) -> None:
    """Removes what a failed run wrote, and its folder if nothing else is in it."""
    if not folder.is_dir():
        return
    if not any(folder.glob("checkpoints/*")):  # a training can go on from those
        for path in set(folder.iterdir()) - before:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    # Hydra makes the folders before the task runs.
    while folder.is_dir() and not any(folder.iterdir()) and folder != Path.cwd():
        folder.rmdir()
        folder = folder.parent


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Lets Lightning and transformers say only what a user can act on."""
    import pytorch_lightning  # noqa: F401  # sets its loggers' levels when it is imported

    loggers = [logging.getLogger(name) for name in ("pytorch_lightning", "lightning_fabric")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.WARNING)
    if not sys.stderr.isatty():
        from transformers.utils import logging as transformers_logging

        bars: Any = transformers_logging
        bars.disable_progress_bar()  # in a log, bars are noise
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


# --------------------------------------------------------------------------- composing and checks


def compose(
    command: str, overrides: Sequence[str], extra_dir: str | None = None, hydra: bool = False
) -> DictConfig:
    """Composes a config; mistakes become `BadInput`.

    Args:
        command: Name of the primary config, `eval` or `train`.
        overrides: As on the command line.
        extra_dir: A folder with further configs (`--config-dir`).
        hydra: Keeps the `hydra` node.
    """
    overrides = list(overrides)
    if extra_dir is not None:
        if not Path(extra_dir).is_dir():
            raise BadInput(f"--config-dir: expected a folder, got {extra_dir!r}. Check the path.")
        overrides.append(f"hydra.searchpath=[file://{Path(extra_dir).resolve()}]")
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(config_dir()), version_base="1.3", job_name=command):
        try:
            config = hydra_compose(command, overrides, return_hydra_config=True)
        except (HydraException, OmegaConfBaseException) as error:
            raise BadInput(_translate(command, overrides, error)) from error
    if not hydra:
        OmegaConf.set_struct(config, False)
        del config["hydra"]
        OmegaConf.set_struct(config, True)
    return config


def _check_folder(extra_dir: str) -> None:
    """Refuses a user's configs named as those of tokenprune: Hydra would read these, silently."""
    for path in sorted(Path(extra_dir).rglob("*.yaml")):
        own = path.relative_to(extra_dir)
        if (config_dir() / own).exists():
            raise BadInput(
                f"--config-dir: expected names of their own, got {own}, which tokenprune has "
                "as well. Rename yours."
            )


def _check_jobs(command: str, args: argparse.Namespace) -> None:
    """Composes every run and builds its strategy and schedule: mistakes show before any folder."""
    # What decides whether and how to sweep; a key of the task may fit the swept choices only.
    single = _single(args.overrides)
    leading = [item for item in single if re.match(r"[+~]*(hydra|experiment)\b", item)]
    master = compose(command, leading, args.config_dir, hydra=True)
    sweeps = args.multirun or OmegaConf.select(master, "hydra.mode") == RunMode.MULTIRUN
    if not sweeps:
        _reject_sweep_values(args.overrides)
        _check(compose(command, args.overrides, args.config_dir))
        return
    target = OmegaConf.select(master, "hydra.sweeper._target_")
    if not str(target).endswith("GridSweeper"):
        return  # another sweeper finds its own values
    keys = {override.split("=")[0].lstrip("+") for override in args.overrides}
    if not keys & {"experiment", "hydra.sweep.dir"}:
        name = sweep_name([command, *args.overrides])
        args.overrides.append(f"hydra.sweep.dir=outputs/{name}")
    own = [item for item in args.overrides if not item.lstrip("+~").startswith("hydra")]
    grids: Any = OmegaConf.to_container(master.hydra.sweeper.grids)
    for config in [compose(command, job, args.config_dir) for job in expand(grids, own)]:
        _check(config)


def _single(overrides: Sequence[str]) -> list[str]:
    """The overrides without those that sweep."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    try:
        parsed = OverridesParser.create().parse_overrides(list(overrides))
    except HydraException as error:
        raise BadInput(_translate("", overrides, error)) from error
    return [
        item
        for item, override in zip(overrides, parsed, strict=True)
        if not override.is_sweep_override()
    ]


def _reject_sweep_values(overrides: Sequence[str]) -> None:
    swept = sorted(set(overrides) - set(_single(overrides)))
    if swept:
        raise BadInput(
            f"{swept[0].split('=')[0]}: expected one value, got {swept[0].split('=', 1)[1]!r}. "
            "Add -m to run them all."
        )


def _missing(config: DictConfig, prefix: str = "") -> list[str]:
    """Keys that wait for a value; unlike OmegaConf's, resolves nothing, for no run exists yet."""
    keys = []
    for key in map(str, config):
        if OmegaConf.is_missing(config, key):
            keys.append(f"{prefix}{key}")
        elif not OmegaConf.is_interpolation(config, key) and OmegaConf.is_dict(config[key]):
            keys += _missing(config[key], f"{prefix}{key}.")
    return keys


def _check(config: DictConfig) -> None:
    """What can be known of a run before its model and data are loaded."""
    missing = sorted(_missing(config))
    if missing:
        raise BadInput(f"{missing[0]}: expected a value, got none. Add {missing[0]}=... .")
    for key, lowest in (("max_new_tokens", 1), ("num_pictures", 0), ("seed", None)):
        value = config.get(key, lowest or 0)
        wrong = isinstance(value, bool) or not isinstance(value, int)
        if wrong or (lowest is not None and value < lowest):
            bound = "" if lowest is None else f" >= {lowest}"
            raise BadInput(f"{key}: expected an integer{bound}, got {value!r}. Set {key}=8.")
    if "measure" in config:
        from tokenprune.bench.check import check

        check(config)
    if OmegaConf.select(config, "model._target_") != "tokenprune.runs.models.load":
        return
    from tokenprune.cost import DecoderShape
    from tokenprune.runs.models import load_config

    model = config.model
    shape = DecoderShape.from_config(
        load_config(model.path, revision=model.revision, trust_remote_code=model.trust_remote_code)
    )
    build_pruning(config, shape.num_layers)


# ------------------------------------------------------------------------------ words for mistakes


def explain(error: BaseException) -> str | None:
    """One line for a user's mistake; None for a bug of ours."""
    chain: list[BaseException] = [error]
    while chain[-1].__cause__ is not None and isinstance(
        chain[-1], HydraException | OmegaConfBaseException
    ):
        chain.append(chain[-1].__cause__)
    cause = chain[-1]
    if isinstance(cause, BadInput):
        return str(cause)
    if isinstance(cause, HydraException | OmegaConfBaseException):
        return f"config: {_one_line(str(cause).splitlines()[0])}"
    text = str(cause.args[0]) if isinstance(cause, KeyError) and cause.args else str(cause)
    # Another process's exception arrives as text that ends with it.
    elsewhere = "DataLoader worker process" in text or type(cause).__name__.startswith("Process")
    last = text.strip().splitlines()[-1] if text.strip() else ""
    if elsewhere and last.startswith(("ValueError: ", "KeyError: ")):
        return _one_line(last.split(": ", 1)[1])
    if isinstance(cause, TypeError) and "unexpected keyword argument" in text:
        return f"config: expected a key that its target knows, got {_one_line(text)}. Remove it."
    # Our messages start "where: expected"; "not enough values to unpack (expected 2" is a bug.
    if isinstance(cause, ValueError | KeyError) and ": expected " in text and _is_ours(cause):
        return _one_line(text)
    if isinstance(cause, OSError) and cause.filename is not None:
        return f"files: expected to read and write what a run needs, got: {_one_line(text)}."
    if type(cause).__name__ == "MisconfigurationException":  # Lightning's
        return f"trainer: expected settings that fit this machine, got: {_one_line(text)}"
    if type(cause).__name__ == "ProcessExitedException":
        return f"trainer: expected all processes to end by themselves, got: {_one_line(text)}."
    if type(cause).__name__ == "OutOfMemoryError":
        return (
            f"memory: expected model and batch to fit the device, got: {_one_line(text)} "
            "Lower data.batch_size, or choose model.dtype=bfloat16 (to train, "
            "trainer.precision=bf16-mixed)."
        )
    return None


def _is_ours(error: BaseException) -> bool:
    """Whether our own code raised it, on purpose; a library's exception is nobody's message."""
    frame = error.__traceback__
    while frame is not None and frame.tb_next is not None:
        frame = frame.tb_next
    if frame is None:
        return False
    # By the whole path: a checkout, and the .venv in it, may be in a folder called tokenprune.
    source = Path(frame.tb_frame.f_code.co_filename)
    return source.is_relative_to(Path(__file__).parents[1])


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _unknown(what: str, name: str, choices: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, choices, n=1, cutoff=0.0)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return f"{what}: expected one of {list(choices)}, got {name!r}.{hint}"


def _translate(command: str, overrides: Sequence[str], error: Exception) -> str:
    """Hydra's several lines in one of ours."""
    text = str(error)
    group = re.search(r"Could not find '([\w./-]+?)/([^/']+)'", text)
    if group:
        folder = config_dir() / group[1]
        choices = sorted(path.stem for path in folder.glob("*.yaml"))
        choices = re.findall(r"^\t(\S+)$", text, re.MULTILINE) or choices
        return _unknown(group[1], group[2], choices)
    key = re.search(r"Could not override '([^']+)'|Key '([^']+)' is not in struct", text)
    if key or "No match in the defaults list" in text:
        name = (key[1] or key[2]) if key else text.split("'")[1]
        given = next((o for o in overrides if o.lstrip("+~").split("=")[0] == name), f"{name}=")
        known = _known_keys(command, [o for o in overrides if o != given])
        near = difflib.get_close_matches(name, known, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        return f"{name}: expected a key of the config, got {given!r}.{hint}"
    if "Ambiguous value" in text:
        given = text.split("'")[1]
        return (
            f"{given.split('=')[0]}: expected one value, got {given.split('=', 1)[-1]!r}. "
            "Add -m to run them all."
        )
    broken = [o for o in overrides if "=" not in o and not o.startswith("~")]
    if broken:
        return f"override: expected key=value, got {broken[0]!r}. See tokenprune --help."
    return f"config: {_one_line(text.splitlines()[0])}"


def _known_keys(command: str, overrides: Sequence[str]) -> list[str]:
    """Keys and groups that an override can name."""
    try:
        config = compose(command or "eval", overrides)
    except BadInput:
        config = compose(command or "eval", [])
    keys = list(GROUPS)

    def walk(node: Any, prefix: str) -> None:
        for key in node:
            keys.append(f"{prefix}{key}")
            child = node._get_node(key)
            if isinstance(child, DictConfig) and not child._is_none():
                walk(child, f"{prefix}{key}.")

    walk(config, "")
    return keys


# ------------------------------------------------------------------------------- other commands


def _eval(arguments: list[str]) -> int:
    return _run("eval", arguments, _eval_task)


def _train(arguments: list[str]) -> int:
    return _run("train", arguments, _train_task)


def _bench(arguments: list[str]) -> int:
    from tokenprune.bench.check import MEASURES

    given = [f"measure={word}" if word in MEASURES else word for word in arguments]
    return _run("bench", given, _bench_task)


def _report(arguments: list[str]) -> int:
    parser = _Parser("tokenprune report", description="A sweep as a page.")
    parser.add_argument("folder", type=Path, help="a sweep's folder, such as outputs/ablation")
    folder = parser.parse_args(arguments).folder
    from tokenprune.report import page as report

    print(report.build(folder))
    return 0


def _list(arguments: list[str]) -> int:
    parser = _Parser("tokenprune list", description="Every choice, in a line.")
    parser.parse_args(arguments)
    from tokenprune.strategy import available, strategy_class

    for group in (*GROUPS, "shape"):
        lines = {
            path.stem: describe(path) for path in sorted((config_dir() / group).glob("*.yaml"))
        }
        if group == "strategy":
            for name in available():
                does = (strategy_class(name).__doc__ or "").strip().splitlines()[0]
                lines[name] = f"{lines.get(name, '(no YAML file)')} {does}"
        print(f"{group}=")
        for name, line in lines.items():
            print(
                textwrap.fill(line, 100, initial_indent=f"  {name:<15}", subsequent_indent=" " * 17)
            )
    return 0


def _load(config: DictConfig) -> Any:
    """Model and processor of a config, on the trainer's device."""
    import torch

    from tokenprune.evaluation.loading import load_model

    loaded = load_model(config)
    wants_gpu = config.trainer.accelerator in ("gpu", "auto") and torch.cuda.is_available()
    if wants_gpu and getattr(loaded.model, "hf_device_map", None) is None:
        model: Any = loaded.model
        model.to("cuda")
    return loaded


def _prompt(loaded: Any, image: Any, question: str) -> Any:
    from tokenprune.data.collate import PromptCollator
    from tokenprune.data.sample import Sample, Turn

    sample = Sample(id="shown", images=(image,), turns=(Turn(question, ""),))
    inputs = PromptCollator(loaded.processor)([sample])["inputs"]
    return inputs.to(loaded.model.device, dtype=loaded.model.dtype)


def _single_run(overrides: Sequence[str]) -> DictConfig:
    """A checked config for a command that runs no evaluation."""
    _reject_sweep_values(overrides)
    config = compose("eval", overrides)
    _check(config)
    return config


def _show(arguments: list[str]) -> int:
    parser = _Parser("tokenprune show", description="One image, with and without pruning.")
    parser.add_argument("image", type=Path, help="a picture that Pillow reads")
    parser.add_argument("question")
    parser.add_argument("overrides", nargs="*", help="as for eval: model=tiny strategy=fastv")
    parser.add_argument("--output", type=Path, help="where the kept-token picture goes")
    args = parser.parse_intermixed_args(arguments)
    config = _single_run(args.overrides)
    if config.strategy is None:
        raise BadInput("strategy: expected one that prunes, got 'none'. Choose strategy=fastv.")
    from tokenprune.data.images import read_image

    try:
        image = read_image(args.image)  # as data sets do
    except ValueError as error:
        raise BadInput(
            f"show: expected a picture, got {str(args.image)!r}: {error}. Give another."
        ) from error
    from tokenprune import cost
    from tokenprune.evaluation.generation import FirstToken, generate, pruned
    from tokenprune.evaluation.kept import kept_tokens
    from tokenprune.report import pictures

    with _quiet():
        loaded = _load(config)
        shape = cost.DecoderShape.from_config(loaded.model.config)
        pruning = fit_pruning(config, loaded.model)
        inputs = _prompt(loaded, image, args.question)
        (whole,) = generate(loaded, inputs, config.max_new_tokens, FirstToken())
        with pruned(loaded, pruning) as trace:
            (part,) = generate(loaded, inputs, config.max_new_tokens, FirstToken())
    assert trace is not None
    if not trace.stages:
        raise BadInput(
            "show: expected a schedule that cuts and a model with visual tokens, got no cut. "
            "Choose another schedule."
        )
    num_visual = len(trace.places[0])
    lengths = trace.visual_lengths[:, 0].tolist()
    share = cost.flops(shape, lengths) / cost.flops(shape, [num_visual] * shape.num_layers)
    print(f"question        {args.question}")
    print(f"unpruned        {whole}")
    print(f"{config.strategy.name:<15} {part}")
    print(f"visual tokens   {num_visual} -> {lengths[-1]}, {100 * share:.0f} % of the FLOPs")
    name = run_name([f"{args.image.stem}-{config.strategy.name}"])
    output = args.output or Path("outputs") / "show" / f"{name}.png"
    kept = kept_tokens(trace, 0, num_visual)
    cuts = [(stage["layer"], stage["kept"]) for stage in kept["stages"]]
    if kept["grids"]:
        output.parent.mkdir(parents=True, exist_ok=True)
        pictures.stages(image, kept["grids"], kept["places"], cuts).save(output)
        print(f"picture         {output}")
    else:
        print("picture         none: where this model's tokens sit in the image is unknown")
    return 0


def _verify(arguments: list[str]) -> int:
    parser = _Parser(
        "tokenprune verify",
        description="Is pruning exact on this checkpoint? Identity, and drop = mask.",
    )
    parser.add_argument("overrides", nargs="*", help="as for eval: model=tiny strategy=fastv")
    config = _single_run(parser.parse_args(arguments).overrides)
    if config.strategy is None:
        raise BadInput("strategy: expected one that prunes, got 'none'. Choose strategy=fastv.")
    from rich import box
    from rich.console import Console
    from rich.table import Table

    from tokenprune.evaluation.verify import made_image, verify

    with _quiet():
        loaded = _load(config)
        pruning = fit_pruning(config, loaded.model)
        assert pruning is not None
        checks = verify(loaded, _prompt(loaded, made_image(), "What is this?"), pruning)
    table = Table(title=f"{config.model.path}, {config.strategy.name}", box=box.SIMPLE_HEAD)
    table.add_column("check")
    for column in ("difference", "allowed", "result"):
        table.add_column(column, justify="right")
    for check in checks:
        result = "exact" if check.value == 0 else "ok" if check.passed else "FAILED"
        table.add_row(check.name, f"{check.value:.1e}", f"{check.limit:.0e}", result)
    Console().print(table)
    return 0 if all(check.passed for check in checks) else 1


def _flops(arguments: list[str]) -> int:
    parser = _Parser(
        "tokenprune flops",
        description="What a schedule costs, layer by layer, and the schedule of a budget. Needs "
        "the model's config only.",
    )
    parser.add_argument("overrides", nargs="*", help="model=llava_1_5_7b budget.avg_tokens=192")
    parser.add_argument("--output", type=Path, help="where a picture goes: costs.png")
    args = parser.parse_intermixed_args(arguments)
    _reject_sweep_values(args.overrides)
    config = compose("eval", args.overrides)
    missing = _missing(config.model, "model.") + _missing(config.schedule, "schedule.")
    if missing:
        raise BadInput(f"{missing[0]}: expected a value, got none. Add {missing[0]}=... .")
    from tokenprune import Schedule
    from tokenprune.cli import breakdown
    from tokenprune.runs import budgets

    if config.model.get("path") is None:
        raise BadInput("model: expected one with a path, got none. Choose model=hub.")
    model = config.model
    shape, _ = budgets.read_model(model.path, model.get("revision"), bool(model.trust_remote_code))
    pruning = build_pruning(config, shape.num_layers)
    strategy = None if pruning is None else pruning.strategy
    schedule = Schedule() if pruning is None else pruning.schedule
    workload = budgets.workload(config.budget, model, strategy)
    name = "unpruned" if config.strategy is None else config.strategy.name
    text = f" and {workload.num_text} text" if workload.num_text else ""
    title = f"{model.path}, {name}: {workload.num_visual} visual{text} tokens"
    breakdown.show(workload, schedule, title)
    if pruning is not None and pruning.solution is not None:
        print("\n".join(breakdown.solved(pruning.solution)))
    if args.output is not None:
        print(f"picture   {breakdown.draw(workload, schedule, title, args.output)}")
    return 0


COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "eval": _eval,
    "train": _train,
    "bench": _bench,
    "report": _report,
    "list": _list,
    "show": _show,
    "verify": _verify,
    "flops": _flops,
}

if __name__ == "__main__":
    sys.exit(main())
