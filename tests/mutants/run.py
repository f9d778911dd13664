"""Puts one fault at a time into the engine and asks the tests: see README.md beside this file."""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import itertools
import json
import os
import queue
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from faults import Fault, faults

ROOT = Path(__file__).resolve().parents[2]
#: Files that get faults, and the tests that concern them, those that find most in least time first.
ENGINE = [
    "tests/test_tensors.py",
    "tests/engine/test_golden.py",
    "tests/engine/test_faults.py",
    "tests/engine/test_hunt.py",
    "tests/engine/test_corners.py",
    "tests/engine/test_cases.py",
    "tests/engine/test_packed.py",
    "tests/engine/test_engine.py",
    "tests/engine/test_overhead.py",
    "tests/engine/test_launches.py",
    "tests/engine/test_needs.py",
    "tests/engine/test_waits.py",
    "tests/engine/test_needs.py",
    "tests/engine/test_merging.py",
    "tests/engine/test_vision.py",
    "tests/engine/test_generation.py",
    "tests/engine/test_oracles.py",
    "tests/families/test_adapters.py",
    "tests/families/test_places.py",
]
PACKED = [
    "tests/engine/test_packed.py",
    "tests/engine/test_cases.py",
    "tests/engine/test_engine.py",
]
CAPTURED = ["tests/engine/test_graphs.py", "tests/engine/test_hunt.py"]
CONCERNED = {
    "tokenprune/schedule.py": ["tests/test_schedule.py", "tests/engine/test_golden.py"],
    "tokenprune/tensors.py": ENGINE,
    "tokenprune/engine/*.py": ENGINE,
    "tokenprune/engine/packing.py": PACKED,
    "tokenprune/engine/sequences.py": PACKED,
    "tokenprune/engine/captured.py": CAPTURED,
    "tokenprune/engine/graphs.py": CAPTURED,
    "tokenprune/engine/modules.py": CAPTURED,
    "tokenprune/engine/trees.py": CAPTURED,
    "tokenprune/engine/settings.py": [*ENGINE, "tests/families/test_positions.py"],
    "tokenprune/cost/*.py": ["tests/cost"],
}
#: Seconds for which a fault may wait for each second of its limit: a machine may be busy.
PATIENCE = 8
#: Files of many like tests, of which every so-manieth is run.
THINNED = {"test_oracles.py": 11, "test_packed.py": 2}
#: Modules that a worker imports before the first fault, and that know nothing of the package.
KNOWN = (
    "hydra", "numpy", "pandas", "pytest", "torch",
    "transformers.generation", "transformers.models.clip.modeling_clip",
    "transformers.models.llama.modeling_llama", "transformers.models.llava.modeling_llava",
    "transformers.models.llava_next.modeling_llava_next",
    "transformers.models.mistral.modeling_mistral",
)  # fmt: skip


# ------------------------------------------------------------------------------------ what to try


def sources(patterns: list[str]) -> dict[str, list[str]]:
    """Files that get faults, with the tests that concern them."""
    found = {}
    for pattern, tests in CONCERNED.items():
        for path in sorted(ROOT.glob(pattern)):
            name = str(path.relative_to(ROOT))
            if not patterns or any(part in name for part in patterns):
                found[name] = tests
    return found


def sample(names: list[str], count: int, least: int, seed: int) -> Iterator[tuple[str, Fault]]:
    """Faults chosen by chance: a share of each file by how many it has, but no fewer than `least`.

    Whatever the count, the faults of a smaller one come first in each file.
    """
    everything = {name: faults((ROOT / name).read_text(encoding="utf-8")) for name in names}
    total = sum(map(len, everything.values()))
    chosen = []
    for name, own in everything.items():
        random.Random(f"{seed} {name}").shuffle(own)
        share = max(least, round(count * len(own) / max(1, total)))
        chosen += [(name, fault) for fault in own[:share]]
    print(f"{total} faults in {len(names)} files, {len(chosen)} of them tried", flush=True)
    random.Random(seed).shuffle(chosen)
    yield from chosen


# ----------------------------------------------------------------------------- a worker's own part


def work(copy: Path) -> None:
    """Tries faults in a copy of the tree, as they come in on the standard input.

    Every fault has a process of its own, forked from this one, which has imported torch and never
    run it.
    """
    sys.dont_write_bytecode = True
    for module in KNOWN:
        __import__(module)
    print("ready", flush=True)
    for line in sys.stdin:
        order = json.loads(line)
        path = copy / order["file"]
        original = path.read_text(encoding="utf-8")
        path.write_text(order["source"], encoding="utf-8")
        try:
            answer = attempt(copy, order["tests"], order["limit"])
        finally:
            path.write_text(original, encoding="utf-8")
        print(json.dumps(answer), flush=True)


