"""The command as a process: Ctrl-C at any time, and readers that go away."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import pytorch_lightning as pl
from commands import COMMAND, TINY, random_llava

STOPPED = "tokenprune: stopped"


@pytest.mark.parametrize(
    "module", ["difflib", "omegaconf", "hydra", "numpy", "torch._C", "torch", "transformers"]
)
def test_ctrl_c_while_it_imports(module: str) -> None:
    """The signal comes as soon as the module is there, in the middle of the next import."""
    code = COMMAND[-1]
    with subprocess.Popen(
        [sys.executable, "-X", "importtime", "-c", code, "eval"],
        stderr=subprocess.PIPE,
        text=True,
    ) as child:
        try:
            assert child.stderr is not None
            said = []
            for line in child.stderr:
                if not line.startswith("import time:"):
                    said.append(line.strip())
                elif line.split("|")[-1].strip() == module:
                    child.send_signal(signal.SIGINT)
            assert child.wait(120) == 130
        finally:
            child.kill()
    assert said == [STOPPED]
    assert list(Path().iterdir()) == []


class Interrupt(pl.Callback):
    """Ends a run as Ctrl-C does."""

    def on_predict_batch_end(self, *arguments: object) -> None:
        os.kill(os.getpid(), signal.SIGINT)


def test_ctrl_c_in_a_run_leaves_nothing(checkpoint: Path) -> None:
    own = [
        *random_llava(checkpoint),
        *TINY,
        "trainer.callbacks=[{_target_:test_process.Interrupt}]",
    ]
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    run = subprocess.run(
        [*COMMAND, "eval", *own],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert (run.returncode, run.stderr.splitlines()) == (130, [STOPPED])
    assert list(Path().iterdir()) == []


def test_ctrl_c_is_told_by_the_first_process_only(tmp_path: Path) -> None:
    """Others, which a trainer starts by the console script once more, end without a word."""
    script = tmp_path / "script.py"
    script.write_text(
        "import multiprocessing, signal\n"
        "from tokenprune.cli.__main__ import console\n"
        "def tell(): print(signal.getsignal(signal.SIGINT) == signal.SIG_DFL, flush=True)\n"
        "if __name__ == '__main__':\n"
        "    child = multiprocessing.get_context('spawn').Process(target=tell)\n"
        "    child.start(), child.join(60), tell()\n"
    )
    run = subprocess.run(
        [sys.executable, script], capture_output=True, text=True, timeout=300, check=True
    )
    assert run.stdout.split() == ["True", "False"]


def test_where_ctrl_c_is_ignored_it_stays_so() -> None:
    """As for a script's background."""
    code = (
        "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        "from tokenprune.cli import process; process.begin()\n"
        "with process.Interruptible(): signal.raise_signal(signal.SIGINT)\n"
        "signal.raise_signal(signal.SIGINT)\n"
    )
    subprocess.run([sys.executable, "-c", code], timeout=120, check=True)


# ------------------------------------------------------------------------------------------ readers


@pytest.fixture
def unread() -> Iterator[int]:
    """A pipe that nobody reads."""
    reader, writer = os.pipe()
    os.close(reader)
    yield writer
    os.close(writer)


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize(
    "command", ["", "--help", "--version", "list", "eval --cfg job", "eval --help", "flops --csv"]
)
def test_a_reader_that_goes_away_is_no_error(command: str, unbuffered: str, unread: int) -> None:
    run = subprocess.run(
        [*COMMAND, *command.split()],
        env=os.environ | {"PYTHONUNBUFFERED": unbuffered},
        stdout=unread,
        stderr=subprocess.PIPE,
        timeout=120,
        check=False,
    )
    assert run.stderr == b""
    assert run.returncode == (0 if command else 2)


def test_nor_is_one_of_errors(unread: int) -> None:
    run = subprocess.run([*COMMAND, "evla"], stderr=unread, timeout=120, check=False)
    assert run.returncode == 2


def test_nor_is_one_that_was_never_there() -> None:
    """`tokenprune list >&-`."""
    run = subprocess.run(
        ["sh", "-c", '"$@" >&-', "sh", *COMMAND, "flops", "model=tiny"],
        capture_output=True,
        timeout=120,
        check=False,
    )
    assert (run.returncode, run.stderr) == (0, b"")


def test_a_run_goes_on_without_its_reader(checkpoint: Path, unread: int) -> None:
    own = [*random_llava(checkpoint), *TINY, "data.test.num_samples=2", "hydra.run.dir=run"]
    run = subprocess.run(
        [*COMMAND, "eval", *own], stdout=unread, stderr=subprocess.PIPE, timeout=300, check=False
    )
    assert (run.returncode, run.stderr) == (0, b"")
    assert json.loads(Path("run/metrics.json").read_text())["num_samples"] == 2


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_a_full_disk_is_told() -> None:
    with open("/dev/full", "w") as full:
        run = subprocess.run(
            [*COMMAND, "list"], stdout=full, stderr=subprocess.PIPE, text=True, timeout=120,
            check=False,
        )  # fmt: skip
    assert run.returncode == 2
    assert run.stderr.startswith("tokenprune: output: expected to write it, got: [Errno 28]")
    assert run.stderr.count("\n") == 1
