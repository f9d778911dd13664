"""The process of the `tokenprune` command: its console script, and `python -m tokenprune.cli`.

What is imported here and in `process.py` is loaded before Ctrl-C is in our hands: next to nothing.
"""

from __future__ import annotations

import sys

from tokenprune.cli import process


def console() -> None:
    """Runs the command that the process was started with, and ends the process."""
    process.begin()
    from tokenprune.cli.main import main

    sys.exit(process.end(main(sys.argv[1:])))


if __name__ == "__main__":
    console()
else:
    process.follow()
