"""The data module and the order of its samples."""

from __future__ import annotations

import pickle
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from processes import call
from processors import LLAVA, build_processor
from questions import ROW, save
from trainings import save_batches

from tokenprune.data import SceneDataset
from tokenprune.data.module import VQADataModule
from tokenprune.data.order import EpochShuffle


def test_the_module_gives_every_loop_its_batches():
    scenes = {name: SceneDataset(name, 10) for name in ("train", "validation", "test")}
    data = VQADataModule(**scenes, processor=build_processor("llava", LLAVA), batch_size=4)
    before = torch.get_rng_state()
    batches = {
        name: list(getattr(data, f"{name}_dataloader")())
        for name in ("train", "val", "test", "predict")
    }
    assert torch.equal(before, torch.get_rng_state())
    for name, own in batches.items():
        assert [len(batch["samples"]) for batch in own] == [4, 4, 2]
        assert ("labels" in own[0]["inputs"]) == (name in ("train", "val"))
        ids = [sample.id for batch in own for sample in batch["samples"]]
        assert (ids == sorted(ids)) == (name != "train")
    assert "test-0-0" in {sample.id for sample in batches["predict"][0]["samples"]}
    pickle.loads(pickle.dumps(data))


@pytest.mark.matrix
def test_workers_give_the_same_batches(tmp_path):
    scenes = SceneDataset("train", 9)
    processor = build_processor("llava", LLAVA)
    alone, helped = (
        VQADataModule(train=scenes, processor=processor, batch_size=4, num_workers=workers)
        for workers in (0, 1)
    )
    done = call(save_batches, helped, tmp_path / "batches.pt")
    assert done.returncode == 0, done.stdout
    batches = torch.load(tmp_path / "batches.pt", weights_only=True)
    for own, (ids, labels) in zip(alone.train_dataloader(), batches, strict=True):
        assert [sample.id for sample in own["samples"]] == ids
        assert torch.equal(own["inputs"]["labels"], labels)


def _epoch(order: EpochShuffle, epoch: int) -> list[int]:
    order.set_epoch(epoch)
    return list(order)


def test_shuffling_is_seeded_per_epoch_and_resumes():
    order = EpochShuffle(20, 3, seed=1)
    epochs = [_epoch(order, epoch) for epoch in range(2)]
    assert epochs[0] != epochs[1]
    assert all(sorted(epoch) == list(range(20)) for epoch in epochs)
    assert list(EpochShuffle(20, 3, seed=2)) != epochs[0]
    resumed = EpochShuffle(20, 3, seed=1, start=(1, 4))
    assert list(resumed) == epochs[1][12:]  # before anyone has set its epoch
    assert len(resumed) == 20
    assert _epoch(resumed, 2) == _epoch(order, 2)


@given(length=st.integers(4, 50), batch=st.integers(1, 7), processes=st.integers(1, 4))
def test_processes_share_the_steps_of_one(length, batch, processes):
    """A step has the same samples, however many processes share its batch."""

    def steps(number: int, size: int, seen: int = 0) -> list[set[int]]:
        shares = []
        for rank in range(number):
            start = (3, seen)
            order = EpochShuffle(length, size, processes=number, rank=rank, start=start)
            own = list(order)
            assert len(own) == max(0, len(order) - seen * size)
            shares.append([own[i : i + size] for i in range(0, len(own), size)])
        assert len(set(map(len, shares))) == 1  # or one waits for the others for ever
        return [set().union(*parts) for parts in zip(*shares, strict=True)]

    alone, together = steps(1, batch * processes), steps(processes, batch)
    assert set().union(*alone) == set(range(length))
    assert together[:-1] == alone[:-1]
    if len(alone[-1]) >= processes:
        assert together[-1] == alone[-1]
    else:
        assert together[-1] - alone[-1] <= alone[0] | alone[-1]
    assert steps(processes, batch, seen=1) == together[1:]


@given(length=st.integers(4, 300), batch=st.integers(1, 3), processes=st.integers(1, 4))
def test_steps_of_similar_size_have_every_sample_once(length, batch, processes):
    sizes = [(7 * sample) % 101 for sample in range(length)]
    step = batch * processes

    def order(number: int, size: int, accumulated: int) -> list[int]:
        shares = [
            _epoch(
                EpochShuffle(
                    length,
                    size,
                    processes=number,
                    rank=rank,
                    sizes=sizes,
                    accumulated=accumulated,
                ),
                1,
            )
            for rank in range(number)
        ]
        longest = max(map(len, shares))
        return [share[i] for i in range(longest) for share in shares if i < len(share)]

    alone = order(1, step, 1)
    assert sorted(alone) == list(range(length))
    assert order(1, batch, processes) == alone  # a step of several batches
    assert order(processes, batch, 1)[:length] == alone
    whole = [alone[i : i + step] for i in range(0, length - step + 1, step)]
    ranges = [max(sizes[s] for s in own) - min(sizes[s] for s in own) for own in whole]
    plain = _epoch(EpochShuffle(length, step), 1)
    others = [plain[i : i + step] for i in range(0, length - step + 1, step)]
    spread = [max(sizes[s] for s in own) - min(sizes[s] for s in own) for own in others]
    assert sum(ranges) <= sum(spread)


