"""What `eval`, `train` and `bench` share: help, checks, the start, and what an end leaves behind.

A run is composed and checked first, so that a mistake costs one line and no folder; only then is
what runs it loaded, and only then does Hydra start it.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import logging
import os
import re
import shlex
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from tokenprune.cli import guide, hydra_start, process
from tokenprune.cli.checks import check_jobs
from tokenprune.cli.configs import compose, composed_files, folders
from tokenprune.cli.launching import Work, here
from tokenprune.cli.mistakes import BadInput, explain, is_interruption
from tokenprune.runs import launchers, results, team
from tokenprune.runs.devices import num_gpus
from tokenprune.runs.folders import LOCK, occupied


@dataclass(frozen=True)
class Job:
    """A command that Hydra runs.

    Attributes:
        command: Its name, and that of its config.
        task: Does one run, inside `tidy`.
        check: Refuses values of a config; loads neither torch nor transformers where it can.
        needs: The module that does the work, which takes seconds to load.
        wanted: Of a config, the name of what the task returns, and whether sweepers that search are
            to `maximize` or to `minimize` it.
        complete: See `Work`.
        shared: Whether it may be one of several processes that torchrun or srun has started.
    """

    command: str
    task: Callable[[DictConfig], Any]
    check: Callable[[DictConfig], None]
    needs: str
    wanted: Callable[[DictConfig], tuple[str, str]]
    complete: Callable[[DictConfig, Path], bool] | None = None
    shared: bool = False

    def run(self, arguments: Sequence[str]) -> int:
        """Runs the command, once or for every run of a sweep; the exit code."""
        args = hydra_start.parse(self.command, arguments)
        if args.cfg and args.multirun:
            raise BadInput("--cfg: expected a single run, got -m as well. Leave one of them out.")
        if args.resolve and not args.cfg:
            raise BadInput("--resolve: expected --cfg beside it, got none. Add --cfg job.")
        if args.help:
            config = compose(self.command, args.overrides, args.config_dir)
            places = folders(args.overrides, args.config_dir)
            files = composed_files(self.command, args.overrides, args.config_dir)
            print("\n".join(guide.lines(self.command, config, places, files)))
            return 0
        if args.cfg:
            compose(self.command, args.overrides, args.config_dir)
        elif not (args.hydra_help or args.info or args.shell_completion):
            launch = self._launched(args.overrides, arguments)
            if launch is not None:
                return self._share(launch, args)
            if check_jobs(self.command, args, self.check, self.wanted):
                importlib.import_module(self.needs)
        self._start(args)
        return 0

    def _start(self, args: argparse.Namespace) -> None:
        with process.Interruptible():
            hydra_start.start(
                self.command, args, Work(self.task, self.complete, self.command == "train")
            )

    def _launched(
        self, overrides: Sequence[str], arguments: Sequence[str]
    ) -> launchers.Launch | None:
        """This process among those that a launcher has started, if it has started several.

        Started once on each of several machines, the command becomes a torchrun there.
        """
        if not self.shared:
            launchers.check_launch()
            return None
        launch = launchers.launched()
        given = dict(item.lstrip("+").split("=", 1) for item in overrides if "=" in item)
        nodes = given.get("trainer.num_nodes", "1")
        if launch is None and nodes.isdecimal() and int(nodes) > 1:
            asked = given.get("trainer.devices", "auto")
            processes = int(asked) if asked.isdecimal() else max(1, num_gpus())
            launchers.exec_torchrun(int(nodes), processes, [self.command, *arguments])
        return launch

    def _share(self, launch: launchers.Launch, args: argparse.Namespace) -> int:
        """Leads the processes of a launcher, or follows; the exit code."""
        if launch.rank > 0:
            process.leave()
            importlib.import_module(self.needs)
            return team.follow(launch)
        with team.led(launch):
            if not check_jobs(self.command, args, self.check, self.wanted):
                raise BadInput(
                    f"launcher: expected none among {launch.size} processes of {launch.launcher}, "
                    "got one. Leave it out, or start the command once."
                )
            importlib.import_module(self.needs)
            self._start(args)
        return 0


def names(config: Mapping[str, Any]) -> dict[str, str]:
    """What the metrics call a run's strategy, schedule, model and data.

    Their choices, a strategy's changed fields, and paths instead of `hub` and `folder`.

    Args:
        config: The resolved config.
    """
    hydra = HydraConfig.get()
    choices = hydra.runtime.choices
    given = [override.lstrip("+") for override in hydra.overrides.task]
    changed = [own.removeprefix("strategy.") for own in given if own.startswith("strategy.")]
    strategy = str(choices.get("strategy"))
    for key in ("name", "_target_"):  # another one than the choice
        if any(own.startswith(f"{key}=") for own in changed):
            strategy = str(config["strategy"][key]).rpartition(".")[2]
    changed = [own for own in changed if own.split("=")[0] not in ("name", "_target_", "seed")]
    named = {key: str(choices.get(key)) for key in ("schedule", "model", "data")}
    for group in ("model", "data"):
        set_here = any(own.startswith(f"{group}.path=") for own in given)
        if set_here or (named[group] in ("hub", "folder") and config[group].get("path")):
            named[group] = str(config[group]["path"])
    return named | {"strategy": f"{strategy}({', '.join(changed)})" if changed else strategy}


def check_own(folder: Path, config: Mapping[str, Any], trains: bool = False) -> None:
    """Refuses to take the place of another run of a sweep.

    `launching.own_names` finds such a folder before, unless the other run has come since, or the
    sweeper is another's.

    Args:
        folder: Of the run.
        config: Its resolved config.
        trains: See `Work`.

    Raises:
        ValueError: The folder holds another one.
    """
    sweeps = HydraConfig.get().mode == RunMode.MULTIRUN
    if differing := results.others(folder, config, not trains) if sweeps else []:
        raise ValueError(
            f"hydra.sweep.dir: expected no other run in {str(folder)!r}, got one with another "
            f"{', '.join(differing)}. Choose another folder, or, where two sweeps have just begun "
            "in this one, give the command once more: its run then goes beside that one."
        )


def tell(folder: Path, metrics: Mapping[str, Any], changes: Sequence[str] | None) -> None:
    """Prints what an evaluation came to: a line in a sweep, else its table.

    Args:
        folder: Of the run.
        metrics: As in its metrics.json.
        changes: What differed from the complete run that was there, see `results.changes`.
    """
    if HydraConfig.get().mode != RunMode.MULTIRUN:
        if changes == []:
            print("complete already:", flush=True)
        results.print_table([results.row(metrics, folder.name)], str(folder))
        return
    state = "complete already" if changes == [] else f"{metrics['accuracy']:.3f}"
    state += f", again: {', '.join(changes)} changed" if changes else ""
    print(f"[{HydraConfig.get().job.num}] {folder.name}: {state}", flush=True)


@contextlib.contextmanager
def tidy(folder: Path, part: str = "") -> Iterator[None]:
    """Holds a run's folder, and on an error leaves none half-written; tells it as `told` does.

    What a run can go on from stays, and the command that goes on is said.

    Args:
        folder: The run's.
        part: What of it is held, where others work at other parts of it.
    """
    before: dict[Path, int] | None = None  # until the folder is held
    try:
        with told(folder):
            try:
                # Of two sweeps that have the same run to do, one does it, and the other waits.
                held = occupied(folder, part, waits=not here())
                with held, contextlib.nullcontext() if part else _discarded(folder):
                    before = _kept(folder, part)
                    yield
            except BaseException:  # an interruption, too
                _remove_empty(folder)
                raise
    except BaseException:
        if before is not None and here() and launchers.is_first():
            now = _kept(folder, part)
            if new := [path for path in now if now[path] != before.get(path)]:
                again = _again(folder, new)
                print(f"tokenprune: what is done is kept. To go on: {again}", file=sys.stderr)
        raise


@contextlib.contextmanager
def told(folder: Path) -> Iterator[None]:
    """Tells a user's mistake in one line, inside what Hydra runs.

    Args:
        folder: What is written to.
    """
    try:
        yield
    except BaseException as error:
        if is_interruption(error):
            raise KeyboardInterrupt from None
        if not isinstance(error, Exception):
            raise
        message = explain(error, folder)
        if message is None or os.environ.get("HYDRA_FULL_ERROR"):
            raise
        if not here():
            raise BadInput(message) from None  # goes to the sweep, which tells it
        print(f"tokenprune: {_run_of_sweep(folder)}{message}", file=sys.stderr)
        # Not an exception: Hydra would tell it once more.
        raise SystemExit(2) from error


def _run_of_sweep(folder: Path) -> str:
    """Which run of a sweep it is, if it is one's."""
    if not HydraConfig.initialized() or (hydra := HydraConfig.get()).mode != RunMode.MULTIRUN:
        return ""
    return f"[{hydra.job.num}] {folder.name}: "


