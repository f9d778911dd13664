"""Training in two processes, and through wrappers, is training in one."""

from __future__ import annotations

import copy
import csv
import json
import sys
import time
from pathlib import Path
from subprocess import PIPE
from typing import Any

import models
import pytest
import torch
from oracles import assert_same_choice
from processes import call, run, started
from torch.nn.parallel import DistributedDataParallel
from trainings import FSDP, LIGHTNING, SCHEDULE, save_six_steps, six_steps, train
from transformers import AutoModelForImageTextToText

import tokenprune as tp
from tokenprune import training
from tokenprune.cli.configs import compose
from tokenprune.data.collate import IGNORED
from tokenprune.training.sharding import META, shard

pytestmark = [
    *LIGHTNING,
    pytest.mark.filterwarnings("ignore:.*Using `DistributedSampler`"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),  # peft
    pytest.mark.filterwarnings("ignore:.*No device id is provided:UserWarning"),
]
ALL = ("vision_tower", "projector", "decoder")
#: One of each kind: by attention, by chance, by place, mixed, by the tower.
SOME = ("pyramiddrop", "random", "uniform", "pool", "fastervlm")


def both(folder: Path, how: str, strategy: str, **options: Any) -> dict[str, Any]:
    """The six steps in two processes, half a batch each."""
    folder.mkdir()
    done = call(save_six_steps, folder, strategy, how, 2, 2, **options)
    assert done.returncode == 0, done.stdout
    return torch.load(folder / "result.pt", weights_only=True)


def assert_same(one, other, tolerance=1e-4):
    assert len(one["train_loss"]) == 6
    for name in ("train_loss", "val_loss"):
        assert other[name] == pytest.approx(one[name], abs=tolerance), name
    # Before clipping. AdamW hides their size.
    assert other["gradient"] == pytest.approx(one["gradient"], rel=1e-2)
    assert other["gradient"][0] == pytest.approx(one["gradient"][0], rel=1e-4)
    assert one["trained"].keys() == other["trained"].keys()
    for name, value in one["trained"].items():
        torch.testing.assert_close(other["trained"][name], value, rtol=1e-3, atol=1e-3)


@pytest.mark.matrix
@pytest.mark.parametrize("options", [{}, {"tuning": "lora"}], ids=["full", "lora"])
@pytest.mark.share(2)
def test_accumulated_ragged_batches_are_one_batch(tmp_path, options):
    one = six_steps(tmp_path / "one", "pyramiddrop", **options)
    parts = six_steps(tmp_path / "parts", "pyramiddrop", batch_size=2, batches=2, **options)
    assert_same(one, parts, tolerance=1e-5)


@pytest.mark.parametrize("how", ["ddp", pytest.param("fsdp", marks=pytest.mark.matrix)])
@pytest.mark.matrix
def test_two_processes_are_one(tmp_path, how):
    _compare(tmp_path, how, "pyramiddrop", {})


@pytest.mark.matrix
@pytest.mark.parametrize("how", ["ddp", "fsdp"])
@pytest.mark.parametrize("strategy", ["none", *SOME])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"tuning": "lora"},
        # Adam makes whole steps of gradients that are nothing but rounding, as those of the vision
        # tower's key biases are: in float32 even accumulated batches drift apart by 1e-3.
        {"parts": ALL, "gradient_checkpointing": True, "double": True},
    ],
    ids=["full", "lora", "all-checkpointed"],
)
def test_two_processes_are_one_for_every_strategy(tmp_path, how, strategy, options):
    _compare(tmp_path, how, strategy, options)


def _compare(folder, how, strategy, options):
    assert_same(
        six_steps(folder / "one", strategy, **options),
        both(folder / "both", how, strategy, **options),
    )


@pytest.mark.matrix
@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_a_process_without_a_supervised_token_changes_nothing_for_the_other(tmp_path, how):
    # Each process gets every other sample of the order: now and then one has none with labels.
    masked = frozenset(f"train-0-{index}" for index in range(24) if index % 3)
    one = six_steps(tmp_path / "one", "pyramiddrop", masked=masked)
    two = both(tmp_path / "both", how, "pyramiddrop", masked=masked)
    assert two["unsupervised_batches"][-1] > one["unsupervised_batches"][-1]
    assert_same(one, two)


