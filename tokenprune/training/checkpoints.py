"""Checkpoints of a training, from which it goes on bit for bit, and its end by a signal.

Lightning's `ModelCheckpoint` saves a step before its validation, which a training that goes on from
there leaves out; between the batches of a step, too. Here a step is saved once all is done that
follows from it.
"""

from __future__ import annotations

import errno
import math
import os
import re
import signal
import threading
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.trainer.states import TrainerFn
from torch.distributed.checkpoint.api import CheckpointException
from torch.multiprocessing.spawn import ProcessException
from torch.utils.data import DataLoader

from tokenprune.runs.files import draft
from tokenprune.training.sharding import META, Sharded

#: Where an interrupted training goes on from, and the weights of the best validation.
LAST, BEST = "checkpoints/last.ckpt", "checkpoints/best.ckpt"


class Stopped(Exception):
    """A signal has stopped a training; what it had done until then is in its checkpoint.

    Args:
        signum: The signal.
    """

    def __init__(self, signum: int) -> None:
        super().__init__(f"by {signal.Signals(signum).name}")
        self.signum = signum


class StopSignals:
    """Inside its `with`, Ctrl-C and SIGTERM are noted: a training stops after its current step.

    Ctrl-C twice stops at once. Processes that this one started are told.
    """

    def __init__(self) -> None:
        self.received = 0
        self._processes: Any = None
        self._owner = 0
        self._before: dict[int, Any] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {"received": self.received, "_processes": None, "_owner": 0, "_before": {}}

    def __enter__(self) -> StopSignals:
        self.take()
        return self

    def __exit__(self, *error: Any) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)
        self._before = {}

    def take(self) -> None:
        """Handles the signals of this process from here on."""
        if self._owner == os.getpid() or threading.current_thread() is not threading.main_thread():
            return
        self._owner = os.getpid()
        for signum in (signal.SIGINT, signal.SIGTERM):
            self._before[signum] = signal.signal(signum, self._note)

    def tell(self, trainer: pl.Trainer) -> None:
        """Passes signals on to the processes that the trainer is going to start."""
        self._processes = trainer.strategy.launcher

    def _note(self, signum: int, frame: Any) -> None:
        if self._owner != os.getpid():  # a fork that has not taken them yet
            if signum == signal.SIGTERM:  # with SIGINT, the other process knows
                signal.signal(signum, signal.SIG_DFL)
                os.kill(os.getpid(), signum)
            return
        if self._before and self.received == signum == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = signum
        # Not as SIGINT: a terminal sends that to all processes itself.
        for process in getattr(self._processes, "procs", ()):
            process.terminate()

    def cause(self, error: BaseException) -> int:
        """The signal that an exception of a training is due to; 0 where it is none."""
        if isinstance(error, Stopped):
            return error.signum
        if isinstance(error, EOFError):
            return self.received  # a process that was stopped as it told why
        if not isinstance(error, ProcessException):
            return 0
        # Another process's exception arrives as text that ends with it.
        found = re.search(r"\bStopped: by (SIG\w+)\s*$", str(error))
        if found:
            return self.received or signal.Signals[found[1]]
        ended = re.search(r"terminated with signal SIG(TERM|INT)\b", str(error))
        return self.received if ended else 0