def attempt(copy: Path, tests: list[str], limit: float) -> dict[str, object]:
    """Runs the tests in a forked process: whether they pass, and which fails first."""
    log = copy / "log.txt"
    began = time.monotonic()
    child = os.fork()
    if child == 0:
        code = 70
        try:
            os.setsid()
            with log.open("wb") as file:
                os.dup2(file.fileno(), 1)
                os.dup2(file.fileno(), 2)
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            resource.setrlimit(resource.RLIMIT_CPU, (int(limit), int(limit) + 5))
            code = in_child(copy, tests)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    status = None
    while status is None:
        done, state = os.waitpid(child, os.WNOHANG)
        if done:
            status = state
        elif time.monotonic() - began > PATIENCE * limit:
            break
        else:
            time.sleep(0.02)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)  # and whatever it started
    if status is None:
        os.waitpid(child, 0)
    code = "late" if status is None else os.waitstatus_to_exitcode(status)
    text = log.read_text(encoding="utf-8", errors="replace")
    if code == "late" or code == -signal.SIGKILL:
        # Nobody knows: the fault may hang, or the machine is busy. Tried again the next time.
        return {"survived": None, "by": f"exit {code}", "seconds": PATIENCE * limit}
    if code == 70:
        raise RuntimeError(f"pytest could not be run:\n{text[-2000:]}")
    failed = [line for line in text.splitlines() if line.startswith(("FAILED", "ERROR"))]
    by = failed[0].split(" - ")[0].split(" ", 1)[1] if failed else f"exit {code}"
    return {
        "survived": code == 0,
        "by": "" if code == 0 else by,
        "seconds": round(time.monotonic() - began, 1),
    }


def in_child(copy: Path, tests: list[str]) -> int:
    import hypothesis
    import pytest

    # A machine that is busy is no fault.
    everything = list(hypothesis.HealthCheck)
    hypothesis.settings.register_profile("faults", deadline=None, suppress_health_check=everything)
    hypothesis.settings.load_profile("faults")
    os.chdir(copy)
    sys.path[:] = [str(copy), *(part for part in sys.path if part not in (str(ROOT), ""))]
    options = ["-x", "-q", "--durations=0", "-p", "no:cacheprovider", "-p", "no:xdist"]
    options += ["-p", "no:randomly", "--hypothesis-seed=0", "--tb=line"]
    options += ["-W", "ignore:Module already imported:pytest.PytestAssertRewriteWarning"]
    present = [name for name in tests if (copy / name).exists()]
    return int(pytest.main([*options, *present], plugins=[Thinned()]))


class Thinned:
    """A pytest plugin that leaves out most of many tests that are alike."""

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        every = {name: itertools.count() for name in THINNED}
        items[:] = [
            item
            for item in items
            if item.path.name not in THINNED
            or next(every[item.path.name]) % THINNED[item.path.name] == 0
        ]


# ------------------------------------------------------------------------------------- the foreman


