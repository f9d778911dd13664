"""The processes that torchrun or srun has started of one command: the first leads.

It alone reads the command line, makes folders and tells what came of it; the others do the work
that it hands out, each for its own share. All of them show in a store that they are alive, so that
one that is lost ends the others with a line that names it, whatever they are waiting for.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import pickle
import re
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from functools import partial
from typing import Any, NoReturn

from tokenprune.runs import launchers
from tokenprune.runs.launchers import Launch

#: Seconds between two signs of life.
BEAT = 1.0
#: Without one for so long a process counts as lost.
LOST = 120.0
#: The same where another process has already failed, as all do that wait for a lost one.
LOST_AFTER_ERROR = 6.0
#: Seconds in which all must have started.
_START = 600.0
#: After so many it is said who has not.
PATIENCE = 60.0
#: How libraries say that another process is gone.
_BROKEN = re.compile(
    r"gloo|Connection (closed|reset|refused)|NCCL|Broken pipe|DistNetwork|ncclRemoteError|"
    r"failed to recv|TCPStore|Socket Timeout"
)
#: This process's place; None where it is alone.
_member: _Member | None = None


class LostProcess(ValueError):
    """One of several processes has failed, or has gone."""


class _Member:
    """One process's connection to the store of all."""

    def __init__(self, launch: Launch) -> None:
        self.launch = launch
        self.number = 0  # of the jobs so far
        self._store = _connect(launch, leads=launch.rank == 0)
        # Another connection: one that waits lets no other thread ask.
        self._beats = _connect(launch, leads=False)
        self.suspects = False
        self.reported = False  # an error of its own, which the first process tells
        self._seen: dict[int, tuple[bytes, float]] = {}
        self._over = threading.Event()
        self.set(f"name/{launch.rank}", f"process {os.getpid()} on {socket.gethostname()}")
        self._thread = threading.Thread(target=self._beat, daemon=True)
        self._thread.start()

    def key(self, name: str) -> str:
        """A key of this start: a launcher may start all anew at the same store."""
        return f"tokenprune/{self.launch.attempt}/{name}"

    def set(self, name: str, value: str | bytes) -> None:
        """Tells the others."""
        self._store.set(self.key(name), value)

    def get(self, name: str) -> bytes | None:
        """What another has told; None where it has not yet."""
        return _read(self._store, self.key(name))

    def wait(self, name: str) -> bytes:
        """What the first process is going to tell, however long that takes; signals are heard."""
        while (told := self.get(name)) is None:
            if self.lost():
                _orphan(self)
            time.sleep(0.05)
        return told

    def absent(self) -> list[int]:
        """Processes that have never shown up."""
        return [r for r in range(self.launch.size) if self.get(f"name/{r}") is None]

    def meet(self) -> None:
        """Waits until all have shown up; signals are heard, as in no library's own waiting.

        Variables that a launcher has left in a shell make one process take itself for several.

        Raises:
            LostProcess: They have not, in `_START` seconds.
        """
        begun, told = time.monotonic(), False
        while absent := self.absent():
            waited = time.monotonic() - begun
            here = self.launch.size - len(absent)
            if waited > _START or {*absent} & {*self.lost()}:
                raise LostProcess(_alone(self.launch, here, waited))
            if waited > PATIENCE and not told:
                _say_alone(self.launch, here, waited)
                told = True
            time.sleep(0.05)

    def describe(self, rank: int) -> str:
        """A process by its number and its place."""
        with contextlib.suppress(RuntimeError):
            place = self.get(f"name/{rank}")
            return f"process {rank} of {self.launch.size}" + (
                f" ({place.decode()})" if place is not None else " (never started)"
            )
        return f"process {rank} of {self.launch.size}"

    def lost(self) -> list[int]:
        """Processes without a sign of life for too long, of those that have not ended."""
        limit = LOST_AFTER_ERROR if self.suspects else LOST
        now = time.monotonic()
        return [rank for rank, (_, since) in sorted(self._seen.items()) if now - since > limit]

    def leave(self) -> None:
        """Shows no more signs of life, and looks for none."""
        self._over.set()
        self._thread.join(5)

    def _beat(self) -> None:
        """Shows that this process lives, and looks whether those do that it depends on."""
        launch, count = self.launch, 0
        others = range(1, launch.size) if launch.rank == 0 else [0]
        last = begun = time.monotonic()
        while not self._over.wait(BEAT):
            count += 1
            now = time.monotonic()
            held_up, last = now - last - BEAT, now  # this process itself had no time
            try:
                self._beats.set(self.key(f"beat/{launch.rank}"), str(count))
                for rank in others:
                    beat = _read(self._beats, self.key(f"beat/{rank}"))
                    ended = _read(self._beats, self.key(f"ended/{rank}")) is not None
                    before, since = self._seen.get(rank, (b"", begun))
                    if beat is not None and (beat != before or ended):
                        self._seen[rank] = (beat, now)
                    elif beat is None:  # it still starts
                        self._seen[rank] = (b"", now if now - begun < _START else begun)
                    else:
                        self._seen[rank] = (before, since + max(0.0, held_up))
            except RuntimeError:
                if not self._over.is_set():
                    self._abandon([0])  # who keeps the store
                return
            if lost := self.lost():
                self._abandon(lost)
                return
            if launch.rank == 0 and (failed := self._failed(self._beats)) is not None:
                self._abandon([], failed)
                return

    def failed(self) -> str | None:
        """The line about another process that has failed by itself, in the latest job."""
        return self._failed(self._store)

    def _failed(self, store: Any) -> str | None:
        for rank in range(1, self.launch.size):
            report = _read(store, self.key(f"failed/{self.number - 1}/{rank}"))
            if report is not None and (own := pickle.loads(report))[0] == "own":
                place = _read(store, self.key(f"name/{rank}"))
                name = f"process {rank} of {self.launch.size}" + (
                    f" ({place.decode()})" if place is not None else ""
                )
                return (
                    f"processes: expected all {self.launch.size} to run to their end, got from "
                    f"{name}: {own[1]}"
                )
        return None

    def _abandon(self, lost: list[int], failed: str | None = None) -> None:
        """Ends this process, which may be waiting for the others for ever."""
        if self._over.wait(10 + LOST_AFTER_ERROR):  # the main thread has noticed by itself
            return
        if self.launch.rank <= 1 and not self.reported:  # of those that miss the first, one tells
            told = self.message(lost) if failed is None else failed
            print(f"tokenprune: {told}", file=sys.stderr, flush=True)
        if self.launch.rank == 0:
            with contextlib.suppress(RuntimeError):
                self._beats.set(self.key(f"job/{self.number}"), pickle.dumps(2))
                time.sleep(2 * BEAT)  # until the others have heard
        os._exit(2)

    def message(self, lost: list[int]) -> str:
        """The line about lost processes."""
        who = ", ".join(self.describe(rank) for rank in lost)
        return (
            f"processes: expected all {self.launch.size} to run to their end, got: {who} is gone: "
            f"killed, or its machine was. {_ONCE_MORE}"
        )