class Checkpoints(pl.callbacks.Checkpoint):
    """Writes the checkpoint to go on from, and the weights of the best validation.

    Steps of the optimiser are saved whole: after their last batch, and after the validation that is
    due then.

    Args:
        folder: The run's.
        every: Steps between two checkpoints. The last step is saved anyway, and one at which a
            signal arrived: the training ends there with `Stopped`.
        signals: Those of this training.
        monitor: The metric that says which validation is best.
        mode: `"min"` or `"max"`.
    """

    def __init__(
        self, folder: Path, every: int, signals: StopSignals, monitor: str, mode: str
    ) -> None:
        self.folder, self.every, self.signals = folder, every, signals
        self.monitor, self.mode = monitor, mode
        self._best: float | None = None
        self._saved = -1
        self._stop = 0

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Lets the trainer count in batches of now: other processes may have others."""
        own: Any = trainer
        resumed = getattr(own.datamodule, "resumed", None)
        if resumed is None:  # somebody else's data
            return
        progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
        for name, count in zip(("total", "current"), resumed, strict=True):
            ready = progress[name]["ready"]
            progress[name] = {key: count + own - ready for key, own in progress[name].items()}

    def state_dict(self) -> dict[str, Any]:
        return {"monitor": self.monitor, "best": self._best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        # In another folder, or by another measure, none is the best yet.
        if state_dict["monitor"] == self.monitor and (self.folder / BEST).is_file():
            self._best = state_dict["best"]

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        # Lightning's own handlers talk to the other processes in the middle of anything, and end a
        # training without a checkpoint.
        own: Any = trainer
        own._signal_connector.register_signal_handlers = self.signals.take
        for name in _LOADERS:
            setattr(own.datamodule, name, partial(_outliving, getattr(own.datamodule, name)))

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        own: Any = trainer
        del own._signal_connector.register_signal_handlers
        for name in _LOADERS:
            delattr(own.datamodule, name)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._saved = trainer.global_step
        # Lightning keeps patience in checkpoints, but not that it was over.
        if _is_over(trainer):
            trainer.should_stop = True

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self._stop:
            raise Stopped(self._stop)
        # What loggers count by; Lightning adds one too few after a stop between validations.
        trainer.fit_loop.epoch_loop._batches_that_stepped = trainer.global_step

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        fetcher = trainer.fit_loop._data_fetcher
        assert fetcher is not None
        if not trainer.fit_loop.epoch_loop._should_check_val_fx(fetcher):
            self._end_step(trainer)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.sanity_checking or trainer.state.fn != TrainerFn.FITTING:
            return
        value = float(trainer.callback_metrics[self.monitor])
        if math.isnan(value):
            value = math.inf if self.mode == "min" else -math.inf
        sign = 1 if self.mode == "min" else -1
        if self._best is None or sign * value < sign * self._best:
            self._best = value
            _save(trainer, self.folder / BEST, weights_only=True)
        self._end_step(trainer)

    def _end_step(self, trainer: pl.Trainer) -> None:
        """Saves a step that is over, if it is time to."""
        loop, step = trainer.fit_loop.epoch_loop, trainer.global_step
        # Patience may end between the batches of a step, which is then left undone.
        if not _is_over(trainer) and (step == self._saved or loop._should_accumulate()):
            return
        self._stop = self.signals.received
        if trainer.world_size > 1:
            # All processes stop at the same step, whichever of them a signal has reached.
            received = torch.tensor(self._stop, device=trainer.strategy.root_device)
            self._stop = int(trainer.strategy.reduce(received, reduce_op="max"))
        epochs = trainer.max_epochs
        is_last = loop._is_training_done and (
            step == trainer.max_steps or trainer.current_epoch + 1 == epochs
        )
        if self._stop or is_last or trainer.should_stop or step % self.every == 0:
            _save(trainer, self.folder / LAST, weights_only=False)
            self._saved = step


def _save(trainer: pl.Trainer, path: Path, weights_only: bool) -> None:
    """Saves what takes the place of the checkpoint before once it is whole; by all processes.

    Lightning moves a file from the folder for temporary ones, which may be on another disk.
    """
    strategy = trainer.strategy
    shards = isinstance(strategy, Sharded) and not weights_only
    with strategy.in_shards() if isinstance(strategy, Sharded) and shards else nullcontext():
        try:
            if shards and not trainer.is_global_zero:
                trainer.save_checkpoint(path)  # where the first process says
                return
            # Of one process before, and of several now; or the other way round.
            with draft(path, either=path.is_file() or (path / META).is_file()) as beside:
                trainer.save_checkpoint(beside, weights_only=weights_only)
        except CheckpointException as error:
            raise _first(error, path) from error


def _first(error: CheckpointException, path: Path) -> BaseException:
    """What one of the processes could not write, where that is the reason."""
    for rank, (cause, _) in sorted(error.failures.items()):
        if isinstance(cause, OSError):
            told = f"{cause.strerror or cause} (process {rank})"
            return OSError(cause.errno or errno.EIO, told, str(path))
        if "inline_container" in str(cause):  # torch's writer does not say why
            return OSError(errno.EIO, f"a file was not written whole (process {rank})", str(path))
    return error


def _is_over(trainer: pl.Trainer) -> bool:
    """Whether there were as many validations without a new best as patience allows."""
    return any(own.wait_count >= own.patience for own in trainer.early_stopping_callbacks)


_LOADERS = ("train_dataloader", "val_dataloader")
_LINGER = 10  # seconds


def _outliving(loads: Callable[[], Any]) -> Any:
    """A loader whose workers leave signals to their trainer, whose step needs its batch."""
    loader = loads()
    if isinstance(loader, DataLoader):
        loader.worker_init_fn = partial(_outlive, loader.worker_init_fn)
    return loader


def _outlive(init: Callable[[int], None] | None, worker: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Not for ever: a process that fails ends its workers so, and waits for them.
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(_LINGER))
    if init is not None:
        init(worker)
