"""Fine-tuning, pruned or not: `run.py` is the command, `module.py` what a step and its loss are."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tokenprune.training.run import train
    from tokenprune.training.summary import SUMMARY

__all__ = ["SUMMARY", "train"]


if not TYPE_CHECKING:  # as in tokenprune/__init__.py

    def __getattr__(name):
        """A name that was not used before: a config is checked without torch and Lightning."""
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from tokenprune.training import run, summary

        return getattr(run if name == "train" else summary, name)
