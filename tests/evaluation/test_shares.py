"""An evaluation that several share comes to the same, whoever is lost on the way."""

from __future__ import annotations

import contextlib
import json
import re
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from checkpoint import save_checkpoint
from commands import COMMAND
from oracles import decided
from processes import run
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset

from tokenprune.cli.configs import compose
from tokenprune.data.module import VQADataModule
from tokenprune.evaluation.loading import RememberedBatches
from tokenprune.evaluation.run import evaluate
from tokenprune.evaluation.shares import NOTES, Notes, Share
from tokenprune.runs import results, targets
from tokenprune.runs.devices import parse_shard

NAMES = {"strategy": "uniform", "schedule": "pyramid", "model": "random", "data": "scenes"}
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--no-python"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("checkpoint"))


def overrides(checkpoint: Path, *more: str) -> list[str]:
    own = ["model=hub", f"model.path={checkpoint}", "data.test.num_samples=11", "num_pictures=3"]
    own += ["data.batch_size=2", "max_new_tokens=2", "strategy=uniform"]
    return [*own, "trainer.callbacks=[]", "+trainer.enable_progress_bar=false", *more]


def share(checkpoint: Path, folder: Path, *more: str) -> Any:
    with decided():
        return evaluate(compose("eval", overrides(checkpoint, *more)), folder, NAMES)


