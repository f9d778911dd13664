"""A real Slurm with two nodes, both on this machine: Debian's `slurm-wlm` and `munge`.

Nothing of the system's is touched: daemons, sockets and state are in one folder, the ports are
free ones, and all of it ends with the `with` (or, should its process be killed, by
`processes._watched`). By hand, until Ctrl-C:
`PYTHONPATH=.:tests python tests/cluster/slurm.py FOLDER`.
"""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from processes import DEVNULL, Process, run, started

NODES = ("n1", "n2")
PARTITION = "p"
#: Seconds after which Slurm takes a node that says nothing for dead.
PATIENCE = 10
_DAEMONS = ("munged", "slurmctld", "slurmd", "srun", "sbatch", "scancel")
_CONFIG = """\
ClusterName=tiny
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmctldParameters=idle_on_node_suspend
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
SlurmUser={user}
SlurmdUser={user}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SchedulerParameters=sched_interval=1,batch_sched_delay=0
ReturnToService=2
SlurmdTimeout={patience}
KillWait=2
MpiDefault=none
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=1 State=UNKNOWN
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=1 State=UNKNOWN
PartitionName=p Nodes=n1,n2 Default=YES State=UP
"""


def absent() -> list[str]:
    """Programs that are not installed."""
    return [name for name in _DAEMONS if _program(name) is None]


def _user() -> str:
    return pwd.getpwuid(os.getuid()).pw_name


def _program(name: str) -> str | None:
    return shutil.which(name) or shutil.which(name, path="/usr/sbin:/sbin")


@dataclass
class Slurm:
    """A cluster that runs.

    Attributes:
        folder: Its own files; `slurmctld.log` and `slurmd-n1.log` say what went wrong.
        nodes: The daemon of each node, as long as that is up.
    """

    folder: Path
    nodes: dict[str, ExitStack] = field(default_factory=dict)

    @property
    def environment(self) -> dict[str, str]:
        """What a process needs to find this cluster."""
        return {"SLURM_CONF": str(self.folder / "slurm.conf")}

    def run(self, *command: str, code: int | None = 0, limit: float = 60) -> str:
        """Runs one of Slurm's commands; its output."""
        done = run(command, code, limit, env=os.environ | self.environment)
        return done.stdout + done.stderr

    def queue(self) -> list[tuple[str, str]]:
        """Each job that is waiting or running, and its state; an array's tasks apart."""
        text = self.run("squeue", "--noheader", "--array", "--format=%i %T")
        return [(line.split()[0], line.split()[1]) for line in text.splitlines()]

    def start_node(self, name: str) -> None:
        """Starts a node's daemon, and waits until jobs can run there."""
        stack = ExitStack()
        stack.enter_context(self._daemon(["slurmd", "-D", "-N", name, "-f", self._config]))
        self.nodes[name] = stack
        wait_for(lambda: self._state(name) in ("idle", "mixed", "allocated"), f"{name} to be up")

    def kill_node(self, name: str) -> None:
        """Ends a node as a loss of power does: its daemon, and all that runs there, at once."""
        tasks = _running_on(name)
        shepherds = {parent for parent in map(_parent, tasks) if parent > 1}
        self.nodes.pop(name).close()
        # All are stopped before the first ends, or another would tell Slurm that it has failed.
        for number in (signal.SIGSTOP, signal.SIGKILL):
            for process in (*shepherds, *tasks):
                with suppress(ProcessLookupError):
                    os.kill(process, number)

    def hurry_requeued(self) -> None:
        """Waits for jobs that Slurm has taken back from a dead node, and lets them start now.

        Slurm itself waits for two minutes more.
        """
        wanted = ["--noheader", "--array", "--state=PENDING", "--format=%i %r"]

        def held() -> list[str]:
            lines = self.run("squeue", *wanted).splitlines()
            return [line.split()[0] for line in lines if line.endswith("BeginTime")]

        wait_for(lambda: bool(held()), "a job to be requeued", limit=90)
        for job in held():
            self.run("scontrol", "update", f"jobid={job}", "starttime=now")

    def cancel_all(self) -> None:
        """Ends every job, and waits until none is left."""
        self.run("scancel", "--quiet", "--state=PENDING", code=None)
        self.run("scancel", "--quiet", "--full", "--signal=KILL", "--state=RUNNING", code=None)
        self.run("scancel", "--quiet", f"--user={_user()}", code=None)
        wait_for(lambda: not self.queue(), "all jobs to end")

    @property
    def _config(self) -> str:
        return str(self.folder / "slurm.conf")

    def _state(self, name: str) -> str:
        return self.run("sinfo", "--noheader", "--nodes", name, "--format=%T", code=None).strip()

    @contextmanager
    def _daemon(self, command: Sequence[str]) -> Iterator[Process]:
        """A daemon in the foreground, whose group ends with the `with`."""
        program = _program(command[0])
        assert program is not None
        with (self.folder / f"{command[0]}.out").open("a") as log:
            options = {"stdin": DEVNULL, "stdout": log, "stderr": log}
            with started([program, *command[1:]], limit=3600, **options) as process:
                yield process


