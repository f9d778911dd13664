"""Fine-tuning, pruned or not: `run.py` is the command, `module.py` what a step and its loss are."""

from tokenprune.training.run import MONITORS, train
from tokenprune.training.summary import SUMMARY

__all__ = ["MONITORS", "SUMMARY", "train"]
