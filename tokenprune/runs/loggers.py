"""Loggers, and CSV curves that outlive an interruption: one file, each step once."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
from lightning_fabric.loggers.logger import rank_zero_experiment
from PIL import Image
from pytorch_lightning.core.saving import save_hparams_to_yaml
from pytorch_lightning.loggers import (
    CSVLogger,
    Logger,
    MLFlowLogger,
    TensorBoardLogger,
    WandbLogger,
)
from pytorch_lightning.loggers.csv_logs import ExperimentWriter

from tokenprune.runs import targets
from tokenprune.runs.files import draft, growing
from tokenprune.runs.results import write_text


def build_logger(config: Any) -> Any:
    """The logger that a config names, False for none.

    Raises:
        ValueError: If it cannot be imported, or its package is not installed.
    """
    return targets.build(config, "logger", Logger) if config else False


def log_config(trainer: pl.Trainer, config: Mapping[str, Any]) -> None:
    """Gives a run's whole config to its loggers; before it runs, for some then write their files.

    Args:
        trainer: Whose loggers.
        config: The resolved config.
    """
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger) and trainer.is_global_zero:
            # Of an earlier run in this folder: it is never written again.
            Path(logger.log_dir, logger.NAME_HPARAMS_FILE).unlink(missing_ok=True)
        logger.log_hyperparams(dict(config))


def log_results(
    loggers: Sequence[Logger], table: Mapping[str, Any], pictures: Mapping[str, Image.Image]
) -> None:
    """Gives a run's table and pictures to those of its loggers that show such things.

    Args:
        loggers: Of the process that writes.
        table: One row, by column.
        pictures: By their names.
    """
    cells = {
        name: value if isinstance(value, int | float) else str(value)
        for name, value in table.items()
    }
    for logger in loggers:
        shown: Any = logger
        if isinstance(logger, WandbLogger):
            logger.log_table("results", columns=list(cells), data=[list(cells.values())])
            if pictures:
                logger.log_image("kept", list(pictures.values()), caption=list(pictures))
        elif isinstance(logger, MLFlowLogger):
            columns = {name: [value] for name, value in cells.items()}
            shown.experiment.log_table(logger.run_id, columns, "results.json")
            for name, picture in pictures.items():
                shown.experiment.log_image(logger.run_id, picture, f"kept/{name}.png")
        elif isinstance(logger, TensorBoardLogger):
            lines = [f"| {name} | {value} |" for name, value in cells.items()]
            shown.experiment.add_text("results", "\n".join(["| | |", "| --- | --- |", *lines]))
            for name, picture in pictures.items():
                pixels_HWC = np.asarray(picture.convert("RGB"))
                shown.experiment.add_image(f"kept/{name}", pixels_HWC, dataformats="HWC")


def begin(loggers: Sequence[Logger]) -> None:
    """Lets loggers begin a run here, before other processes do: those then add to this one."""
    for logger in loggers:
        if isinstance(logger, MLFlowLogger):
            _ = logger.run_id


def close(loggers: Sequence[Logger]) -> None:
    """Ends what a run's loggers have begun: the next run of a sweep has its own."""
    for logger in loggers:
        if isinstance(logger, WandbLogger) and logger._experiment is not None:
            logger.experiment.finish()


class CSVCurve(CSVLogger):
    """Lightning's `CSVLogger`, which adds to its file where that one would delete it.

    So do the processes of a training, which have a logger each, one after another.

    Args:
        save_dir: The run's folder.
        name: Sub-folder.
    """

    def __init__(self, save_dir: str, name: str = "csv") -> None:
        super().__init__(save_dir, name, version="")

    @property
    def path(self) -> Path:
        """The file."""
        return Path(self.log_dir) / ExperimentWriter.NAME_METRICS_FILE

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """What Lightning writes rows with."""
        if self._experiment is None:
            self._experiment = _Appends(log_dir=self.log_dir)
        return self._experiment

    def begin(self) -> None:
        """Lets the next row take the place of the file, whatever was in it."""
        known = getattr(self._experiment, "hparams", {})
        self._experiment = new = _Replaces(log_dir=self.log_dir)
        new.log_hparams(known)

    def cut(self, step: int) -> None:
        """Removes the rows of later steps, which are going to be done again.

        Args:
            step: The last that stays; below 0, the file goes.
        """
        if not self.path.is_file():
            return
        if step < 0:
            self.path.unlink(missing_ok=True)
            return
        with self.path.open(newline="") as file:
            reader = csv.DictReader(file)
            rows = [row for row in reader if _step(row) <= step]
        _write(self.path, reader.fieldnames or ["step"], rows)


def _write(path: Path, names: Sequence[str], rows: Sequence[dict[str, Any]]) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())


def _step(row: dict[str, Any]) -> float:
    """A row's step; infinite for one that was not written to its end."""
    try:
        return float("inf") if None in row.values() else float(row["step"])
    except (KeyError, ValueError):
        return float("inf")


class _Appends(ExperimentWriter):
    """Finds its file's columns instead of deleting it, and never leaves it half-written."""

    def log_hparams(self, params: dict[str, Any]) -> None:
        """Notes the run's config; it is written beside the first rows, not before there are any."""
        self.hparams.update(params)

    def save(self) -> None:
        grows = bool(self.metrics)
        with growing(Path(self.metrics_file_path)):
            super().save()
        if grows:
            with draft(Path(self.log_dir) / self.NAME_HPARAMS_FILE) as beside:
                save_hparams_to_yaml(beside, self.hparams)

    def _check_log_dir_exists(self) -> None:
        path = Path(self.metrics_file_path)
        if path.is_file():
            with path.open(newline="") as file:
                self.metrics_keys = next(csv.reader(file), [])

    def _rewrite_with_new_header(self, fieldnames: list[str]) -> None:
        path = Path(self.metrics_file_path)
        with path.open(newline="") as file:
            rows = list(csv.DictReader(file))
        _write(path, fieldnames, rows)


class _Replaces(_Appends):
    """Writes its first rows to another file, which takes the place of the one before."""

    def _check_log_dir_exists(self) -> None:
        self._path: str | None = None

    def save(self) -> None:
        if self._path is not None:
            super().save()
            return
        path = self.metrics_file_path
        with draft(Path(path)) as beside:
            self.metrics_file_path = str(beside)
            super().save()
        self._path = self.metrics_file_path = path
