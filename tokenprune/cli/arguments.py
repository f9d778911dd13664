"""Arguments of the commands that read no config of their own."""

from __future__ import annotations

import argparse
from typing import NoReturn

from tokenprune.cli.mistakes import BadInput


class Parser(argparse.ArgumentParser):
    """An argument parser whose complaints take one line."""

    def error(self, message: str) -> NoReturn:
        complain(self.prog, message)


def add_baseline(parser: argparse.ArgumentParser) -> None:
    """Lets commands that compare a sweep's runs name what with."""
    parser.add_argument(
        "--baseline",
        action="append",
        default=[],
        help="a strategy or a run to compare with, besides unpruned and random; may be repeated",
    )


def add_config_dir(parser: argparse.ArgumentParser) -> None:
    """Lets a command take a folder of the user's configs, as `eval` does."""
    parser.add_argument(
        "--config-dir", "-cd", metavar="FOLDER", help="a folder with further configs, as for eval"
    )


def complain(prog: str, message: str) -> NoReturn:
    """Raises argparse's complaint as `BadInput`."""
    # Everything that may be left out is called overrides.
    message = message.replace(", overrides", "")
    raise BadInput(f"{prog.removeprefix('tokenprune ')}: {message}. See {prog} --help.")