def _trainer(batches: int, per_epoch: int, processes: int = 1) -> SimpleNamespace:
    progress = SimpleNamespace(total=SimpleNamespace(processed=batches))
    loops = SimpleNamespace(epoch_loop=SimpleNamespace(batch_progress=progress))
    return SimpleNamespace(
        fit_loop=loops,
        num_training_batches=per_epoch,
        world_size=processes,
        global_rank=0,
        accumulate_grad_batches=1,
    )


def test_the_order_does_not_change_in_the_middle_of_an_epoch():
    """At its end it may: another batch size counts on from there."""

    def module(batches: int, per_epoch: int, **options) -> VQADataModule:
        processor = build_processor("llava", LLAVA)
        options = {"batch_size": 4, "seed": 3} | options
        data = VQADataModule(train=SceneDataset("train", 14), processor=processor, **options)
        data.trainer = _trainer(batches, per_epoch, options.pop("processes", 1))
        return data

    middle, end = module(6, 4).state_dict(), module(8, 4).state_dict()
    assert (middle["epoch"], middle["batch"], end["epoch"], end["batch"]) == (1, 2, 2, 0)
    data = module(6, 4)
    data.load_state_dict(middle)
    epoch = _epoch(EpochShuffle(14, 4, seed=3), 1)
    assert list(data.train_dataloader().sampler) == epoch[8:]

    for change, message in {
        "batch_size": "data.batch_size: expected 4 samples a step, as when .*, got 2: 1 processes "
        "with 1 batches of 2. Set trainer.accumulate_grad_batches=2, or ckpt_path=null",
        "seed": "data.seed: expected 3, as when .*, got 2. Set it back",
    }.items():
        data = module(6, 4, **{change: 2})
        with pytest.raises(ValueError, match=message):
            data.load_state_dict(middle)
    data = module(6, 4)
    data.trainer.world_size = 2
    with pytest.raises(ValueError, match=r"expected 4 .*, got 8: 2 .* Set data.batch_size=2, or"):
        data.load_state_dict(middle)

    data = module(14 + 2, 7, batch_size=2)
    data.load_state_dict(end)
    assert data.resumed == (14, 7)
    assert list(data.train_dataloader().sampler) == _epoch(EpochShuffle(14, 2, seed=3), 2)
    again = data.state_dict()
    assert (again["epoch"], again["batch"]) == (2, 2)


def test_other_processes_go_on_with_the_same_steps():
    """Two processes with batches of 2 had begun; one goes on with 4, or with two batches of 2."""

    def module(
        batches: int, per_epoch: int, size: int, processes: int, steps: int
    ) -> VQADataModule:
        data = VQADataModule(
            train=SceneDataset("train", 14),
            processor=build_processor("llava", LLAVA),
            batch_size=size,
        )
        data.trainer = _trainer(batches, per_epoch, processes)
        data.trainer.accumulate_grad_batches = steps
        return data

    state = module(6, 4, 2, 2, 1).state_dict()
    assert (state["epoch"], state["batch"]) == (1, 2)
    epoch = _epoch(EpochShuffle(14, 4), 1)
    for size, processes, accumulated, resumed in (
        (4, 1, 1, (6, 2)),
        (2, 1, 2, (7 + 4, 4)),
        (1, 4, 1, (6, 2)),
        (2, 2, 1, (6, 2)),
    ):
        data = module(0, 0, size, processes, accumulated)
        data.load_state_dict(state)
        assert data.resumed == resumed
        assert list(data.train_dataloader().sampler) == epoch[8:][::processes]
        data.trainer = _trainer(resumed[0] + 1, -(-14 // (size * processes)), processes)
        again = data.state_dict()
        assert (again["epoch"], again["batch"]) == (1, resumed[1] + 1)


def test_validation_gives_each_sample_to_one_process():
    def ids(rank: int, processes: int) -> list[str]:
        scenes = SceneDataset("validation", 5)
        data = VQADataModule(
            validation=scenes, test=scenes, processor=build_processor("llava", None), batch_size=2
        )
        data.trainer = SimpleNamespace(world_size=processes, global_rank=rank)
        return [sample.id for batch in data.val_dataloader() for sample in batch["samples"]]

    assert sorted(ids(0, 2) + ids(1, 2)) == [f"validation-0-{i}" for i in range(5)]
    with pytest.raises(ValueError, match=r"one process per sample of 'validation', got 6 for 5"):
        ids(0, 6)


def test_the_module_says_what_is_missing(tmp_path):
    with pytest.raises(ValueError, match=r"data.batch_size: expected an integer >= 1, got 0. Set"):
        VQADataModule(batch_size=0)
    with pytest.raises(ValueError, match=r"expected a data set for 'train', got none. Set data"):
        VQADataModule().train_dataloader()
    with pytest.raises(ValueError, match=r"expected a processor, got None. Pass"):
        VQADataModule(test=SceneDataset("test", 1)).predict_dataloader()
    with pytest.raises(
        ValueError, match=r"data: expected the path of a .json, .jsonl, .* file, got none"
    ):
        VQADataModule.from_folder()
    folder = save(tmp_path, [ROW])
    module = VQADataModule.from_folder(path=str(folder), train_path=str(folder))
    assert module.validation is None
    assert len(module.train) == len(module.test) == 1