_ONCE_MORE = (
    "Give the command once more: with ckpt_path=last and hydra.run.dir=<its folder> a training "
    "goes on, an evaluation by hydra.run.dir alone."
)


def _alone(launch: Launch, here: int, waited: float) -> str:
    """The line about processes that have not come, of which there may be none."""
    names = launchers.variables(launch.launcher)
    return (
        f"processes: expected {launch.size}, as {names} say, got {here} in {waited:.0f} s. Start "
        f"the others, or, where this is the only one, unset {names}, which a shell may have kept."
    )


def _say_alone(launch: Launch, here: int, waited: float) -> None:
    line = f"{_alone(launch, here, waited)} It waits until {_START:.0f} s."
    print(f"tokenprune: {line}", file=sys.stderr, flush=True)


def _connect(launch: Launch, leads: bool) -> Any:
    from torch import distributed

    open_store: Any = distributed.TCPStore  # type: ignore[attr-defined]
    hosts = leads and not launch.keeps_store
    try:
        socket.getaddrinfo(launch.address, launch.port)  # the store would ask for minutes
        connect = partial(
            open_store,
            launch.address,
            launch.port,
            None,
            hosts,
            wait_for_workers=False,
            multi_tenant=True,
        )
        if launch.rank != 1:
            return connect(timeout=timedelta(seconds=_START))
        try:  # of those that miss the first, one tells
            store = connect(timeout=timedelta(seconds=PATIENCE))
        except RuntimeError:
            _say_alone(launch, 1, PATIENCE)
            return connect(timeout=timedelta(seconds=_START - PATIENCE))
        store.set_timeout(timedelta(seconds=_START))
        return store
    except (RuntimeError, OSError) as error:
        cause = str(error).strip().splitlines()[0].rstrip(".")
        raise ValueError(
            f"{launch.launcher}: expected all processes to meet at {launch.address}:{launch.port}, "
            f"got: {cause}. Set MASTER_ADDR and MASTER_PORT to a machine and a port that all can "
            "reach."
        ) from error


