"""What cannot be written: one line that names the path and the cause; what was there stays."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from benches import TINY as TINY_BENCH
from commands import COMMAND, TINY, random_llava
from PIL import Image
from processes import run
from synthetic_sweep import write_sweep
from torch.multiprocessing.spawn import ProcessRaisedException

from tokenprune import __version__
from tokenprune.cli import main as cli
from tokenprune.cli.mistakes import explain

TOO_LONG = "x" * 300
#: A training of one step on two samples.
STEP = [
    *("trainer.callbacks=[]", "+trainer.enable_progress_bar=false", "trainer.max_steps=1"),
    *("data.batch_size=2", "data.train.num_samples=2", "data.validation.num_samples=2"),
]


def command(name: str, checkpoint: Path) -> list[str]:
    """A command that writes what it can, into `run`."""
    if name == "bench":
        return ["bench", "prefill", *TINY_BENCH, "hydra.run.dir=run"]
    if name == "report":
        return ["report", "run"]
    if name == "flops":
        return ["flops", "model=tiny", "--output=run/costs.png"]
    own = random_llava(checkpoint)
    if name == "show":
        Image.new("RGB", (32, 32), "red").save("picture.png")
        return ["show", "picture.png", "what is this ?", *own, "--output=run/shown.png"]
    more = STEP if name == "train" else [*TINY, "data.test.num_samples=2"]
    return [name, *own, *more, "hydra.run.dir=run"]


@contextmanager
def limited(size: int) -> Iterator[None]:
    """Files end at so many bytes inside its `with`, as on a full disk: `ulimit -f`."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    writes = sys.dont_write_bytecode
    sys.dont_write_bytecode = True  # as the console script does, or modules would be cut off
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        sys.dont_write_bytecode = writes


def refusal(arguments: list[str], capsys: pytest.CaptureFixture[str], size: int = 2**30) -> str:
    """What a command says that cannot write: one line, code 2; and how to go on, if it can."""
    capsys.readouterr()
    with limited(size):
        code = cli.main(arguments)
    error = capsys.readouterr().err
    assert code == 2, error
    assert error.startswith("tokenprune: files: expected to read and write what a run needs, got")
    lines = [line for line in error.splitlines() if "what is done is kept" not in line]
    assert len(lines) == 1, error
    return lines[0]


def contents(folder: str = ".") -> dict[Path, bytes | None]:
    """Every file of a folder with its bytes, and every folder."""
    return {p: p.read_bytes() if p.is_file() else None for p in sorted(Path(folder).rglob("*"))}


# ------------------------------------------------------------------------------------- run folders


def _file() -> None:
    Path("way").write_text("mine")


def _dangling() -> None:
    Path("way").symlink_to("nowhere")


def fair(cases: Sequence[tuple[Any, ...]]) -> list[Any]:
    """Every third case by default, all of them by `make test-all`: each runs a command."""
    matrix = pytest.mark.matrix
    return [
        pytest.param(*case, marks=() if number % 3 == 0 else matrix)
        for number, case in enumerate(cases)
    ]


FOLDERS = [
    (_file, "way", errno.EEXIST),
    (_file, "way/sub/folder", errno.ENOTDIR),
    (_dangling, "way", errno.EEXIST),
    (_file, TOO_LONG, errno.ENAMETOOLONG),
    (_file, f"{TOO_LONG}/sub", errno.ENAMETOOLONG),
]


