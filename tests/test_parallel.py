"""Training in two processes, and through wrappers, is training in one."""

from __future__ import annotations

import copy
import csv
from pathlib import Path

import models
import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import CSVLogger
from test_training import build_processor
from torch.nn.parallel import DistributedDataParallel

import tokenprune as tp
from tokenprune.compose import Pruning
from tokenprune.data.collate import IGNORED, ConversationCollator
from tokenprune.data.module import VQADataModule
from tokenprune.data.scenes import SceneDataset
from tokenprune.finetune import FineTune
from tokenprune.models import LoadedModel
from tokenprune.sharding import Sharded, shard

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*in eval mode at the start of training"),
    pytest.mark.filterwarnings("ignore:.*overridden `transfer_batch_to_device`"),
    pytest.mark.filterwarnings("ignore:.*Using `DistributedSampler`"),
    pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),  # peft
    pytest.mark.filterwarnings("ignore:.*No device id is provided:UserWarning"),
]
SCHEDULE = tp.Schedule.pyramid(num_layers=models.NUM_LAYERS, num_stages=3, lam=0.5)
ALL = ("vision_tower", "projector", "decoder")


class Masking(ConversationCollator):
    """Takes the labels from some samples."""

    def __init__(self, processor, masked):
        super().__init__(processor)
        self.masked = masked

    def __call__(self, samples):
        batch = super().__call__(samples)
        for row, sample in enumerate(samples):
            if sample.id in self.masked:
                batch["inputs"]["labels"][row] = IGNORED
        return batch


class Data(VQADataModule):
    masked: frozenset[str] = frozenset()

    def train_dataloader(self):
        loader = super().train_dataloader()
        loader.collate_fn = Masking(self.processor, self.masked)
        return loader


def run(folder: Path, strategy: str, how="auto", batch_size=4, devices=1, batches=1, **options):
    """Losses of six steps, two validation losses, and the trained weights."""
    options = dict(options)
    masked, double = options.pop("masked", frozenset()), options.pop("double", False)
    module_options = {"learning_rate": 1e-3, "weight_decay": 0.1} | options
    torch.manual_seed(0)
    model = models.build("llava")
    loaded = LoadedModel(model.double() if double else model, build_processor())
    data = Data(
        train=SceneDataset("train", 24),
        validation=SceneDataset("validation", 5),
        processor=loaded.processor,
        batch_size=batch_size,
    )
    data.masked = masked
    own = None
    if strategy != "none":
        own = Pruning(tp.build_strategy(strategy), SCHEDULE, "renumbered")
    module = FineTune(loaded, own, **module_options)
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=devices,
        strategy=how,
        logger=CSVLogger(folder, version=""),
        log_every_n_steps=1,
        max_steps=6,
        val_check_interval=3 * batches,
        accumulate_grad_batches=batches,
        gradient_clip_val=1.0,
        num_sanity_val_steps=1,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a fork does not inherit the others
    try:
        trainer.fit(module, datamodule=data)
    finally:
        torch.set_num_threads(threads)
    with (folder / "lightning_logs" / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    trained = {name: p.detach().clone() for name, p in module.named_parameters() if p.requires_grad}
    found = {"rows": rows, "trained": trained}
    for name in ("train_loss", "val_loss", "unsupervised_batches"):
        found[name] = [float(row[name]) for row in rows if row.get(name)]
    return found


def assert_same(one, other, tolerance=1e-4):
    assert len(one["train_loss"]) == 6
    for name in ("train_loss", "val_loss"):
        assert other[name] == pytest.approx(one[name], abs=tolerance), name
    assert one["trained"].keys() == other["trained"].keys()
    for name, value in one["trained"].items():
        torch.testing.assert_close(other["trained"][name], value, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("options", [{}, {"tuning": "lora"}], ids=["full", "lora"])
def test_accumulated_ragged_batches_are_one_batch(tmp_path, options):
    one = run(tmp_path / "one", "pyramiddrop", **options)
    parts = run(tmp_path / "parts", "pyramiddrop", batch_size=2, batches=2, **options)
    assert_same(one, parts, tolerance=1e-5)


@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_two_processes_are_one(tmp_path, how):
    _compare(tmp_path, how, "pyramiddrop", {})


@pytest.mark.matrix
@pytest.mark.parametrize("how", ["ddp", "fsdp"])
@pytest.mark.parametrize("strategy", ["none", *tp.available()])
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
    one = run(folder / "one", strategy, **options)
    chosen = "ddp_fork" if how == "ddp" else Sharded(start_method="fork")
    both = run(folder / "both", strategy, chosen, batch_size=2, devices=2, **options)
    assert_same(one, both)


@pytest.mark.matrix
@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_a_process_without_a_supervised_token_changes_nothing_for_the_other(tmp_path, how):
    # Each process gets every other sample of the order: now and then one has none with labels.
    masked = frozenset(f"train-0-{index}" for index in range(24) if index % 3)
    one = run(tmp_path / "one", "pyramiddrop", masked=masked)
    chosen = "ddp_fork" if how == "ddp" else Sharded(start_method="fork")
    both = run(tmp_path / "both", "pyramiddrop", chosen, 2, 2, masked=masked)
    assert both["unsupervised_batches"][-1] > one["unsupervised_batches"][-1]
    assert_same(one, both)


def test_batches_without_a_supervised_token_are_counted_and_teach_nothing(tmp_path):
    everything = frozenset(f"train-0-{index}" for index in range(24))
    none = run(tmp_path / "none", "pyramiddrop", masked=everything, weight_decay=0.0)
    assert none["unsupervised_batches"] == [1, 2, 3, 4, 5, 6]
    assert none["train_loss"] == [0.0] * 6
    before = dict(models.build("llava").named_parameters())
    for name, value in none["trained"].items():
        assert torch.equal(value, before[name.removeprefix("model.")]), name
    some = frozenset(f"train-0-{index}" for index in range(24) if index % 3)
    one = run(tmp_path / "one", "pyramiddrop", masked=some)
    parts = run(tmp_path / "parts", "pyramiddrop", masked=some, batch_size=2, batches=2)
    assert one["unsupervised_batches"][-1] < parts["unsupervised_batches"][-1] < 12
    assert_same(one, parts, tolerance=1e-5)


@pytest.fixture(scope="module")
def group(tmp_path_factory):
    """A process group of one."""
    file = tmp_path_factory.mktemp("group") / "store"
    torch.distributed.init_process_group("gloo", f"file://{file}", rank=0, world_size=1)
    yield torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("wrapper", ["peft", "ddp", "fsdp"])
@pytest.mark.parametrize("strategy", tp.available())
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
    for first, second in zip(*(trace.stages for trace in traces), strict=True):
        assert all(map(torch.equal, first.kept, second.kept))
