"""Starts Hydra: the one file that uses what Hydra does not offer publicly.

`hydra.main` would read `sys.argv` again, which holds our command's name, and parse it in a way that
overrides cannot follow an option. tests/cli/test_hydra_start.py says what is relied upon.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Any

from hydra._internal.utils import _run_hydra, get_args_parser
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig

from tokenprune.cli.arguments import complain
from tokenprune.runs.compose import config_dir


def parse(command: str, arguments: Sequence[str]) -> argparse.Namespace:
    """Hydra's options and the overrides: what `start` takes."""
    return _parser(command).parse_intermixed_args(list(arguments))


def start(command: str, args: argparse.Namespace, task: Callable[[DictConfig], Any]) -> None:
    """Composes the config of a command and runs the task: once, or for every run of a sweep."""
    try:
        _run_hydra(
            args=args,
            args_parser=_parser(command),
            task_function=task,
            config_path=str(config_dir()),
            config_name=command,
        )
    finally:
        GlobalHydra.instance().clear()


def _parser(command: str) -> argparse.ArgumentParser:
    parser = get_args_parser()
    parser.prog = f"tokenprune {command}"
    parser.error = lambda message: complain(parser.prog, message)  # type: ignore[method-assign]
    return parser