@contextlib.contextmanager
def _discarded(folder: Path) -> Iterator[None]:
    """On an error removes what is new in a folder, unless a run can go on from that."""
    before = {*folder.iterdir(), folder / LOCK}
    try:
        yield
    except BaseException:
        if not any((*folder.glob("checkpoints/*"), *folder.glob("parts/*"))):
            for path in set(folder.iterdir()) - before:
                with contextlib.suppress(OSError):  # the first error is the one to tell
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
        raise


def _kept(folder: Path, part: str) -> dict[Path, int]:
    """What a run goes on from, its checkpoint and noted answers, and when each was written."""
    kept, paths = {}, [folder / "checkpoints/last.ckpt"]
    with contextlib.suppress(OSError):  # others, who are done, may have removed them
        paths += folder.glob(f"parts/*{part}.jsonl")
    for path in paths:
        with contextlib.suppress(OSError):
            kept[path] = path.stat().st_mtime_ns
    return kept


def _again(folder: Path, kept: Sequence[Path]) -> str:
    """The command that goes on with a run from what is kept of it."""
    if HydraConfig.get().mode == RunMode.MULTIRUN:
        return "the same command once more"
    trained = "ckpt_path=last " if any(path.suffix == ".ckpt" for path in kept) else ""
    place = str(folder)
    if not re.fullmatch(r"[\w./@%+ -]+", place, re.ASCII):  # Hydra would read it as something else
        place = '"' + place.replace("\\", "\\\\").replace('"', '\\"') + '"'
    return f"the same command with {trained}{shlex.quote(f'hydra.run.dir={place}')}"


def _remove_empty(folder: Path) -> None:
    """Removes a folder, and those above, in which nothing is: Hydra made them."""
    with contextlib.suppress(OSError):
        while folder != Path.cwd():
            folder.rmdir()
            folder = folder.parent


@contextlib.contextmanager
def quiet() -> Iterator[None]:
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
    ordinary = warnings.formatwarning

    def formatted(message: Warning | str, *where: Any, **line: Any) -> str:
        """A warning of ours without where in the code it is; others as ever."""
        ours = str(message).startswith(("prune: ", "collate: "))
        return f"tokenprune: {message}\n" if ours else ordinary(message, *where, **line)

    warnings.formatwarning = formatted
    try:
        yield
    finally:
        warnings.formatwarning = ordinary
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
