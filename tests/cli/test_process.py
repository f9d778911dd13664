"""The command as a process: Ctrl-C at any time, and readers that go away."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from subprocess import PIPE

import pytest
from commands import COMMAND, TINY, random_llava
from processes import run, started

from tokenprune.cli import main as cli

STOPPED = "tokenprune: stopped"


@pytest.mark.parametrize(
    "module", ["difflib", "omegaconf", "hydra", "numpy", "torch._C", "torch", "transformers"]
)
@pytest.mark.share(4)
def test_ctrl_c_while_it_imports(module: str) -> None:
    """The signal comes as soon as the module is there, in the middle of the next import."""
    code = COMMAND[-1]
    command = [sys.executable, "-X", "importtime", "-c", code, "eval"]
    with started(command, stderr=PIPE) as child:
        assert child.stderr is not None
        said = []
        for line in child.stderr:
            if not line.startswith("import time:"):
                said.append(line.strip())
            elif line.split("|")[-1].strip() == module:
                child.send_signal(signal.SIGINT)
        assert child.wait() == 130
    assert said == [STOPPED]
    assert list(Path().iterdir()) == []


def test_ctrl_c_in_a_run_keeps_its_answers(checkpoint: Path) -> None:
    own = [
        "eval",
        *random_llava(checkpoint),
        *TINY,
        "data.test.num_samples=8",
        "hydra.run.dir=a run",
    ]
    trained = Path(
        "a run/checkpoints"
    )  # a folder that was another command's; its link leads nowhere
    trained.mkdir(parents=True)
    (trained / "last.ckpt").symlink_to("gone")
    done = run([*COMMAND, *own, "trainer.callbacks=[{_target_:stops.Interrupt}]"], 130)
    kept, stopped = done.stderr.splitlines()
    again = f"the same command with 'hydra.run.dir={Path.cwd()}/a run'"
    assert kept == f"tokenprune: what is done is kept. To go on: {again}"
    assert stopped == STOPPED
    (notes,) = Path("a run/parts").iterdir()
    first = json.loads(notes.read_text())
    first["records"][0]["prediction"] = "noted"  # it is not asked again
    notes.write_text(json.dumps(first) + "\n")
    assert cli.main([*own, "trainer.callbacks=[]"]) == 0
    rows = Path("a run/predictions.jsonl").read_text().splitlines()
    assert [json.loads(row)["prediction"] == "noted" for row in rows] == [True, *[False] * 7]
    assert not Path("a run/parts").exists()


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
    assert run([sys.executable, str(script)]).stdout.split() == ["True", "False"]


def test_where_ctrl_c_is_ignored_it_stays_so() -> None:
    """As for a script's background."""
    code = (
        "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        "from tokenprune.cli import process; process.begin()\n"
        "with process.Interruptible(): signal.raise_signal(signal.SIGINT)\n"
        "signal.raise_signal(signal.SIGINT)\n"
    )
    run([sys.executable, "-c", code])


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
@pytest.mark.share(4)
def test_a_reader_that_goes_away_is_no_error(command: str, unbuffered: str, unread: int) -> None:
    own = os.environ | {"PYTHONUNBUFFERED": unbuffered}
    done = run([*COMMAND, *command.split()], 0 if command else 2, env=own, stdout=unread)
    assert done.stderr == ""


def test_nor_is_one_of_errors(unread: int) -> None:
    run([*COMMAND, "evla"], 2, stderr=unread)


def test_nor_is_one_that_was_never_there() -> None:
    """`tokenprune list >&-`."""
    done = run(["sh", "-c", '"$@" >&-', "sh", *COMMAND, "flops", "model=tiny"])
    assert done.stderr == ""


@pytest.mark.matrix
def test_a_run_goes_on_without_its_reader(checkpoint: Path, unread: int) -> None:
    own = [*random_llava(checkpoint), *TINY, "data.test.num_samples=2", "hydra.run.dir=run"]
    assert run([*COMMAND, "eval", *own], stdout=unread).stderr == ""
    assert json.loads(Path("run/metrics.json").read_text())["num_samples"] == 2


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_a_full_disk_is_told() -> None:
    with open("/dev/full", "w") as full:
        done = run([*COMMAND, "list"], 2, stdout=full)
    assert done.stderr.startswith("tokenprune: output: expected to write it, got: [Errno 28]")
    assert done.stderr.count("\n") == 1
