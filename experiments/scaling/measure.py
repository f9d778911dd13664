"""Measured: a training step and an evaluation by 1, 2 and 4 processes on this machine.

    python experiments/scaling/measure.py

starts itself under torchrun for each number of processes. Beside wall time it tells CPU time, which
other work on the machine changes less. Writes `results/measured.csv`.
"""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
#: What is measured, and a process's samples a step by the number of processes.
STEPS = {"training, weak": lambda n: 2, "training, strong": lambda n: 8 // n}
NUM_STEPS, NUM_QUESTIONS = 12, 64
COMMON = ["trainer=ddp", "trainer.accelerator=cpu", "strategy=pyramiddrop", "logger=none"]


def watch(path: str) -> Any:
    """A callback that notes the seconds of each step or batch, and those of the processor."""
    import pytorch_lightning as pl

    class Watch(pl.Callback):
        def __init__(self) -> None:
            self.times: list[tuple[float, float]] = []

        def note(self, trainer: Any, *_: Any) -> None:
            self.times.append((time.perf_counter(), time.process_time()))
            Path(f"{path}.{trainer.global_rank}").write_text(json.dumps(self.times))

        on_train_batch_end = on_predict_batch_end = note

    return Watch()


def command(what: str, processes: int, folder: Path) -> list[str]:
    """The command that is measured."""
    target = f"{Path(__file__).stem}.watch"
    own = [*COMMON, f"hydra.run.dir={folder}/run", "+trainer.enable_progress_bar=false"]
    own += [f"trainer.callbacks=[{{_target_:{target},path:{folder}/times}}]"]
    if what == "evaluation":
        return ["eval", *own, f"data.test.num_samples={NUM_QUESTIONS}", "data.batch_size=4"]
    size = STEPS[what](processes)
    own += [f"data.batch_size={size}", f"data.train.num_samples={size * processes * NUM_STEPS}"]
    own += ["data.validation.num_samples=4", "+trainer.limit_val_batches=0", "parts=[decoder]"]
    return ["train", *own, f"trainer.max_steps={NUM_STEPS}"]


def measure(what: str, processes: int) -> dict[str, object]:
    """One row of the table."""
    with tempfile.TemporaryDirectory() as folder:
        torchrun = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={processes}"]
        own = [*torchrun, "-m", "tokenprune.cli", *command(what, processes, Path(folder))]
        places = os.pathsep.join(
            filter(None, [str(Path(__file__).parent), os.getenv("PYTHONPATH")])
        )
        variables = os.environ | {"PYTHONPATH": places, "OMP_NUM_THREADS": "1"}
        subprocess.run(own, check=True, env=variables, stdout=subprocess.DEVNULL, timeout=600)
        times = [json.loads(path.read_text()) for path in Path(folder).glob("times.*")]
    assert len(times) == processes
    # Between the second step and the last: the first ones make buffers.
    first = min(2, len(times[0]) - 2)
    steps = len(times[0]) - 1 - first
    wall = max(own[-1][0] - own[first][0] for own in times) / steps
    cpu = sum(own[-1][1] - own[first][1] for own in times) / steps
    size = 4 if what == "evaluation" else STEPS[what](processes)
    return {
        "what": what,
        "processes": processes,
        "samples_per_step": size * processes,
        "wall_ms_per_sample": f"{1000 * wall / (size * processes):.1f}",
        "cpu_ms_per_sample": f"{1000 * cpu / (size * processes):.1f}",
    }


def main() -> None:
    """Measures all, and writes the table."""
    rows = [measure(what, n) for what in (*STEPS, "evaluation") for n in (1, 2, 4)]
    RESULTS.mkdir(exist_ok=True)
    with (RESULTS / "measured.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
