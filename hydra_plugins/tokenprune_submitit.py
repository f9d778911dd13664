"""Hydra launcher over submitit: a job for each run, on this machine or as an array on Slurm.

Other than Hydra's own plug-in for submitit it waits for all jobs, whatever becomes of some of them,
says of each what ended it, and asks `squeue`, which answers without Slurm's accounting as well.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Mapping, Sequence
from typing import Any

from hydra.core.singleton import Singleton
from hydra.core.utils import JobReturn, JobStatus, run_job, setup_globals
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict

_POLL = 1.0  # seconds between looks for results
_ASK = 5.0  # seconds between questions to Slurm
_LATE = 60.0  # seconds that a network file system may take to show a result
#: States of Slurm in which a job will not run again.
_ENDED = ("BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL",
          "OUT_OF_MEMORY", "TIMEOUT")  # fmt: skip


class SubmititLauncher(Launcher):
    """Runs each job of a sweep by submitit. configs/launcher/ says what the settings mean."""

    def __init__(
        self,
        cluster: str,
        folder: str,
        at_once: int,
        timeout_min: float,
        gpus: int = 0,
        max_num_timeout: int = 0,
        additional: Mapping[str, Any] | None = None,
        **settings: Any,
    ) -> None:
        self.cluster, self.folder, self.at_once = cluster, folder, at_once
        self.timeout_min, self.gpus, self.max_num_timeout = timeout_min, gpus, max_num_timeout
        self.settings = {key: _plain(value) for key, value in settings.items()}
        self.additional = dict(additional or {})
        self.config: DictConfig | None = None
        self.context: HydraContext | None = None
        self.task: TaskFunction | None = None
        self.over_time = False

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        self.config, self.context, self.task = config, hydra_context, task_function

    def __call__(self, overrides: Sequence[str], number: int, state: Any) -> JobReturn:
        """One run, in a job's own process."""
        assert self.config is not None
        assert self.context is not None
        assert self.task is not None
        Singleton.set_state(state)
        setup_globals()
        config = self.context.config_loader.load_sweep_config(self.config, list(overrides))
        with open_dict(config):
            config.hydra.job.id, config.hydra.job.num = f"job-{number}", number
        self.over_time = False
        found = run_job(
            hydra_context=self.context,
            task_function=self.task,
            config=config,
            job_dir_key="hydra.sweep.dir",
            job_subdir_key="hydra.sweep.subdir",
        )
        if self.over_time and found.status == JobStatus.FAILED:  # whatever that interrupted
            raise RuntimeError("the job has timed out")
        return found

    def checkpoint(self, *arguments: Any) -> Any:
        """What is run when a job that was over its time, or preempted, is started again."""
        from submitit.helpers import DelayedSubmission

        self.over_time = True
        return DelayedSubmission(self, *arguments)

    def launch(
        self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
    ) -> Sequence[JobReturn]:
        state = Singleton.get_state()
        calls = [(list(own), initial_job_idx + i, state) for i, own in enumerate(job_overrides)]
        if self.cluster == "slurm":
            return _wait_for_slurm(self._submit_array(calls), self.timeout_min)
        return self._run_here(calls)

    @property
    def _warning(self) -> int:
        """Seconds before its time is over in which a job can have itself queued again."""
        return min(90, int(6 * self.timeout_min))

    def _submit_array(self, calls: Sequence[tuple[Any, ...]]) -> list[Any]:
        import submitit

        from tokenprune.cli.mistakes import BadInput

        if shutil.which("sbatch") is None:
            raise BadInput(
                "launcher: expected Slurm's sbatch on this machine, got none. Start the command "
                "where jobs are submitted, or choose launcher=submitit_local."
            )
        executor = submitit.AutoExecutor(
            self.folder, cluster="slurm", slurm_max_num_timeout=self.max_num_timeout
        )
        own = dict(self.settings)
        asked = {
            "timeout_min": self.timeout_min,
            "mem_gb": own.pop("mem_gb", None),
            "cpus_per_task": own.pop("cpus", None),
            "slurm_signal_delay_s": self._warning,
            "slurm_array_parallelism": self.at_once,
            "slurm_additional_parameters": self.additional,
            "slurm_gres": f"gpu:{self.gpus}" if self.gpus else None,
            **{f"slurm_{key}": value for key, value in own.items()},
        }
        given = {key: value for key, value in asked.items() if value not in (None, [], {})}
        executor.update_parameters(**given)
        try:
            jobs: list[Any] = executor.map_array(self, *zip(*calls, strict=True))
        except submitit.core.utils.FailedJobError as error:
            raise BadInput(
                f"hydra.launcher: expected Slurm to take {len(calls)} jobs, got: "
                f"{' '.join(str(error).split())}. Look at its partition, gpus, cpus and mem_gb."
            ) from error
        number = jobs[0].job_id.partition("_")[0]
        print(
            f"{len(jobs)} jobs: {number}; logs: {jobs[0].paths.folder.parent}; they go on without "
            f"this command, and scancel {number} ends them",
            flush=True,
        )
        return jobs

    def _run_here(self, calls: Sequence[tuple[Any, ...]]) -> list[JobReturn]:
        import submitit

        gpus = _gpus(self.at_once * self.gpus)
        over = _over_time(self.timeout_min)
        waiting, found = list(enumerate(calls)), dict[int, JobReturn]()
        at_work: dict[int, tuple[int, Any, float]] = {}  # by slot
        try:
            while waiting or at_work:
                for slot in range(self.at_once):
                    if slot in at_work or not waiting:
                        continue
                    index, call = waiting.pop(0)
                    executor = submitit.LocalExecutor(self.folder, self.max_num_timeout)
                    executor.update_parameters(
                        visible_gpus=gpus[slot * self.gpus : (slot + 1) * self.gpus],
                        gpus_per_node=self.gpus,
                        timeout_min=self.timeout_min,
                        signal_delay_s=self._warning,
                    )
                    at_work[slot] = (index, executor.submit(self, *call), time.monotonic())
                time.sleep(_POLL / 4)
                for slot, (index, job, start) in list(at_work.items()):
                    if job.done():
                        late = time.monotonic() - start >= 60 * self.timeout_min
                        found[index] = _result(job, over if late else "", over)
                        del at_work[slot]
        finally:
            for _, job, _ in at_work.values():  # after Ctrl-C
                job.cancel()
        return [found[index] for index in range(len(calls))]