class Worker:
    """A process that tries faults in a copy of the tree of its own."""

    def __init__(self, folder: Path) -> None:
        ignored = shutil.ignore_patterns(
            ".*", "__pycache__", "outputs", "multirun", "dist", "build", "experiments"
        )
        shutil.copytree(ROOT, folder, ignore=ignored)
        surroundings = os.environ | {
            "PYTHONPATH": str(folder),
            "OMP_NUM_THREADS": "1",
            "OMP_WAIT_POLICY": "PASSIVE",
            "TORCHDYNAMO_DISABLE": "1",
            "MPLBACKEND": "agg",
        }
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).resolve()), "--worker", str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=surroundings,
            cwd=folder,
        )
        assert self._answer() == "ready"

    def _answer(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError("a worker ended before it answered: its own output says why")
        return line.strip()

    def attempt(self, file: str, source: str, tests: list[str], limit: float) -> dict[str, object]:
        assert self.process.stdin is not None
        order = {"file": file, "source": source, "tests": tests, "limit": limit}
        print(json.dumps(order), file=self.process.stdin, flush=True)
        answer: dict[str, object] = json.loads(self._answer())
        return answer

    def end(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(timeout=60)


def key(file: str, fault: Fault) -> str:
    """Names a fault and all that surrounds it: another source is another fault."""
    return hashlib.sha256(f"{file}\n{fault.source}".encode()).hexdigest()[:16]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files", nargs="*", help="parts of file names; all files without any")
    parser.add_argument("--count", type=int, default=200, help="faults to try, about (200)")
    parser.add_argument("--least", type=int, default=6, help="at least so many of a file (6)")
    parser.add_argument("--seed", type=int, default=0, help="of the choice (0)")
    parser.add_argument("--workers", type=int, default=2, help="processes (2)")
    parser.add_argument(
        "--limit", type=float, default=240, help="seconds of a processor for a fault (240)"
    )
    parser.add_argument("--only", default="", help="faults whose name holds this text, all of them")
    parser.add_argument("--again", action="store_true", help="try those that survived once more")
    parser.add_argument("--results", type=Path, default=ROOT / "outputs" / "mutants.jsonl")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work(options.worker)
        return
    files = sources(options.files)
    chosen = list(sample(list(files), options.count, options.least, options.seed))
    if options.only:
        every = [(name, f) for name in files for f in faults((ROOT / name).read_text("utf-8"))]
        chosen = [(name, fault) for name, fault in every if options.only in f"{name}:{fault.name}"]
    options.results.parent.mkdir(parents=True, exist_ok=True)
    known: dict[str, dict[str, object]] = {}
    if options.results.exists():
        for line in options.results.read_text(encoding="utf-8").splitlines():
            entry = json.loads(line)
            known[entry["key"]] = entry
    todo: queue.SimpleQueue[tuple[str, Fault]] = queue.SimpleQueue()
    for name, fault in chosen:
        entry = known.get(key(name, fault))
        if entry is None or (options.again and entry["survived"]):
            todo.put((name, fault))
    print(f"{len(chosen) - todo.qsize()} known already, {todo.qsize()} to try", flush=True)
    if not todo.empty():
        try_all(todo, files, options, known)
    report([(name, fault, known.get(key(name, fault))) for name, fault in chosen])


def try_all(
    todo: queue.SimpleQueue[tuple[str, Fault]],
    files: dict[str, list[str]],
    options: argparse.Namespace,
    known: dict[str, dict[str, object]],
) -> None:
    """Tries faults in several workers, and writes down each answer as it comes."""
    writing = threading.Lock()

    def foreman(number: int, folder: Path) -> None:
        worker = Worker(folder / str(number))
        for tests in {tuple(tests) for tests in files.values()} if number == 0 else ():
            name = next(iter(files))
            source = (ROOT / name).read_text(encoding="utf-8")
            sound = worker.attempt(name, source, list(tests), 4 * options.limit)
            print(f"without a fault: {sound['seconds']} s", flush=True)
            if not sound["survived"]:
                print(f"the tests fail without a fault, too: {sound['by']}", flush=True)
                os._exit(1)
        while True:
            try:
                name, fault = todo.get_nowait()
            except queue.Empty:
                break
            answer = worker.attempt(name, fault.source, files[name], options.limit)
            entry = {"key": key(name, fault), "file": name, "fault": fault.name, **answer}
            if answer["survived"] is None:
                print(f"{name}:{fault.name}\n    undecided: {answer['by']}", flush=True)
                continue
            with writing:
                known[str(entry["key"])] = entry
                with options.results.open("a", encoding="utf-8") as file:
                    print(json.dumps(entry), file=file)
                found = "SURVIVED" if answer["survived"] else answer["by"]
                print(f"{name}:{fault.name}\n    {answer['seconds']} s {found}", flush=True)
        worker.end()

    with tempfile.TemporaryDirectory() as folder:
        threads = [
            threading.Thread(target=foreman, args=(number, Path(folder)))
            for number in range(options.workers)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()


def report(tried: list[tuple[str, Fault, dict[str, object] | None]]) -> None:
    """Prints how many faults of each file were found, and those that were not."""
    count, survived = Counter(), Counter()
    for name, _, entry in tried:
        if entry is not None:
            count[name] += 1
            survived[name] += bool(entry["survived"])
    print(f"\n{'file':40} tried killed survived")
    for name in sorted(count):
        killed = count[name] - survived[name]
        print(f"{name:40} {count[name]:5} {killed:6} {survived[name]:8}")
    total, alive = count.total(), survived.total()
    if total:
        print(f"{'all':40} {total:5} {total - alive:6} {alive:8}  {1 - alive / total:.1%} killed\n")
    for name, fault, entry in sorted(tried, key=lambda item: item[0]):
        if entry is not None and entry["survived"]:
            print(f"{name}:{fault.name}")


if __name__ == "__main__":
    main()
