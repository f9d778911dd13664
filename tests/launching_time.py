"""What a sweep of short runs costs beside the runs: `python tests/launching_time.py [RUNS] [N]`.

N processes of joblib (2), or 1: no launcher, all in this process.

Prints how long the runs took themselves, in processes that were there already, and how long the
sweep took: wall time of that many processes, and processors' time, which other work on the machine
does not touch. docs/scale.md has the figures.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import tempfile
import time
from pathlib import Path

from omegaconf import DictConfig

from tokenprune.cli import eval as command
from tokenprune.cli.jobs import Job

#: Where runs write how long they took; set before any process is started.
TIMES = "TOKENPRUNE_TIMES"


def task(config: DictConfig) -> float:
    """An evaluation that notes how long it took; a process's first one also loads torch."""
    first = "torch" not in sys.modules
    wall, cpu = time.perf_counter(), time.process_time()
    found = command._task(config)
    taken = {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu, "first": first}
    with Path(os.environ[TIMES]).open("a") as file:
        file.write(json.dumps(taken) + "\n")
    return found


def main(num_runs: int, num_processes: int) -> None:
    """Runs the sweep in a folder of its own, and prints its times."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ[TIMES] = f"{folder}/times"
        job = Job("eval", task, command._check, "json", command._wanted, command._complete)
        few = ["max_new_tokens=4", "num_pictures=0", "data.batch_size=8", "trainer.callbacks=[]"]
        few += ["data.test.num_samples=48", "strategy=fastv,random,uniform", "schedule=pyramid"]
        few += [f"seed=range({num_runs // 3})", f"hydra.sweep.dir={folder}/sweep"]
        if num_processes > 1:
            few += ["launcher=joblib", f"hydra.launcher.n_jobs={num_processes}"]
        begin = time.perf_counter()
        job.run(["-m", *few])
        wall = time.perf_counter() - begin
        if num_processes > 1:
            from joblib.externals.loky import get_reusable_executor

            get_reusable_executor().shutdown(wait=True)  # so that its processes count
        used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        cpu = sum(own.ru_utime + own.ru_stime for own in used)
        lines = Path(os.environ[TIMES]).read_text().splitlines()
    times = [json.loads(line) for line in lines]
    usual = [own for own in times if not own["first"]]
    own_wall, own_cpu = (sum(t[k] for t in usual) / len(usual) for k in ("wall", "cpu"))
    print(f"{len(times)} runs of {own_wall:.2f} s ({own_cpu:.2f} s of a processor)")
    ideal = own_wall * len(times) / num_processes
    print(f"wall time {wall:.1f} s, {wall / ideal:.2f} x their own on {num_processes} processes")
    print(f"processors' time {cpu:.1f} s, {cpu / (own_cpu * len(times)):.2f} x their own")


if __name__ == "__main__":
    given = [int(word) for word in sys.argv[1:]]
    main(*given, *(300, 2)[len(given) :])