@pytest.mark.matrix
def test_batches_without_a_supervised_token_are_counted_and_teach_nothing(tmp_path):
    everything = frozenset(f"train-0-{index}" for index in range(24))
    none = six_steps(tmp_path / "none", "pyramiddrop", masked=everything, weight_decay=0.0)
    assert none["unsupervised_batches"] == [1, 2, 3, 4, 5, 6]
    assert none["train_loss"] == [0.0] * 6
    before = dict(models.build("llava").named_parameters())
    for name, value in none["trained"].items():
        assert torch.equal(value, before[name.removeprefix("model.")]), name
    some = frozenset(f"train-0-{index}" for index in range(24) if index % 3)
    one = six_steps(tmp_path / "one", "pyramiddrop", masked=some)
    parts = six_steps(tmp_path / "parts", "pyramiddrop", masked=some, batch_size=2, batches=2)
    assert one["unsupervised_batches"][-1] < parts["unsupervised_batches"][-1] < 12
    assert_same(one, parts, tolerance=1e-5)


@pytest.mark.matrix
@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_processes_with_batches_of_different_sizes_are_one(tmp_path, how):
    # The sixth step has three samples: two for one process, one for the other.
    _compare(tmp_path, how, "pyramiddrop", {"num_samples": 23})


def test_batches_without_images_do_not_train_the_projector(tmp_path):
    everything = frozenset(f"train-0-{index}" for index in range(24))
    own = {"tuning": "projector", "weight_decay": 0.0}
    none = six_steps(tmp_path / "none", "pyramiddrop", blind=everything, **own)
    before = dict(models.build("llava").named_parameters())
    assert none["trained"]
    for name, value in none["trained"].items():
        assert torch.equal(value, before[name.removeprefix("model.")]), name
    assert all(loss > 0 for loss in none["train_loss"])
    # Now and then a batch has none: four samples in a row, or two.
    some = frozenset(f"train-0-{index}" for index in range(24) if index % 4)
    one = six_steps(tmp_path / "one", "pyramiddrop", blind=some, **own)
    parts = six_steps(tmp_path / "parts", "pyramiddrop", blind=some, batch_size=2, batches=2, **own)
    assert_same(one, parts, tolerance=1e-5)
    assert any(
        not torch.equal(value, none["trained"][name]) for name, value in one["trained"].items()
    )


@pytest.mark.matrix
@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_a_process_without_an_image_waits_for_no_other(tmp_path, how):
    some = frozenset(f"train-0-{index}" for index in range(24) if index % 4)
    _compare(tmp_path, how, "pyramiddrop", {"blind": some, "tuning": "projector"})


@pytest.mark.matrix
def test_a_sharded_training_validates_under_nccl(tmp_path):
    """There Lightning would use inference mode, which it leaves out for gloo."""
    own = ["model=tiny", *FSDP, "trainer.devices=1"]
    own += ["trainer.callbacks=[{_target_:trainings.UnderNccl}]", "trainer.max_steps=2"]
    own += ["data.train.num_samples=8", "data.validation.num_samples=4", "data.batch_size=4"]
    own += ["logger=none", "+trainer.enable_progress_bar=false"]
    done = call(train, compose("train", own), tmp_path)
    assert done.returncode == 0, done.stdout
    assert json.loads((tmp_path / training.SUMMARY).read_text())["steps"] == 2


def command(*overrides, steps=4):
    """`tokenprune train` as a user starts it: it starts its processes by itself."""
    base = ["model=tiny", "data.train.num_samples=11", "data.validation.num_samples=5"]
    base += [
        "trainer.log_every_n_steps=1",
        "trainer.val_check_interval=2",
        f"trainer.max_steps={steps}",
    ]
    base += ["trainer.callbacks=[]", "+trainer.enable_progress_bar=false"]
    return [sys.executable, "-m", "tokenprune.cli", "train", *base, *overrides]


def two(how):
    return [f"trainer={how}", "trainer.accelerator=cpu", "trainer.devices=2", "data.batch_size=2"]