def _read(store: Any, key: str) -> bytes | None:
    return bytes(store.get(key)) if store.check([key]) else None


# ------------------------------------------------------------------------------------ leading


@contextlib.contextmanager
def led(launch: Launch) -> Iterator[None]:
    """Inside its `with` this process, the first, hands out work; then the others end."""
    global _member
    assert launch.rank == 0
    _member = member = _Member(launch)
    code = 1
    terms = signal.signal(signal.SIGTERM, _terminated)
    try:
        yield
        code = 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 1
        raise
    except ValueError:
        code = 2
        raise
    except KeyboardInterrupt:
        code = 130
        raise
    finally:
        signal.signal(signal.SIGTERM, terms)
        with contextlib.suppress(RuntimeError):
            member.set(f"job/{member.number}", pickle.dumps(code))
            # A signal ends those that still start as well, if they do; else they hear of a mistake.
            _await_end(member, () if code <= 2 else member.absent())
        member.leave()
        _member = None


def _await_end(member: _Member, without: Sequence[int], limit: float = 20.0) -> None:
    """Waits until the others have heard of the end: the store goes with this process."""
    end = time.monotonic() + limit
    waiting = set(range(1, member.launch.size)) - {*without}
    while waiting and time.monotonic() < end:
        waiting = {r for r in waiting if member.get(f"ended/{r}") is None} - {*member.lost()}
        time.sleep(0.02)


def together(function: Callable[..., Any], *arguments: Any) -> Any:
    """Calls a function in all processes of the team at once; by itself where there is none.

    Args:
        function: Of a module, by whose name the others find it.
        arguments: Picklable.

    Returns:
        What it returns here.

    Raises:
        LostProcess: Another process has failed or has gone; says which, and why.
        Exception: What the function raises here, unless that is due to another process.
    """
    member = _member
    if member is None:
        return function(*arguments)
    number = member.number
    if number == 0:
        member.meet()
    member.number += 1
    member.set(f"job/{number}", pickle.dumps((function.__module__, function.__name__, arguments)))
    try:
        value = function(*arguments)
        _await_others(member, number)
    except (Exception, SystemExit) as error:
        # torchrun ends the others of one that is lost: by now that changes nothing.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        _leave_group()
        cause = _blame(member, number, error)
        if cause is None:
            raise
        raise cause from error
    return value


def check() -> None:
    """For loops in which the first process waits for others: ends them where one cannot come.

    Raises:
        LostProcess: One has failed or has gone.
    """
    member = _member
    if member is not None and (member.failed() is not None or member.lost()):
        raise LostProcess("processes: expected all to run to their end.")


def _leave_group() -> None:
    """Lets go of the others, who may be waiting for this process in the middle of a step."""
    from torch import distributed

    if distributed.is_initialized() and distributed.get_backend() == "gloo":
        with contextlib.suppress(RuntimeError):
            distributed.destroy_process_group()


