"""Starts Hydra: the one file that uses what Hydra does not offer publicly.

`hydra.main` would read `sys.argv` again, which holds our command's name, and parse it in a way that
overrides cannot follow an option. tests/cli/test_hydra_start.py says what is relied upon.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from hydra._internal.hydra import Hydra
from hydra._internal.utils import (
    _run_hydra,
    create_automatic_config_search_path,
    get_args_parser,
    run_and_report,
)
from hydra.core.config_search_path import SearchPathQuery
from hydra.core.global_hydra import GlobalHydra
from hydra.types import RunMode
from omegaconf import DictConfig

from tokenprune.cli.arguments import complain
from tokenprune.cli.mistakes import explain
from tokenprune.runs.compose import config_dir


def parse(command: str, arguments: Sequence[str]) -> argparse.Namespace:
    """Hydra's options and the overrides: what `start` takes."""
    return _parser(command).parse_intermixed_args(list(arguments))


def start(command: str, args: argparse.Namespace, task: Callable[[DictConfig], Any]) -> None:
    """Composes the config of a command and runs the task: once, or for every run of a sweep.

    Raises:
        Exception: What the task raises, and what Hydra does: a run's folder that cannot be made.
    """
    try:
        if args.cfg or args.hydra_help or args.info or args.shell_completion:
            _run_hydra(
                args=args,
                args_parser=_parser(command),
                task_function=task,
                config_path=str(config_dir()),
                config_name=command,
            )
        else:
            _run(command, args, task)
    finally:
        GlobalHydra.instance().clear()


def _run(command: str, args: argparse.Namespace, task: Callable[[DictConfig], Any]) -> None:
    """As `_run_hydra` does, which prints all that is raised with a traceback, and ends with 1."""
    path = create_automatic_config_search_path(None, None, args.config_path or str(config_dir()))
    if args.config_dir is not None:
        own = f"file://{Path(args.config_dir).resolve()}"
        path.prepend("command-line", own, SearchPathQuery(provider="schema"))
    hydra = Hydra.create_main_hydra2(task_name=command, config_search_path=path)
    name = args.config_name or command
    mode = RunMode.MULTIRUN if args.multirun else hydra.get_mode(name, args.overrides)
    try:
        if mode == RunMode.MULTIRUN:
            hydra.multirun(name, task, [*args.overrides, "hydra.mode=MULTIRUN"])
        else:
            hydra.run(name, task, [*args.overrides, "hydra.mode=RUN"])
    except Exception as error:
        if explain(error) is not None:
            raise
        run_and_report(partial(_raise, error))


def _raise(error: Exception) -> None:
    raise error


def _parser(command: str) -> argparse.ArgumentParser:
    parser = get_args_parser()
    parser.prog = f"tokenprune {command}"
    parser.error = lambda message: complain(parser.prog, message)  # type: ignore[method-assign]
    return parser