@pytest.fixture(scope="module")
def whole(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    share(checkpoint, folder)
    return folder


def assert_same(folder: Path, whole: Path) -> None:
    """The same table row for row, the same pictures, and nothing else left."""
    for name in (results.PREDICTIONS, results.KEPT, results.CONFIG):
        assert (folder / name).read_text() == (whole / name).read_text(), name
    own, other = (results.read_metrics(each) for each in (folder, whole))
    del own["prefill_ms"], other["prefill_ms"]
    assert own == other
    assert {p.name for p in folder.rglob("*")} == {p.name for p in whole.rglob("*")}


class Lost(pl.Callback):
    """Takes a process from an evaluation after its second batch, as `kill -9` does."""

    def on_predict_batch_end(self, *arguments: Any) -> None:
        if arguments[4] == 1:
            raise ZeroDivisionError


def test_shards_come_to_one_table_whoever_ends_last(checkpoint: Path, whole: Path, tmp_path: Path):
    assert share(checkpoint, tmp_path, "shard=2/3") is None
    assert share(checkpoint, tmp_path, "shard=0/3") is None
    assert share(checkpoint, tmp_path, "shard=0/3") is None  # once more: nothing is doubled
    assert not (tmp_path / results.METRICS).exists()
    metrics = share(checkpoint, tmp_path, "shard=1/3")
    assert metrics["num_samples"] == 11
    assert_same(tmp_path, whole)
    assert share(checkpoint, tmp_path, "shard=2/3") == metrics  # complete already


def test_a_shard_that_was_killed_is_resumed_alone(
    checkpoint: Path, whole: Path, tmp_path: Path
) -> None:
    lost = f"trainer.callbacks=[{{_target_:{__name__}.Lost}}]"
    with pytest.raises(ZeroDivisionError):
        share(checkpoint, tmp_path, "shard=1/2", lost)
    (path,) = (tmp_path / NOTES).iterdir()
    first = path.read_text()
    assert len(first.splitlines()) == 2
    path.write_text(first + first[:50])  # and in the middle of a line
    assert share(checkpoint, tmp_path, "shard=1/2") is None
    assert path.read_text().startswith(first)
    asked = [
        n for line in path.read_text().splitlines() for n in json.loads(line).get("numbers", [])
    ]
    assert asked == [1, 3, 5, 7, 9]
    share(checkpoint, tmp_path, "shard=0/2")
    assert_same(tmp_path, whole)


def test_a_lone_run_that_was_killed_goes_on(
    checkpoint: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lost = f"trainer.callbacks=[{{_target_:{__name__}.Lost}}]"
    with pytest.raises(ZeroDivisionError):
        share(checkpoint, tmp_path, lost)
    noted: list[int] = []
    add = Notes.add

    def listen(self: Notes, rank: int, size: int, note: Any) -> None:
        noted.extend(note.get("numbers", []))
        add(self, rank, size, note)

    monkeypatch.setattr(Notes, "add", listen)
    assert share(checkpoint, tmp_path)["num_samples"] == 11
    assert noted == [4, 5, 6, 7, 8, 9, 10]
    assert_same(tmp_path, whole)


def test_one_process_goes_on_with_what_several_had_begun(
    checkpoint: Path, whole: Path, tmp_path: Path
) -> None:
    share(checkpoint, tmp_path, "shard=3/4")
    notes = next((tmp_path / NOTES).iterdir())
    before = notes.read_text()
    share(checkpoint, tmp_path, "seed=5", "num_pictures=0", "shard=0/2")  # another evaluation
    assert notes.read_text() == before
    assert share(checkpoint, tmp_path)["num_samples"] == 11
    assert_same(tmp_path, whole)


def test_a_shard_that_never_ends_is_named(tmp_path: Path) -> None:
    notes = Notes(tmp_path, "mark")
    notes.add(0, 2, {"numbers": [0], "seconds": 1.0, "records": [{}]})
    notes.add(0, 2, {"ends": [0, 2]})
    begun = time.monotonic()
    late = threading.Timer(
        0.3, notes.add, (1, 2, {"numbers": [1], "seconds": 1.0, "records": [{}]})
    )
    late.start()
    with pytest.raises(
        ValueError, match=r"an answer of process 1 of 2 within shard_timeout=0.5 .*2 a"
    ):
        notes.wait(2, 0.5)
    late.join()
    assert time.monotonic() - begun > 0.7  # its answer has bought it time
    notes.add(1, 2, {"ends": [1, 2]})
    notes.wait(2, 0.5)


def test_notes_are_lines_whatever_texts_hold(tmp_path: Path) -> None:
    """Other ends of lines are part of a text; a torn line of another process is passed over."""
    notes = Notes(tmp_path, "mark")
    for number in range(4):
        records = [{"prediction": f"a\u2028b\u0085c {number}"}]
        notes.add(number % 2, 2, {"numbers": [number], "seconds": 1.0, "records": records})
    whole, _ = notes.answers()
    assert sorted(whole) == [0, 1, 2, 3]
    assert whole[2]["prediction"] == "a\u2028b\u0085c 2"
    path = notes.path(1, 2)
    line = path.read_bytes().rstrip(b"\n")
    path.write_bytes(line[: line.index("\u2028".encode(), line.index(b"[3]")) + 1])
    assert sorted(notes.answers()[0]) == [0, 1, 2]


def test_another_trainer_s_answers_are_another_evaluation_s(tmp_path: Path) -> None:
    def mark(**trainer: Any) -> str:
        return Notes.of(tmp_path, {"strategy": "none", "trainer": trainer}, {}).mark

    assert mark(devices=1, precision=None) == mark(devices=4)
    assert len({mark(), mark(precision="bf16-mixed"), mark(limit_predict_batches=1)}) == 3


@pytest.mark.parametrize("limit", [2, 0.5])
def test_a_limit_is_of_all_samples_however_many_share_them(
    checkpoint: Path, tmp_path: Path, limit: float
) -> None:
    """Two batches of two, or half of six: as many as one process asks, also after a loss."""
    own = f"trainer.limit_predict_batches={limit}"
    share(checkpoint, tmp_path / "whole", own)
    expected = results.read_metrics(tmp_path / "whole")["num_samples"]
    assert expected == (4 if limit == 2 else 6)
    lost = f"trainer.callbacks=[{{_target_:{__name__}.Lost}}]"
    with contextlib.suppress(ZeroDivisionError):
        share(checkpoint, tmp_path / "parts", own, "shard=1/2", lost)
    share(checkpoint, tmp_path / "parts", own, "shard=1/2")
    metrics = share(checkpoint, tmp_path / "parts", own, "shard=0/2")
    assert metrics["num_samples"] == expected
    asked, theirs = ((tmp_path / n / results.PREDICTIONS).read_text() for n in ("parts", "whole"))
    assert asked == theirs


def test_a_limit_of_less_than_a_batch_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="limit_predict_batches: expected one batch at least"):
        share(checkpoint, tmp_path, "trainer.limit_predict_batches=0.01", "shard=0/2")


def test_a_shard_is_a_number_of_several(checkpoint: Path, tmp_path: Path) -> None:
    assert parse_shard(None) is None
    assert parse_shard("3/8") == (3, 8)
    for wrong in ("8/8", "1", 3, "-1/2", "a/b", ""):
        with pytest.raises(ValueError, match="shard: expected null, or a number and how many"):
            parse_shard(wrong)
    with pytest.raises(ValueError, match=r"shard: expected at most one .* got 12 for 11. Lower"):
        share(checkpoint, tmp_path, "shard=1/12")


def command(checkpoint: Path, *more: str) -> list[str]:
    return [*COMMAND, "eval", *overrides(checkpoint, "hydra.run.dir=run", *more)]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return Path("run")


def told(said: str) -> str:
    """The one thing that went wrong, beside what the first process says of how to go on."""
    line, *more = re.findall(r"tokenprune: .*", said)
    assert all("what is done is kept. To go on: the same command" in own for own in more)
    return str(line)


def predictions(folder: Path) -> list[str]:
    return (folder / results.PREDICTIONS).read_text().splitlines()


@pytest.mark.matrix
@pytest.mark.parametrize("starts", ["torchrun", "own"])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_process_of_several(
    checkpoint: Path, folder: Path, starts: str, rank: int
) -> None:
    launcher = TORCHRUN if starts == "torchrun" else []
    two = ["trainer=ddp", "trainer.accelerator=cpu", "shard_timeout=60"]
    two += [] if launcher else ["trainer.devices=2"]
    fails = f"trainer.callbacks=[{{_target_:failures.Fail,rank:{rank},at:2,failure:kill}}]"
    done = run([*launcher, *command(checkpoint, *two, fails)], None)
    assert done.returncode != 0
    assert re.search(rf"process {rank}\b.*(killed|SIGKILL)", told(done.stderr))
    answered = len(Notes(folder, "*").answers()[0])
    assert 2 <= answered < 11
    run([*launcher, *command(checkpoint, *two)])
    assert len(predictions(folder)) == 11
    run(command(checkpoint, "hydra.run.dir=whole"))
    assert predictions(folder) == predictions(Path("whole"))
    assert not (folder / NOTES).exists()


@pytest.mark.matrix
@pytest.mark.parametrize("starts", ["torchrun", "own"])
def test_a_process_that_hangs_is_named(checkpoint: Path, folder: Path, starts: str) -> None:
    launcher = TORCHRUN if starts == "torchrun" else []
    two = ["trainer=ddp", "trainer.accelerator=cpu", "shard_timeout=5"]
    two += [] if launcher else ["trainer.devices=2"]
    hangs = "trainer.callbacks=[{_target_:failures.Fail,rank:1,at:2,failure:hang}]"
    done = run([*launcher, *command(checkpoint, *two, hangs)], None)
    assert done.returncode != 0
    assert "expected an answer of process 1 of 2 within shard_timeout=5 seconds" in told(
        done.stderr
    )
    assert len(Notes(folder, "*").answers()[0]) >= 2


@pytest.mark.matrix
def test_a_full_disk_of_one_process(checkpoint: Path, folder: Path) -> None:
    two = ["trainer=ddp", "trainer.accelerator=cpu", "shard_timeout=60"]
    fails = "trainer.callbacks=[{_target_:failures.Fail,rank:1,at:1,failure:disk,size:500}]"
    done = run([*TORCHRUN, *command(checkpoint, *two, fails)], 1)
    assert re.search(r"process 1 of 2 .*: \[Errno 27\] File too large: .*parts", told(done.stderr))
    run([*TORCHRUN, *command(checkpoint, *two)])
    assert len(predictions(folder)) == 11


# --------------------------------------------------------------------- data modules of one's own


class Own(VQADataModule):
    """Gives the samples in an order that only its loader knows, or in other ways of its own."""

    collated = 0  # batches

    def predict_dataloader(self) -> Any:
        whole = super().predict_dataloader()
        collate = whole.collate_fn

        def count(samples: Any) -> Any:
            Own.collated += 1
            return collate(samples)

        return self.loader(whole.dataset, count)

    def loader(self, data: Any, collate: Any) -> Any:
        return DataLoader(data, 2, collate_fn=collate)


class Sampled(Own):
    def loader(self, data: Any, collate: Any) -> Any:
        return DataLoader(data, 2, sampler=[10, 4, 7, 3, 0], collate_fn=collate)


class Shuffled(Own):
    def loader(self, data: Any, collate: Any) -> Any:
        return DataLoader(data, 2, shuffle=True, collate_fn=collate)


class InBatches(Own):
    def loader(self, data: Any, collate: Any) -> Any:
        batches = [[8, 2, 5], [1], [9, 0]]
        return DataLoader(data, batch_sampler=batches, collate_fn=collate)


class Stream(IterableDataset[Any]):
    def __init__(self, data: Any) -> None:
        self.data = data

    def __iter__(self) -> Any:
        return iter([self.data[number] for number in (6, 1, 4)])


class Streamed(Own):
    def loader(self, data: Any, collate: Any) -> Any:
        return DataLoader(Stream(data), 2, collate_fn=collate)


class Listed(Own):
    def loader(self, data: Any, collate: Any) -> Any:
        return [collate([data[5], data[3]]), collate([data[8]])]


class Ordered(Own):
    def predict_order(self) -> list[int]:
        return [3, 10, 1, 7, 0, 2, 4, 5, 6, 8, 9]


class Numbers(Dataset[int]):
    def __len__(self) -> int:
        return 11

    def __getitem__(self, index: int) -> int:
        return index


class Tensors(Dataset[int]):
    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> int:
        return index

    @staticmethod
    def collate(rows: list[int]) -> Any:
        ids = torch.tensor(rows)
        return {"inputs": {"x": ids}, "samples": [], "whole_ids": ids + 1}


class Raw(Own):
    """Rows become samples in the collator."""

    def loader(self, data: Any, collate: Any) -> Any:
        def read(rows: list[int]) -> Any:
            return collate([data[row] for row in rows])

        return DataLoader(Numbers(), 2, collate_fn=read)


class Dropping(Own):
    """Its collator leaves out what it cannot use."""

    def loader(self, data: Any, collate: Any) -> Any:
        def read(samples: list[Any]) -> Any:
            return collate([own for own in samples if own.id not in ("test-0-4", "test-0-7")])

        return DataLoader(data, 2, collate_fn=read)


class Doubling(Own):
    """Its collator asks more of each third row."""

    def loader(self, data: Any, collate: Any) -> Any:
        def read(samples: list[Any]) -> Any:
            more = [data[int(own.id[7:]) + 7] for own in samples if own.id[7:] in ("0", "3")]
            return collate([*samples, *more])

        return DataLoader(Subset(data, range(7)), 2, collate_fn=read)


OWN = {
    Sampled: 5,
    Dropping: 9,
    Doubling: 9,
    Shuffled: 11,
    InBatches: 6,
    Streamed: 3,
    Listed: 3,
    Ordered: 11,
    Raw: 11,
}


def rows_of(folder: Path) -> dict[str, dict[str, Any]]:
    """What a run has written of each sample, its picture as well."""
    rows = [json.loads(line) for line in (folder / results.PREDICTIONS).read_text().splitlines()]
    kept = {own["id"]: own for own in json.loads((folder / results.KEPT).read_text())}
    assert len(kept) == min(3, len(rows))
    for row in rows:
        own = kept.get(row["id"])
        row["kept"] = own and {k: v for k, v in own.items() if k != "image"}
        row["shown"] = own and (folder / own["image"]).read_bytes()
    found = {row["id"]: row for row in rows}
    assert len(found) == len(rows)
    return found


@pytest.fixture(scope="module")
def shown(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """As `whole`, with a picture of every sample."""
    folder = tmp_path_factory.mktemp("shown")
    share(checkpoint, folder, "num_pictures=11", "data.batch_size=1")
    lines = (folder / results.PREDICTIONS).read_text().splitlines()
    found = {own["id"]: own for own in map(json.loads, lines)}
    for own in json.loads((folder / results.KEPT).read_text()):
        kept = {k: v for k, v in own.items() if k != "image"}
        found[own["id"]] |= {"kept": kept, "shown": (folder / own["image"]).read_bytes()}
    return found


@pytest.mark.parametrize("kind", OWN)
@pytest.mark.parametrize("killed", [False, True])
@pytest.mark.share(8)
def test_samples_in_an_order_of_their_own(
    checkpoint: Path, shown: dict[str, Any], tmp_path: Path, kind: type[Own], killed: bool
) -> None:
    """Each has its own answer, tokens and picture, and is asked once, also after a kill."""
    own = f"data._target_={__name__}.{kind.__name__}"
    if killed:
        lost = f"trainer.callbacks=[{{_target_:{__name__}.Lost}}]"
        with pytest.raises(ZeroDivisionError):
            share(checkpoint, tmp_path, own, lost)
    assert share(checkpoint, tmp_path, own)["num_samples"] == OWN[kind]
    rows = rows_of(tmp_path)
    assert len(rows) == OWN[kind]
    for name, row in rows.items():
        wanted = shown[name] if row["kept"] else shown[name] | {"kept": None, "shown": None}
        assert row == wanted
    assert not (tmp_path / NOTES).exists()


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (Sampled, "whose samples are numbered, for 2 processes or shards"),
        (Dropping, "a sample of each row, for 2 processes or shards to share, got 1 of 2 rows"),
    ],
)
def test_samples_without_numbers_are_not_shared(
    checkpoint: Path, tmp_path: Path, kind: type[Own], message: str
) -> None:
    own = f"data._target_={__name__}.{kind.__name__}"
    with pytest.raises(ValueError, match=message):
        share(checkpoint, tmp_path, own, "shard=0/2")