def _await_others(member: _Member, number: int) -> None:
    """Waits until all have done a job."""
    waiting = set(range(1, member.launch.size))
    while waiting:
        waiting = {rank for rank in waiting if member.get(f"done/{number}/{rank}") is None}
        if any(member.get(f"failed/{number}/{rank}") is not None for rank in waiting):
            raise LostProcess("processes: expected all to run to their end.")
        if waiting & {*member.lost()}:
            raise LostProcess("processes: expected all to run to their end.")
        time.sleep(0.02)


def _blame(member: _Member, number: int, error: BaseException) -> LostProcess | None:
    """What another process has to do with an error here; None where it has nothing."""
    own = not isinstance(error, LostProcess | SystemExit) and not _is_broken(error)
    if own:
        return None
    member.suspects = True
    end = time.monotonic() + 3 * LOST_AFTER_ERROR
    others = set(range(1, member.launch.size))
    while time.monotonic() < end:
        reports = {r for r in others if member.get(f"failed/{number}/{r}") is not None}
        if (failed := member.failed()) is not None:
            return LostProcess(failed)
        if lost := [rank for rank in member.lost() if rank not in reports]:
            return LostProcess(member.message(lost))
        ended = {rank for rank in others if member.get(f"done/{number}/{rank}") is not None}
        if others <= ended | reports:
            break
        time.sleep(0.1)
    return None


# ---------------------------------------------------------------------------------- following


def follow(launch: Launch) -> int:
    """Does what the first process hands out, until that ends; the exit code."""
    member = _Member(launch)
    signal.signal(signal.SIGTERM, _terminated)
    number = 0
    try:
        while True:
            job = pickle.loads(_next(member, number))
            if isinstance(job, int):
                return job
            module, name, arguments = job
            try:
                getattr(importlib.import_module(module), name)(*arguments)
            except (Exception, SystemExit) as error:
                # torchrun ends the others of one that is lost, which may be the first.
                signal.signal(signal.SIGTERM, signal.SIG_IGN)
                member.suspects = True
                _leave_group()
                _report(member, number, error)
            else:
                member.set(f"done/{number}/{launch.rank}", "")
            number += 1
    except RuntimeError as error:
        if not _is_broken(error):
            raise
        _orphan(member)  # the first process, and the store with it
    finally:
        with contextlib.suppress(RuntimeError):
            member.set(f"ended/{launch.rank}", "")
        member.leave()


def _next(member: _Member, number: int) -> bytes:
    """The next job; where torchrun ends all, the first process says why, or is the reason."""
    try:
        return member.wait(f"job/{number}")
    except SystemExit:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        member.suspects = True
        return member.wait(f"job/{number}")


def _report(member: _Member, number: int, error: BaseException) -> None:
    """Tells the first process what has gone wrong here."""
    if isinstance(error, SystemExit) or _is_stop(error):
        kind, text = "signal", str(error)
    elif _is_broken(error):
        kind, text = "broken", str(error)
    else:
        member.reported = True
        kind, text = "own", f"{' '.join(str(error).split())} ({type(error).__name__})"
        if not isinstance(error, ValueError | KeyError | OSError):
            traceback.print_exception(error)  # a bug: where
    member.set(f"failed/{number}/{member.launch.rank}", pickle.dumps((kind, text)))


def _is_broken(error: BaseException) -> bool:
    """Whether a library says that another process is gone; not, say, a hub that cannot be had."""
    return isinstance(error, RuntimeError) and _BROKEN.search(str(error)) is not None


def _is_stop(error: BaseException) -> bool:
    """Whether a signal has stopped a training here, as it has all others."""
    return type(error).__name__ == "Stopped"


def _orphan(member: _Member) -> NoReturn:
    if member.launch.rank == 1 and not member.reported:
        print(f"tokenprune: {member.message([0])}", file=sys.stderr, flush=True)
    os._exit(2)


def _terminated(signum: int, frame: object) -> NoReturn:
    raise SystemExit(128 + signum)
