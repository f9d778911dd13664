"""The `tokenprune` command: finds the file of a command, and says what went wrong in one line.

Nothing heavy is imported here, or before a command needs it. Exit codes: 0, done; 1, a check failed
or we have a bug; 2, bad input; 130, Ctrl-C.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence

from tokenprune.cli import process
from tokenprune.cli.mistakes import BadInput, explain, is_interruption, unknown

#: Each has a file of its name here, whose `main` takes the arguments and returns the exit code.
COMMANDS = (
    *("eval", "benchmark", "train", "bench"),
    *("collect", "report", "list", "show", "verify", "flops"),
)
USAGE = """\
tokenprune: visual token pruning for vision-language models

  tokenprune eval [overrides]                      evaluate a model with its visual tokens pruned
  tokenprune eval -m experiment=ablation           sweep: one run after another, and a table
  tokenprune benchmark tasks=[pope,mme] [overrides] tasks of lmms-eval, pruned
  tokenprune collect FOLDER                        a sweep's tables anew, from its runs
  tokenprune report FOLDER                         a sweep as a page: report.html
  tokenprune show IMAGE "QUESTION" [overrides]     one image, with and without pruning
  tokenprune verify [overrides]                    is pruning exact on this checkpoint?
  tokenprune flops [overrides]                     what a schedule costs; a budget's schedule
  tokenprune train [overrides]                     train a model, pruned or not
  tokenprune bench prefill|decode|train            what pruning saves, measured on random weights
  tokenprune list                                  strategies, models and all other choices

Overrides choose (strategy=fastv, model=tiny) or set (schedule.lam=0.3). `tokenprune COMMAND --help`
says more. Exit codes: 0 done, 1 a check failed, 2 bad input, 130 Ctrl-C."""


def main(arguments: Sequence[str]) -> int:
    """Runs a command; the exit code.

    Args:
        arguments: The command's name and its own arguments.
    """
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(USAGE)
        return 0 if arguments else 2
    command, *rest = arguments
    try:
        if command == "--version":
            from tokenprune import __version__

            print(__version__)
            return 0
        if command not in COMMANDS:
            raise BadInput(unknown("command", command, COMMANDS))
        code: int = importlib.import_module(f"tokenprune.cli.{command}").main(rest)
        return code
    except SystemExit as stop:  # argparse and Hydra stop so
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException as error:
        if is_interruption(error):
            print(process.STOPPED, file=sys.stderr)
            return process.INTERRUPTED
        message = explain(error)
        if message is None or os.environ.get("HYDRA_FULL_ERROR"):
            raise
        print(f"tokenprune: {message}", file=sys.stderr)
        return 2