def _wait_for_slurm(jobs: Sequence[Any], timeout_min: float) -> list[JobReturn]:
    found: dict[str, JobReturn] = {}
    ended: dict[str, tuple[str, float]] = {}  # state without a result, since when
    asked, over = 0.0, _over_time(timeout_min)
    while len(found) < len(jobs):
        time.sleep(_POLL)
        left = [job for job in jobs if job.job_id not in found]
        for job in left:
            if job.paths.result_pickle.exists():
                found[job.job_id] = _result(job, "", over)
        if time.monotonic() - asked < _ASK:
            continue
        asked = time.monotonic()
        states = _states(left)
        for job in left:
            state = "gone" if states is not None and job.job_id not in states else ""
            state = (states or {}).get(job.job_id, state)
            if job.job_id in found or not state.startswith((*_ENDED, "gone")):
                ended.pop(job.job_id, None)
                continue
            state, since = ended.setdefault(job.job_id, (state, asked))
            if asked - since >= (_LATE if state in ("COMPLETED", "gone") else _ASK):
                cause = over if state == "TIMEOUT" else f"Slurm says {state}"
                found[job.job_id] = _result(job, cause, over)
    return [found[job.job_id] for job in jobs]


def _states(jobs: Sequence[Any]) -> dict[str, str] | None:
    """What Slurm says of jobs, also of those that have ended lately; None where it says nothing."""
    numbers = ",".join(dict.fromkeys(job.job_id.partition("_")[0] for job in jobs))
    command = ["squeue", "--noheader", "--array", "--states=all", "--format=%i %T", "--jobs"]
    try:
        done = subprocess.run([*command, numbers], capture_output=True, text=True, timeout=120)
    except subprocess.TimeoutExpired:
        return None
    if done.returncode != 0 and "Invalid job id" not in done.stderr:
        return None
    return dict(line.split()[:2] for line in done.stdout.splitlines())


def _result(job: Any, cause: str, over: str) -> JobReturn:
    """What a job came to; where it left nothing, why.

    Args:
        job: Submitit's.
        cause: Why it has ended, where that is known.
        over: What is said of one that has ended for its time.
    """
    if job.paths.result_pickle.exists():
        kind, value = job._get_outcome_and_result()
        if kind == "success":
            assert isinstance(value, JobReturn)
            return value
        said = str(value).strip().splitlines()
        last = said[-1] if said else "no reason"
        if "timed-out" in last or "timed out" in last:
            last = over
    else:
        said = (job.stderr() or "").strip().splitlines()
        last = cause or (said[-1] if said else "ended without a word")
        if said and not cause.startswith("over"):
            last = f"{cause}, {said[-1]}" if cause else said[-1]
    text = f"job {job.job_id}: {last} (log: {job.paths.stderr})"
    return JobReturn(status=JobStatus.FAILED, _return_value=RuntimeError(text))


def _gpus(number: int) -> list[int]:
    """The first GPUs of those that this process may use.

    Raises:
        BadInput: There are fewer, or they are not named by numbers.
    """
    from tokenprune.cli.mistakes import BadInput

    given = os.environ.get("CUDA_VISIBLE_DEVICES") if number else None
    if given is None:
        return list(range(number))
    known = [part.strip() for part in given.split(",") if part.strip()]
    if len(known) < number or not all(part.isdecimal() for part in known):
        raise BadInput(
            f"hydra.launcher: expected CUDA_VISIBLE_DEVICES to name {number} GPUs by numbers, got "
            f"{given!r}. Lower hydra.launcher.at_once or hydra.launcher.gpus, or unset it."
        )
    return [int(part) for part in known[:number]]


def _over_time(timeout_min: float) -> str:
    return f"over its time limit, hydra.launcher.timeout_min={timeout_min}"


def _plain(value: Any) -> Any:
    return OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