class Bare(pl.LightningDataModule):
    def __init__(self, **options: Any) -> None:
        super().__init__()


def test_a_data_module_that_cannot_be_asked_is_told_what_it_lacks(
    checkpoint: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="a data module with predict_dataloader, got a Bare"):
        share(checkpoint, tmp_path, f"data._target_={__name__}.Bare")
    with pytest.raises(ValueError, match="always passed: let the target take processor"):
        targets.build({"_target_": f"{__name__}.few"}, "data", processor=1)


def few() -> None:
    """Takes nothing."""


def test_remembered_batches_share_nothing_with_their_workers() -> None:
    """Each tensor of a worker holds a file of the process until it goes."""
    loader = DataLoader(Tensors(), 2, num_workers=1, collate_fn=Tensors.collate)
    batches = list(RememberedBatches(loader))
    assert [batch["inputs"]["x"].tolist() for batch in batches] == [[0, 1], [2, 3]]
    assert not any(batch["inputs"]["x"].is_shared() for batch in batches)
    assert [batch["whole_ids"].tolist() for batch in batches] == [[1, 2], [3, 4]]
    assert not any(batch["whole_ids"].is_shared() for batch in batches)


def test_a_sweep_prepares_its_batches_once(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = []
    begin = Share.__init__

    def listen(self: Share, data: Any, *arguments: Any) -> None:
        held.append(data)
        begin(self, data, *arguments)

    monkeypatch.setattr(Share, "__init__", listen)
    own, before = f"data._target_={__name__}.Own", Own.collated
    for number in (0, 1):
        share(checkpoint, tmp_path / str(number), own, f"num_pictures={number}")
    assert Own.collated - before == 6
    assert held[0] is held[1]
    assert held[0].trainer is None  # it would keep an earlier run alive


def test_answers_to_code_that_has_changed_are_not_taken(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "yours").mkdir()
    (tmp_path / "yours" / "__init__.py").write_text("from yours.data import Yours\n")
    code = tmp_path / "yours" / "data.py"
    code.write_text("from test_shares import Own as Yours\n")
    monkeypatch.syspath_prepend(tmp_path)
    lost = f"trainer.callbacks=[{{_target_:{__name__}.Lost}}]"
    folder, own = tmp_path / "run", "data._target_=yours.Yours"
    with pytest.raises(ZeroDivisionError):
        share(checkpoint, folder, own, lost)
    code.write_text("from test_shares import Own\n\n\nclass Yours(Own):\n    pass\n")
    before = Own.collated
    share(checkpoint, folder, own)
    assert Own.collated - before == 6  # all of them, anew