@pytest.mark.parametrize("key", ["hydra.run.dir", "hydra.sweep.dir"])
@pytest.mark.parametrize("name", fair([("eval",), ("train",), ("bench",)]))
@pytest.mark.parametrize(
    ("obstacle", "folder", "number"), FOLDERS, ids=["file", "below", "link", "long", "long below"]
)
@pytest.mark.share(4)
def test_f1_a_run_s_folder_that_cannot_be_made(
    name: str,
    key: str,
    obstacle: Callable[[], None],
    folder: str,
    number: int,
    checkpoint: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    obstacle()
    before = contents()
    own = ["-m", "seed=0"] if key == "hydra.sweep.dir" else []
    message = refusal([*command(name, checkpoint)[:-1], *own, f"{key}={folder}"], capsys)
    assert f"[Errno {number}] {os.strerror(number)}" in message
    assert folder.partition("/")[0] in message
    assert contents() == before


@pytest.mark.matrix
def test_f1_hydra_s_own_files(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own = [*command("eval", checkpoint), "hydra.output_subdir=own"]
    assert "run" in refusal(own, capsys, 256)
    Path("run/tokenprune.log").mkdir(parents=True)
    own = [*command("eval", checkpoint), "hydra/job_logging=default"]
    assert "run/tokenprune.log" in refusal(own, capsys)


# ------------------------------------------------------------------------------------------ writers

#: What each command writes, and is in the way of: a folder where a file goes, or the reverse.
WRITERS = [
    *(
        ("eval", file)
        for file in ("config.yaml", "versions.json", "predictions.jsonl", "kept.json")
    ),
    *(("eval", file) for file in ("metrics.json", "images", "csv", "csv/metrics.csv")),
    *(("train", file) for file in ("config.yaml", "versions.json", "training.json", "csv")),
    *(("train", file) for file in ("csv/metrics.csv", "checkpoints", "checkpoints/last.ckpt")),
    *(("train", file) for file in ("checkpoints/best.ckpt", "model")),
    *(("bench", file) for file in ("config.yaml", "bench.json", "bench.csv", "bench.png")),
    *(("report", file) for file in ("report.html", "figures")),
    ("show", "shown.png"),
    ("flops", "costs.png"),
]


@pytest.mark.parametrize(("name", "path"), fair(WRITERS))
@pytest.mark.share(4)
def test_f1_something_in_the_way_of_a_file(
    name: str, path: str, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if name == "report":
        write_sweep(Path("run"), lams=(0.5,), num_stages=(2,), num_pictures=1)
    way = Path("run", path)
    way.parent.mkdir(parents=True, exist_ok=True)
    if way.suffix:
        (way / "mine").mkdir(parents=True)
    else:
        way.write_text("mine")
    before = contents("run")
    own = ["logger=csv"] if name == "eval" else []
    assert str(way) in refusal([*command(name, checkpoint), *own], capsys)
    after = contents("run")
    assert {place: after[place] for place in before} == before
    assert not [place for place in after if place.name.endswith(".draft")]


#: Commands, bytes at which their files end, and which file is the first to be longer.
SIZES = [
    ("eval", 4096, "images/"),
    ("eval", 16, "parts/"),
    ("train", 1024, "config.yaml"),
    ("train", 16384, "checkpoints/last.ckpt"),
    ("bench", 512, "config.yaml"),
    ("bench", 16384, "bench.png"),
    ("report", 1024, "figures/"),
    ("show", 512, "shown.png"),
    ("flops", 1024, "costs.png"),
]


@pytest.mark.parametrize(("name", "size", "path"), fair(SIZES))
@pytest.mark.share(3)
def test_f1_a_full_disk(
    name: str, size: int, path: str, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if name == "report":
        write_sweep(Path("run"), lams=(0.5,), num_stages=(2,), num_pictures=1)
    own = command(name, checkpoint)
    message = refusal(own, capsys, size)
    assert "[Errno 27] File too large" in message
    assert f"run/{path}" in message
    assert "ulimit -f" in message
    assert not list(Path().rglob("*.draft"))


@pytest.mark.matrix
def test_f1_models_that_do_not_fit(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """safetensors has words of its own for that; a training that begins anew removes the old."""
    own = [*command("train", checkpoint), "parts=[projector]"]
    assert cli.main(own) == 0
    assert "run/model" in refusal(own, capsys, 2**17)
    assert not Path("run/model").exists()
    assert not list(Path().rglob("*.draft"))


@pytest.mark.parametrize("size", [16, 128, 1024])
@pytest.mark.share(3)
def test_f1_an_evaluation_that_does_not_fit_leaves_the_one_before(
    size: int, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = [*command("eval", checkpoint), "logger=csv"]
    assert cli.main(own) == 0
    before = contents("run")
    refusal([*own, "seed=1"], capsys, size)
    after = contents("run")
    if size == 1024:  # a curve is short, and comes first: a run is complete with its own files
        before = {path: content for path, content in before.items() if "csv" not in path.parts}
    assert {place: after[place] for place in before} == before
    shutil.rmtree("run")


def test_f1_a_table_that_cannot_be_written_leaves_the_runs(
    checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("all/results.csv/mine").mkdir(parents=True)
    own = [*command("eval", checkpoint)[:-1], "-m", "seed=0,1", "hydra.sweep.dir=all"]
    assert "all/results.csv" in refusal(own, capsys)
    assert len(list(Path("all").glob("*/metrics.json"))) == 2
    shutil.rmtree("all/results.csv")
    assert cli.main(own) == 0
    assert capsys.readouterr().out.count("complete already") == 2


def test_f1_something_in_the_way_of_tensorboard(
    checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("tensorboard")
    Path("run").mkdir()
    Path("run/tensorboard").write_text("mine")
    assert "run/tensorboard" in refusal(
        [*command("eval", checkpoint), "logger=tensorboard"], capsys
    )


@pytest.mark.parametrize(
    ("logger", "size"),
    [
        pytest.param("none", 1024, marks=pytest.mark.matrix),
        ("none", 0),
        pytest.param("csv", 1024, marks=pytest.mark.matrix),
        pytest.param("tensorboard", 64, marks=pytest.mark.matrix),
    ],
    ids=["files", "not even temporary ones", "csv", "tensorboard"],
)
@pytest.mark.matrix
def test_f1_as_a_process(logger: str, size: int, checkpoint: Path) -> None:
    """With the limit from the start; what is printed goes to pipes, which have none."""
    if logger == "tensorboard":  # writes from a thread
        pytest.importorskip("tensorboard")
    limit = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({size}, {size})); "
    start = [*COMMAND[:2], limit + COMMAND[2]]
    done = run([*start, *command("eval", checkpoint), f"logger={logger}"], 2)
    assert done.stderr.startswith("tokenprune: files: expected to read and write what a run needs")
    more = done.stderr.splitlines()[1:]
    # Answers may have been noted by then, to go on from.
    assert all("what is done is kept" in line for line in more), done.stderr
    assert more or list(Path().iterdir()) == []


def test_f1_no_module_is_cut_off(tmp_path: Path) -> None:
    """Python takes a .pyc file that was written in part for a whole one, for ever."""
    own = os.environ | {"PYTHONPYCACHEPREFIX": str(tmp_path / "compiled")}
    run([*COMMAND, "--version"], env=own)
    for path in tmp_path.rglob("tokenprune/**/*.pyc"):  # of the library they are whole everywhere
        path.unlink()
    limited = ["sh", "-c", 'ulimit -f 1; exec "$@"', "sh", *COMMAND, "--version"]
    for command in (limited, limited, [*COMMAND, "--version"]):
        assert run(command, env=own).stdout == f"{__version__}\n"
    assert list(tmp_path.rglob("tokenprune/**/*.pyc"))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_f1_costs_for_a_full_disk() -> None:
    with open("/dev/full", "w") as full:
        done = run([*COMMAND, "flops", "--csv", "model=tiny"], 2, stdout=full)
    assert done.stderr.startswith("tokenprune: output: expected to write it, got: [Errno 28]")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("path", ["'/there/config.yaml'", None])
def test_f1_in_another_process(path: str | None) -> None:
    """The process that started it has its exception as text."""
    end = "OSError: [Errno 28] No space left on device" + ("" if path is None else f": {path}")
    text = f"-- Process 0 terminated with the following error:\nTraceback ...\n{end}\n"
    told = explain(ProcessRaisedException(text, 0, 1), Path("/there"))
    assert told is not None
    assert f"got: [Errno 28] No space left on device: {path or repr('/there')}. Make room" in told


def test_f1_memory_that_processes_share() -> None:
    """Is files in /dev/shm: torch says so in words of its own."""
    text = "unable to resize file </torch_7_1_2> to the right size: No space left on device (28)"
    told = explain(RuntimeError(text))
    assert told is not None
    assert "got: [Errno 28] No space left on device: </torch_7_1_2>. Make room" in told
    assert explain(RuntimeError("unable to agree on this (2)")) is None


def test_f1_other_errors_of_the_system_are_none_of_the_disk_s() -> None:
    assert explain(OSError(errno.ENOMEM, "Cannot allocate memory"), Path("there")) is None