def curves(folder):
    with (folder / "csv" / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    return {
        name: [
            (int(row["step"]), pytest.approx(float(row[name]), abs=1e-4))
            for row in rows
            if row[name]
        ]
        for name in ("train_loss", "val_loss", "val_accuracy")
    }


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone") / "run"
    run(command("data.batch_size=4", f"hydra.run.dir={folder}"))
    return folder


@pytest.mark.matrix
@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_the_command_trains_in_two_processes(tmp_path, alone, how):
    done = run(command(*two(how), f"hydra.run.dir={tmp_path / 'run'}"))
    for noise in ("Initializing distributed", "LeafSpec", "in eval mode", "weights_only"):
        assert noise not in done.stderr + done.stdout
    told, expected = (
        json.loads((folder / "training.json").read_text()) for folder in (tmp_path / "run", alone)
    )
    assert [step for step, _ in curves(alone)["train_loss"]] == [1, 2, 3, 4]
    assert [step for step, _ in curves(alone)["val_loss"]] == [2, 4]
    found = curves(tmp_path / "run")
    for name, values in curves(alone).items():
        assert [(step, value.expected) for step, value in found[name]] == values, name
    assert told["steps"] == expected["steps"] == 4
    assert told["validation"]["loss"] == pytest.approx(expected["validation"]["loss"], abs=1e-4)
    states = [
        AutoModelForImageTextToText.from_pretrained(folder / "model").state_dict()
        for folder in (tmp_path / "run", alone)
    ]
    for name, value in states[0].items():
        torch.testing.assert_close(value, states[1][name], rtol=1e-3, atol=1e-3)


@pytest.mark.matrix
@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_a_sweep_trains_in_two_processes_and_goes_on_after_a_signal(tmp_path, how):
    own = command("-m", *two(how), "seed=0,1", f"hydra.sweep.dir={tmp_path}", steps=12)
    runs: list[Path] = []
    with started(own, stderr=PIPE) as process:
        while not runs and process.poll() is None:
            time.sleep(0.05)  # until the first run has a step to lose
            runs = list(tmp_path.glob("*/csv/metrics.csv"))
        process.terminate()
        _, told = process.communicate()
    assert process.returncode == 143, told
    assert "training was stopped by SIGTERM\n" in told
    assert "what is done is kept. To go on: the same command once more\n" in told
    (first,) = runs
    last = first.parent.parent / "checkpoints" / "last.ckpt"
    content = last / META if last.is_dir() else last
    assert 1 <= torch.load(content, weights_only=True)["global_step"] <= 12
    done = run(own)
    assert "goes on from its checkpoint" in done.stdout
    finished = sorted(tmp_path.glob("*/training.json"))
    assert [json.loads(path.read_text())["steps"] for path in finished] == [12, 12]
    for path in finished:
        assert [step for step, _ in curves(path.parent)["train_loss"]] == [*range(1, 13)]
        assert [step for step, _ in curves(path.parent)["val_loss"]] == [*range(2, 13, 2)]


@pytest.fixture
def group(tmp_path):
    """A process group of one, for one test: trainings of others would take it for theirs."""
    store = f"file://{tmp_path / 'store'}"
    torch.distributed.init_process_group("gloo", store, rank=0, world_size=1)
    yield torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("wrapper", ["peft", "ddp", "fsdp"])
@pytest.mark.parametrize("strategy", SOME)
@pytest.mark.share(3)
def test_the_engine_sees_through_wrappers(group, strategy, wrapper):
    plain = models.build("llava")
    inputs = models.batch(plain, models.ROWS)
    inputs["labels"] = inputs["input_ids"].clone()
    inputs["labels"][inputs["input_ids"] == models.IMAGE] = IGNORED
    inputs["labels"][:, :-4] = IGNORED
    model = copy.deepcopy(plain)
    if wrapper == "peft":
        peft = pytest.importorskip("peft")
        maps = r".*language_model\..*\.(q_proj|v_proj)"
        torch.manual_seed(0)
        model = peft.get_peft_model(model, peft.LoraConfig(target_modules=maps))
    elif wrapper == "ddp":
        model = DistributedDataParallel(model)
    else:
        shard(model, group)
    own = tp.build_strategy(strategy)
    outputs, traces = [], []
    for each in (plain, model):
        with tp.prune(each, own, SCHEDULE, "renumbered", "supervised") as trace:
            loss = each(**inputs, use_cache=False).loss
            loss.backward()
        outputs.append(loss.detach())
        traces.append(trace)
    torch.testing.assert_close(outputs[1], outputs[0])
    assert_same_choice(*(trace.stages for trace in traces))