@contextmanager
def cluster(folder: Path) -> Iterator[Slurm]:
    """A Slurm that runs inside the `with`.

    Args:
        folder: For its files; a short path, for sockets' names have 107 characters at most.
    """
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o755)
    (folder / "state").mkdir(exist_ok=True)
    for name in NODES:
        (folder / f"spool-{name}").mkdir(exist_ok=True)
    (folder / "slurm.conf").write_text(
        _CONFIG.format(
            host=socket.gethostname().split(".")[0],
            folder=folder,
            user=_user(),
            ports=_free_ports(3),
            patience=PATIENCE,
        )
    )
    (folder / "munge.key").write_bytes(os.urandom(128))
    (folder / "munge.key").chmod(0o400)
    files = {"socket": "socket", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
    options = [f"--{option}={folder}/munge.{end}" for option, end in files.items()]
    slurm = Slurm(folder)
    with ExitStack() as stack:
        key = f"--key-file={folder}/munge.key"
        munged = ["munged", "--foreground", "--force", key, *options]
        stack.enter_context(slurm._daemon(munged))
        wait_for((folder / "munge.socket").exists, "munged")
        stack.enter_context(slurm._daemon(["slurmctld", "-D", "-f", slurm._config]))
        wait_for(lambda: "UP" in slurm.run("scontrol", "ping", code=None), "slurmctld")
        try:
            for name in NODES:
                slurm.start_node(name)
            yield slurm
        finally:
            with suppress(AssertionError, TimeoutError):
                slurm.cancel_all()
            for name in list(slurm.nodes):
                slurm.kill_node(name)


def wait_for(condition: Callable[[], bool], what: str, limit: float = 60) -> None:
    """Waits until a condition holds.

    Raises:
        TimeoutError: It does not within `limit` seconds.
    """
    end = time.monotonic() + limit
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError(f"expected {what} within {limit} s, got none")
        time.sleep(0.1)


def _free_ports(number: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(number)]
        for own in sockets:
            own.bind(("127.0.0.1", 0))
        return [own.getsockname()[1] for own in sockets]


def _running_on(node: str) -> list[int]:
    """Processes of the jobs on a node."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        with suppress(OSError):
            if f"SLURMD_NODENAME={node}".encode() in path.read_bytes().split(b"\0"):
                found.append(int(path.parent.name))
    return found


def _parent(process: int) -> int:
    with suppress(OSError):
        text = Path(f"/proc/{process}/stat").read_text()
        return int(text.rpartition(")")[2].split()[1])
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with cluster(Path(sys.argv[1]).resolve()) as own, suppress(KeyboardInterrupt):
        print(f"export SLURM_CONF={own.environment['SLURM_CONF']}", flush=True)
        signal.pause()
