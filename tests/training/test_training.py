"""Fine-tuning: it learns, pruned or not; it resumes; what it saves loads again."""

from __future__ import annotations

import json
import re
import warnings
from pathlib import Path
from typing import Any, ClassVar

import models
import pandas
import pytest
import pytorch_lightning as pl
import torch
from lightning_fabric.utilities.throughput import Throughput
from omegaconf import OmegaConf
from oracles import assert_close, assert_decided
from trainings import LIGHTNING, Watched, build_processor
from transformers import AutoModelForImageTextToText, AutoProcessor

import tokenprune as tp
from tokenprune import training
from tokenprune.cli import configs
from tokenprune.cli import main as cli
from tokenprune.cli.mistakes import explain
from tokenprune.data.collate import IGNORED, ConversationCollator
from tokenprune.data.module import VQADataModule
from tokenprune.data.sample import Sample, Turn
from tokenprune.data.scenes import SceneDataset
from tokenprune.runs import compose
from tokenprune.runs.compose import Pruning
from tokenprune.runs.devices import check_devices
from tokenprune.runs.models import LoadedModel, load
from tokenprune.training.checkpoints import BEST, LAST
from tokenprune.training.module import FineTune
from tokenprune.training.tuning import build_optimizer, parts_of
from tokenprune.training.validation import guesses, turns

pytestmark = [
    *LIGHTNING,
    pytest.mark.filterwarnings("ignore:.*The number of training batches"),
]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> str:
    """A tiny random LLaVA with 16 visual tokens and six layers, as a folder."""
    folder = tmp_path_factory.mktemp("checkpoint")
    model = models.build("llava")
    model.config.text_config.eos_token_id = model.generation_config.eos_token_id = 1
    model.save_pretrained(folder)
    build_processor().save_pretrained(folder)
    return str(folder)


@pytest.fixture
def loaded(checkpoint) -> LoadedModel:
    return load(checkpoint, dtype="float32")


def pruning(positions: str = "renumbered") -> Pruning:
    schedule = tp.Schedule.pyramid(num_layers=models.NUM_LAYERS, num_stages=3, lam=0.5)
    return Pruning(tp.build_strategy("pyramiddrop"), schedule, positions)


def config(checkpoint: str, *overrides: str):
    return configs.compose(
        "train",
        [
            "model=hub",
            f"model.path={checkpoint}",
            "data.batch_size=4",
            "data.train.num_samples=20",
            "data.validation.num_samples=10",
            "trainer.callbacks=[]",
            "+trainer.enable_progress_bar=false",
            "trainer.val_check_interval=4",
            "trainer.max_steps=6",
            "learning_rate=3e-3",
            "logger=none",
            *overrides,
        ],
    )


def summary(folder: Path) -> dict:
    return json.loads((folder / training.SUMMARY).read_text())


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return AutoModelForImageTextToText.from_pretrained(folder / "model").state_dict()


@pytest.mark.parametrize("strategy", ["none", "pyramiddrop", "random"])
@pytest.mark.share(3)
def test_training_lowers_the_loss_and_its_model_loads(checkpoint, tmp_path, strategy):
    before = load(checkpoint)
    data = VQADataModule(validation=SceneDataset("validation", 10), processor=before.processor)
    (batch,) = data.val_dataloader()
    with torch.no_grad():
        first = float(before.model(**batch["inputs"]).loss)
    own = config(checkpoint, f"strategy={strategy}", "trainer.max_steps=15")
    training.train(own, tmp_path)
    told = summary(tmp_path)
    assert told["steps"] == 15
    assert told["validation"]["loss"] < first - 0.5
    assert set(told["validation"]["kinds"]) == {"read", "colour", "exist", "relation", "text"}
    assert told["samples_per_second"] > 0
    if strategy == "none":
        assert told["avg_tokens"] is None
    else:
        assert told["avg_tokens"] == pytest.approx((16 + 16 + 8 + 4 + 2 + 2) / 6, abs=4)
    assert OmegaConf.load(tmp_path / "config.yaml") == OmegaConf.create(compose.plain(own))

    # What was saved is what was validated.
    saved = AutoModelForImageTextToText.from_pretrained(tmp_path / "model").eval()
    processor = AutoProcessor.from_pretrained(tmp_path / "model")
    inputs = ConversationCollator(processor)(batch["samples"])["inputs"]
    built = compose.build_pruning(own, models.NUM_LAYERS)
    with torch.no_grad():
        if built is None:
            loss = saved(**inputs).loss
        else:
            with tp.prune(saved, built.strategy, built.schedule, built.positions):
                loss = saved(**inputs).loss
    assert float(loss) == pytest.approx(told["validation"]["loss"], abs=2e-4)


def test_the_saved_model_is_the_same(loaded, tmp_path):
    data = VQADataModule(train=SceneDataset("train", 8), processor=loaded.processor, batch_size=4)
    module = FineTune(loaded, pruning(), learning_rate=3e-3)
    fit(module, data, max_steps=2)
    loaded.model.eval()
    (inputs, _) = (batch["inputs"] for batch in data.train_dataloader())
    loaded.model.save_pretrained(tmp_path)
    again = AutoModelForImageTextToText.from_pretrained(tmp_path).eval()
    weights = again.state_dict()
    for name, value in loaded.model.state_dict().items():
        assert torch.equal(weights[name], value), name
    with torch.no_grad():
        assert_close(again(**inputs).logits, loaded.model(**inputs).logits)


def fit(module: FineTune, data: VQADataModule, **options) -> None:
    import pytorch_lightning as pl

    trainer = pl.Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0 if data.validation is None else 1.0,
        **options,
    )
    trainer.fit(module, datamodule=data)


@pytest.mark.matrix
def test_an_interrupted_training_goes_on_as_if_nothing_had_happened(
    checkpoint, tmp_path, monkeypatch
):
    training.train(config(checkpoint, "checkpoint_every=2"), tmp_path / "whole")
    step, seen = FineTune.training_step, []

    def fails(self, batch, batch_idx):
        if len(seen) == 3:
            raise RuntimeError("out of memory")
        seen.append([sample.id for sample in batch["samples"]])
        return step(self, batch, batch_idx)

    monkeypatch.setattr(FineTune, "training_step", fails)
    with pytest.raises(RuntimeError, match="out of memory"):
        training.train(config(checkpoint, "checkpoint_every=2"), tmp_path / "parts")
    monkeypatch.undo()
    assert not (tmp_path / "parts" / training.SUMMARY).exists()
    training.train(config(checkpoint, "checkpoint_every=2", "ckpt_path=last"), tmp_path / "parts")
    whole, parts = (weights(tmp_path / name) for name in ("whole", "parts"))
    assert whole.keys() == parts.keys()
    for name in whole:
        torch.testing.assert_close(whole[name], parts[name], rtol=0, atol=1e-6)
    assert summary(tmp_path / "parts")["steps"] == 6


@pytest.mark.parametrize(
    ("parts", "moved"),
    [
        (["projector"], {"multi_modal_projector"}),
        (["vision_tower"], {"vision_tower"}),
        (["decoder"], {"language_model", "lm_head"}),
        (["projector", "decoder"], {"multi_modal_projector", "language_model", "lm_head"}),
    ],
)
def test_only_the_chosen_parts_move(loaded, parts, moved):
    before = {name: value.clone() for name, value in loaded.model.named_parameters()}
    assert sum(map(len, parts_of(loaded.model).values())) == len(before)
    data = VQADataModule(train=SceneDataset("train", 4), processor=loaded.processor, batch_size=4)
    fit(FineTune(loaded, None, parts=parts, learning_rate=1e-2), data, max_steps=1)
    changed = {
        part
        for name, value in loaded.model.named_parameters()
        for part in ("vision_tower", "multi_modal_projector", "language_model", "lm_head")
        if part in name and not torch.equal(value, before[name])
    }
    assert changed == moved


def test_gradient_checkpointing_changes_nothing(checkpoint):
    gradients = []
    for recompute in (False, True):
        own = load(checkpoint, dtype="float32")
        data = VQADataModule(train=SceneDataset("train", 8), processor=own.processor, batch_size=4)
        module = Watched(own, pruning(), learning_rate=3e-3, gradient_checkpointing=recompute)
        fit(module, data, max_steps=1)
        gradients.append(module.gradients)
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, recomputed, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("own", [None, pruning(), pruning("original")])
def test_teacher_forcing_guesses_what_each_sample_alone_would_be_answered(loaded, own):
    """Validation counts a turn as right where the most likely tokens are the answer's."""
    samples = [SceneDataset("validation", 4, num_turns=3)[i] for i in range(4)]
    module = FineTune(loaded, own)
    collate = ConversationCollator(loaded.processor)
    inputs = collate(samples)["inputs"]
    module.attach("all")
    with torch.no_grad():
        trace = None if own is None else module._handle.trace
        guessed = guesses(loaded.model, inputs, loaded.model(**inputs).logits, trace)
    module.detach()
    # The tail of a pruned row is its text, so the last guesses can be read off directly.
    for row, sample in enumerate(samples):
        alone = collate([sample])["inputs"]
        module.attach("all")
        with torch.no_grad():
            logits = loaded.model(**alone).logits[0]
        module.detach()
        length = alone["labels"].shape[1]
        text = length - int((alone["input_ids"] == models.IMAGE).nonzero()[-1, 1]) - 2
        logits = logits[-text - 1 : -1]
        assert_decided(logits)
        assert torch.equal(guessed[row, length - text : length], logits.argmax(-1))


def test_a_turn_is_right_if_all_its_tokens_are():
    asked = (Turn("q", "a", "read"), Turn("q", "b c", "text"), Turn("q", "d", "read"))
    labels = torch.full((12,), IGNORED)
    labels[[3, 4, 6, 7, 8, 10, 11]] = 5
    right = torch.ones(12, dtype=torch.bool)
    right[7] = right[0] = False
    sample = Sample("s", None, asked)
    assert turns(sample, labels, right) == [
        ("read", True),
        ("text", False),
        ("read", True),
    ]


@pytest.mark.parametrize("where", ["training_step", "validation_step"])
def test_a_failing_step_leaves_the_model_unhooked(loaded, monkeypatch, where):
    hooks = [len(module._forward_pre_hooks) for module in loaded.model.modules()]
    scenes = SceneDataset("train", 8)
    data = VQADataModule(train=scenes, validation=scenes, processor=loaded.processor, batch_size=4)
    step = getattr(FineTune, where)

    def fails(self, batch, batch_idx):
        step(self, batch, batch_idx)
        raise RuntimeError("disk full")

    monkeypatch.setattr(FineTune, where, fails)
    with pytest.raises(RuntimeError, match="disk full"):
        fit(FineTune(loaded, pruning()), data, max_steps=2)
    assert hooks == [len(module._forward_pre_hooks) for module in loaded.model.modules()]
    with tp.prune(loaded.model, pruning().strategy, pruning().schedule):
        pass  # refused if anything were still attached


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["parts=[head]"], r"parts: expected some of \['vision_tower', .*, got \['head'\]. Set"),
        (["parts=[]"], r"parts: expected some of .*, got \[\]. Set"),
        (["learning_rate=0"], "learning_rate: expected a number above 0, got 0. Set"),
        (["warmup=1.5"], "warmup: expected a number between 0 and 1, got 1.5. Set"),
        (["weight_decay=-1"], "weight_decay: expected a number >= 0, got -1. Set"),
        (
            ["model.dtype=float16"],
            "model.dtype: expected float32 for training, got float16, .*mixed",
        ),
        (["model.dtype=bfloat16"], "model.dtype: expected float32 for training, got bfloat16"),
        (["model.tuning=half"], r"model.tuning: expected one of \['full', 'projector', 'lora'\]"),
        (["model.tuning=lora", "parts=[projector]"], "parts: expected decoder among them with"),
        (["model.tuning=lora", "model.lora.rank=0"], "model.lora.rank: expected an integer >= 1"),
        (["learning_rates.decoder=0"], "learning_rates.decoder: expected a number above 0, got 0"),
        (["schedule_warmup=2"], "schedule_warmup: expected a number between 0 and 1, got 2. Set"),
        (["trainer.precision=16-mixed"], "trainer.precision: expected one that a CPU can train in"),
        (["trainer.precision=bf16-true"], "trainer.precision: expected float32 weights, got 'bf16"),
        (["trainer=gpu"], "trainer.accelerator: expected a device of this machine, got 'gpu' with"),
        (
            ["trainer.devices=99"],
            "trainer.devices: expected at most .*, the cores of this CPU, got",
        ),
        (
            ["trainer.max_steps=-1"],
            "trainer.max_steps: expected a number of steps, by which .* got -1 with .*=None. Set",
        ),
        (
            ["model.dtype=bfloat16", "model.tuning=lora", "trainer.precision=32-true"],
            "model.dtype: expected float32 .*, got bfloat16 with trainer.precision=32-true. Set",
        ),
        (["checkpoint_every=0"], "checkpoint_every: expected a number of steps >= 1, got 0. Set"),
        (["monitor=loss"], r"monitor: expected one of \['val_loss', 'val_accuracy'\], got 'loss'"),
        (["keep=all"], "keep: expected last or best, got 'all'"),
        (["patience=0"], "patience: expected a number of validations >= 1, or null, got 0. Set"),
        (["ckpt_path=last"], r"ckpt_path: expected a checkpoint, got '.*last.ckpt', which .* Set"),
        (
            ["data=folder"],
            "data: expected the path of a .json, .jsonl, .ndjson, .csv or .tsv file, got none. Set",
        ),
    ],
)
@pytest.mark.share(4)
def test_bad_input_is_refused(checkpoint, tmp_path, overrides, message):
    base = [item for item in overrides if item.startswith("data=")]
    own = configs.compose("train", ["model=hub", f"model.path={checkpoint}", *base, *overrides])
    with pytest.raises(Exception, match=r".") as caught:
        training.train(own, tmp_path / "run")
    text = explain(caught.value)
    assert text is not None
    assert re.match(message, text), text
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("kind", ["text", "pickled", "tensors", "half"])
def test_broken_checkpoints_are_refused(checkpoint, tmp_path, kind):
    path = tmp_path / "broken.ckpt"
    if kind == "text":
        path.write_text("not a checkpoint")
    elif kind == "pickled":
        torch.save({"loops": Ran()}, path)
    elif kind == "tensors":
        torch.save({"weight": torch.zeros(2)}, path)
    else:
        torch.save({"loops": torch.zeros(2000)}, path)
        path.write_bytes(path.read_bytes()[:4000])
    with pytest.raises(ValueError, match=r"ckpt_path: expected a checkpoint that `tok.*. Choose"):
        training.train(config(checkpoint, f"ckpt_path={path}"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


class Ran:
    """Says so when it is unpickled."""

    def __reduce__(self):
        return (pytest.fail, ("code in a checkpoint ran",))


@pytest.mark.matrix
def test_a_finished_training_keeps_its_record(checkpoint, tmp_path, capsys):
    training.train(config(checkpoint, "checkpoint_every=2"), tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    own = config(checkpoint, "checkpoint_every=2", "ckpt_path=last")
    training.train(own, tmp_path)
    assert "nothing left to train: " in capsys.readouterr().out
    after = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    assert after == before

    # Stopped between its last step and its record.
    (tmp_path / training.SUMMARY).unlink()
    training.train(own, tmp_path)
    told, first = summary(tmp_path), json.loads(before[training.SUMMARY])
    assert (told["steps"], told["train_loss"]) == (6, None)
    assert told["validation"]["accuracy"] == first["validation"]["accuracy"]


def test_training_without_validation_batches_keeps_its_model(checkpoint, tmp_path):
    own = config(checkpoint, "+trainer.limit_val_batches=0", "trainer.max_steps=1")
    training.train(own, tmp_path)
    assert summary(tmp_path)["validation"] == {}
    assert weights(tmp_path)


@pytest.mark.matrix
def test_bfloat16_is_for_the_arithmetic_not_for_the_weights(checkpoint, tmp_path):
    own = config(checkpoint, "trainer.precision=bf16-mixed", "trainer.max_steps=15")
    training.train(own, tmp_path)
    after, before = weights(tmp_path), load(checkpoint).model.state_dict()
    assert {value.dtype for value in after.values()} == {torch.float32}
    name = next(
        name for name in after if "layers.0.self_attn.q_proj" in name and "language" in name
    )
    assert not torch.equal(after[name], before[name])
    assert summary(tmp_path)["validation"]["loss"] < 4


@pytest.mark.matrix
def test_a_sweep_of_trainings_goes_on(checkpoint, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command = ["train", "-m", "model=hub", f"model.path={checkpoint}", "data.batch_size=4"]
    command += ["data.train.num_samples=8", "data.validation.num_samples=4", "trainer.max_steps=2"]
    command += ["trainer.callbacks=[]", "+trainer.enable_progress_bar=false", "seed=0,1"]
    command += ["checkpoint_every=1", "hydra.sweep.dir=sweep"]
    assert cli.main(command) == 0
    runs = sorted(Path("sweep").iterdir())
    assert len(runs) == 2
    first, second = (weights(run) for run in runs)
    assert any(not torch.equal(first[name], second[name]) for name in first)  # another order
    assert cli.main(command) == 0
    assert capsys.readouterr().out.count("complete already") == 2
    (runs[0] / training.SUMMARY).unlink()  # as if it had been stopped
    assert cli.main(command) == 0
    printed = capsys.readouterr().out
    assert printed.count("goes on from its checkpoint") == printed.count("complete already") == 1
    assert cli.main(command) == 0
    assert capsys.readouterr().out.count("complete already") == 2
    assert sorted(Path("sweep").iterdir()) == runs


def test_the_command_trains(checkpoint, tmp_path, capsys):
    folder = tmp_path / "run"
    code = cli.main(
        [
            "train",
            "model=hub",
            f"model.path={checkpoint}",
            "data.batch_size=4",
            "data.train.num_samples=8",
            "data.validation.num_samples=4",
            "trainer.callbacks=[]",
            "+trainer.enable_progress_bar=false",
            "trainer.max_steps=2",
            f"hydra.run.dir={folder}",
        ]
    )
    assert code == 0
    assert f"{folder}/model" in capsys.readouterr().out
    assert {path.name for path in folder.iterdir()} >= {"config.yaml", "model", "training.json"}


def test_more_processes_than_gpus_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    check_devices({"accelerator": "gpu", "devices": 2})
    for devices in (3, "3", [0, 2], "0,2"):
        with pytest.raises(ValueError, match=r"trainer.devices: expected at most 2, the GPUs"):
            check_devices({"accelerator": "auto", "devices": devices})


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["trainer=fsdp"], "trainer: expected a whole model in each process to evaluate, got a .*"),
        (
            ["trainer.devices=99"],
            "trainer.devices: expected at most .*, the cores of this CPU, got",
        ),
    ],
)
def test_evaluation_refuses_what_it_cannot_run(checkpoint, tmp_path, overrides, message):
    from tokenprune.evaluation.run import evaluate

    own = configs.compose("eval", ["model=hub", f"model.path={checkpoint}", *overrides])
    with pytest.raises(ValueError, match=message):
        evaluate(own, tmp_path / "run", {})
    assert not (tmp_path / "run").exists()


@pytest.mark.matrix
def test_a_folder_used_anew_keeps_nothing_of_the_run_before(checkpoint, tmp_path):
    own = ["trainer.max_steps=2", "checkpoint_every=1", "logger=csv", "keep=best"]
    own += ["trainer.log_every_n_steps=1"]
    training.train(config(checkpoint, *own, "trainer.val_check_interval=1"), tmp_path)
    assert (tmp_path / BEST).is_file()
    # No validation is due in it: the weights of the other run are not its best.
    training.train(config(checkpoint, *own, "seed=1", "learning_rate=0.1"), tmp_path)
    last = torch.load(tmp_path / LAST, weights_only=True)["state_dict"]
    for name, value in weights(tmp_path).items():
        if f"model.{name}" in last:
            assert torch.equal(value, last[f"model.{name}"]), name
    assert len(pandas.read_csv(tmp_path / "csv" / "metrics.csv")["train_loss"].dropna()) == 2


def test_a_checkpoint_of_another_model_is_refused(checkpoint, tmp_path):
    own = ["checkpoint_every=1", "trainer.max_steps=1", "+trainer.limit_val_batches=0"]
    training.train(config(checkpoint, *own, "parts=[projector]"), tmp_path)
    with pytest.raises(ValueError, match=r"ckpt_path: expected the weights .* which lacks it. Use"):
        training.train(config(checkpoint, *own, "ckpt_path=last"), tmp_path)


def test_a_checkpoint_of_another_architecture_is_refused(checkpoint, tmp_path, monkeypatch):
    own = ["checkpoint_every=1", "trainer.max_steps=1", "+trainer.limit_val_batches=0"]
    training.train(config(checkpoint, *own), tmp_path / "run")
    monkeypatch.setattr(models, "NUM_LAYERS", 4)
    models.build("llava").save_pretrained(tmp_path / "other")
    build_processor().save_pretrained(tmp_path / "other")
    path = tmp_path / "run" / LAST
    with pytest.raises(ValueError, match=r"ckpt_path: expected the weights .* not trained, got .*"):
        training.train(config(str(tmp_path / "other"), *own, f"ckpt_path={path}"), tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_adapters_are_trained_saved_and_merged(checkpoint, tmp_path):
    peft = pytest.importorskip("peft")
    own = ["model.tuning=lora", "parts=[decoder]", "model.lora.rank=4", "learning_rate=3e-2"]
    training.train(config(checkpoint, *own, "seed=1"), tmp_path)
    before, after = load(checkpoint).model.state_dict(), weights(tmp_path)
    assert before.keys() == after.keys()  # a plain model again
    changed = {name for name in after if not torch.equal(after[name], before[name])}
    assert changed
    assert all("language_model.layers" in name and "_proj" in name for name in changed)
    told = summary(tmp_path)
    assert told["num_trained"] < told["num_parameters"] / 4
    merged = AutoModelForImageTextToText.from_pretrained(tmp_path / "model").eval()
    base = AutoModelForImageTextToText.from_pretrained(checkpoint).eval()
    adapted = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    inputs = models.batch(merged, models.ROWS)
    with torch.no_grad():
        torch.testing.assert_close(
            adapted(**inputs).logits, merged(**inputs).logits, rtol=1e-4, atol=1e-4
        )


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
@pytest.mark.parametrize("tuning", ["projector", "lora"])
def test_recomputing_gives_the_same_gradients_where_little_is_trained(checkpoint, tuning):
    gradients = []
    for recompute in (False, True):
        torch.manual_seed(0)
        own = load(checkpoint, dtype="float32")
        data = VQADataModule(train=SceneDataset("train", 4), processor=own.processor, batch_size=4)
        module = Watched(own, pruning(), tuning=tuning, gradient_checkpointing=recompute)
        runs = []
        decoder = own.model.get_decoder()
        decoder.layers[-1].self_attn.register_forward_hook(lambda *_, runs=runs: runs.append(1))
        fit(module, data, max_steps=1)
        assert len(runs) == 1 + recompute
        gradients.append(module.gradients)
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, recomputed, rtol=1e-4, atol=1e-6)


def test_shared_parameters_are_trained_once():
    """A head that is the embeddings once more."""
    model = models.build("llava")
    model.config.tie_word_embeddings = model.config.text_config.tie_word_embeddings = True
    model.tie_weights()
    assert model.lm_head.weight is model.get_input_embeddings().weight
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # torch's, of a parameter twice
        own = build_optimizer(model, 1e-3, {}, weight_decay=0.1)
    found = [parameter for group in own.param_groups for parameter in group["params"]]
    assert (
        len(found) == len({id(parameter) for parameter in found}) == len(list(model.parameters()))
    )


def test_parts_have_learning_rates_of_their_own(loaded):
    module = FineTune(
        loaded, parts=["vision_tower", "projector", "decoder"], learning_rates={"projector": 1e-3}
    )
    own = build_optimizer(module.model, 1e-4, module.learning_rates, weight_decay=0.1)
    assert {(g["part"], g["lr"]) for g in own.param_groups} == {
        ("vision_tower", 1e-4),
        ("projector", 1e-3),
        ("decoder", 1e-4),
    }
    assert all((g["weight_decay"] > 0) == (g["params"][0].dim() > 1) for g in own.param_groups)
    assert sum(len(g["params"]) for g in own.param_groups) == len(list(module.parameters()))


def test_a_schedule_is_reached_step_by_step(loaded):
    data = VQADataModule(train=SceneDataset("train", 16), processor=loaded.processor, batch_size=4)
    module, seen = FineTune(loaded, pruning(), schedule_warmup=0.5), []
    step = module.training_step

    def training_step(batch, batch_idx):
        loss = step(batch, batch_idx)
        seen.append(module._handle.trace.visual_lengths[:, 0].tolist()[::2])
        return loss

    module.training_step = training_step
    fit(module, data, max_steps=8)
    # keep is 1 at first, then 1 - (1 - target) * step / 4.
    assert seen[:5] == [[16, 16, 16], [16, 14, 13], [16, 12, 10], [16, 10, 7], [16, 8, 4]]
    assert seen[5:] == [[16, 8, 4]] * 3


@pytest.mark.matrix
def test_training_ends_early_and_keeps_its_best(checkpoint, tmp_path):
    own = ["learning_rate=0.3", "patience=2", "keep=best", "trainer.max_steps=60"]
    training.train(config(checkpoint, *own, "trainer.val_check_interval=1"), tmp_path)
    told = summary(tmp_path)
    assert told["steps"] < 60
    best = torch.load(tmp_path / BEST, weights_only=True)
    after = weights(tmp_path)
    for name, value in best["state_dict"].items():
        assert torch.equal(after[name.removeprefix("model.")], value), name


def test_curves_are_csv_files_with_the_throughput(checkpoint, tmp_path, monkeypatch):
    counted, times, update = [], [], Throughput.update

    def notes(self, *, time, flops, **others):
        counted.append(flops)
        times.append(time)
        update(self, time=time, flops=flops, **others)

    monkeypatch.setattr(Throughput, "update", notes)
    own = config(checkpoint, "logger=csv", "trainer.log_every_n_steps=1", "trainer.max_steps=3")
    training.train(own, tmp_path)
    frame = pandas.read_csv(tmp_path / "csv" / "metrics.csv")
    assert frame["train_loss"].notna().sum() == 3
    assert {"avg_tokens", "learning_rate_decoder", "train/lengths", "val_loss"} <= set(frame)
    # Rows are about the step that they name; the last of them is the validation that ends it.
    for name, steps in {"train_loss": [1, 2, 3], "train/time": [1, 2, 3], "val_loss": [3]}.items():
        assert frame["step"][frame[name].notna()].tolist() == steps, name
    speeds = frame["train/device/flops_per_sec"].dropna().tolist()
    # From the row before to this one.
    expected = [counted[n] / (times[n] - times[n - 1]) for n in (1, 2)]
    assert speeds == pytest.approx(expected, rel=1e-6)


class Missing:
    """A logger whose package is not there."""

    def __init__(self) -> None:
        raise ModuleNotFoundError("No module named 'boards'")


def test_a_logger_without_its_package(checkpoint: str, tmp_path: Path) -> None:
    own = config(checkpoint, "logger={_target_:test_training.Missing}")
    with pytest.raises(ValueError, match="logger: expected the package that Missing needs, got"):
        training.train(own, tmp_path)


class Widths(pl.Callback):
    """Notes how wide the logits of each step are, beside its inputs; None for none."""

    found: ClassVar[list[tuple[int | None, int]]] = []

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx > 0:
            return
        self.found.clear()  # and after the engine's hooks

        def note(model: object, given: object, named: dict[str, Any], output: Any) -> None:
            if model.training:
                logits = output.logits
                width = None if logits is None else logits.shape[1]
                self.found.append((width, named["input_ids"].shape[1]))

        pl_module.model.register_forward_hook(note, with_kwargs=True)


@pytest.mark.matrix
def test_logits_of_a_step_are_what_the_config_asks_for(checkpoint: str, tmp_path: Path) -> None:
    losses = {}
    for logits in ("supervised", "all", "full"):
        own = config(checkpoint, f"logits={logits}", "trainer.max_steps=2",
                     "trainer.callbacks=[{_target_:test_training.Widths}]")  # fmt: skip
        training.train(own, tmp_path / logits)
        assert len(Widths.found) == 2
        for width, full in Widths.found:
            if logits == "full":
                assert width == full
            elif logits == "all":
                assert width is not None
                assert 0 < width < full
            else:
                assert width is None
        summary = json.loads((tmp_path / logits / "training.json").read_text())
        losses[logits] = (summary["train_loss"], summary["validation"]["loss"])
    assert losses["all"] == pytest.approx(losses["supervised"], rel=1e-5)
    assert losses["full"] == pytest.approx(losses["supervised"], rel=1e-5)
    assert config(checkpoint).logits == "supervised"
    with pytest.raises(ValueError, match=r"^logits: expected one of \['all', 'supervised',"):
        FineTune(load(checkpoint, dtype="float32"), pruning(), logits="none")


def test_a_short_training_has_a_curve(checkpoint: str, tmp_path: Path) -> None:
    training.train(config(checkpoint, "logger=csv", "trainer.max_steps=2"), tmp_path)
    curve = pandas.read_csv(tmp_path / "csv" / "metrics.csv")
    assert curve.dropna(subset="train_loss")["step"].tolist() == [2]


@pytest.mark.matrix
def test_a_head_that_is_the_embeddings_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As the shipped model's: one weight under two names."""
    own = ["model=tiny", "model.path=tiny", "data.train.num_samples=8", "keep=best"]
    training.train(config("tiny", *own, "trainer.max_steps=2"), tmp_path)
    state = torch.load(tmp_path / LAST, weights_only=True)["state_dict"]
    assert "model.model.language_model.embed_tokens.weight" in state
    assert "model.lm_head.weight" not in state
    (tmp_path / training.SUMMARY).unlink()
    assert "ckpt_path" not in capsys.readouterr().out
    training.train(config("tiny", *own, "trainer.max_steps=3", "ckpt_path=last"), tmp_path)
    assert summary(tmp_path)["steps"] == 3
    assert "ckpt_path: goes on with another trainer than before" in capsys.readouterr().out


@pytest.mark.matrix
def test_patience_may_end_between_the_batches_of_a_step(tmp_path: Path, checkpoint: str) -> None:
    own = ["trainer.accumulate_grad_batches=2", "trainer.val_check_interval=3", "patience=1"]
    own += ["learning_rate=0.3", "trainer.max_steps=40", "data.train.num_samples=80"]
    training.train(config(checkpoint, *own), tmp_path)
    steps = summary(tmp_path)["steps"]
    assert steps < 40
    assert torch.load(tmp_path / LAST, weights_only=True)["global_step"] == steps
    (tmp_path / training.SUMMARY).unlink()
    training.train(config(checkpoint, *own, "ckpt_path=last"), tmp_path)
    assert summary(tmp_path)["steps"] == steps


@pytest.mark.matrix
def test_interrupted_curves_become_one(checkpoint, tmp_path, monkeypatch):
    own = ["logger=csv", "trainer.log_every_n_steps=1", "checkpoint_every=2", "data.batch_size=2"]
    own += ["trainer.val_check_interval=3", "trainer.max_steps=8"]
    for name in ("whole", "parts"):
        training.train(config(checkpoint, *own, "seed=1"), tmp_path / name)  # is no part of it
    training.train(config(checkpoint, *own), tmp_path / "whole")
    step, seen = FineTune.training_step, []

    def fails(self, batch, batch_idx):
        seen.append(batch)
        if len(seen) in (6, 9):  # steps 6, of which the fifth was logged, and 7
            raise RuntimeError("out of memory")
        return step(self, batch, batch_idx)

    monkeypatch.setattr(FineTune, "training_step", fails)
    for more in ([], ["ckpt_path=last"]):
        with pytest.raises(RuntimeError, match="out of memory"):
            training.train(config(checkpoint, *own, *more), tmp_path / "parts")
    monkeypatch.undo()
    training.train(config(checkpoint, *own, "ckpt_path=last"), tmp_path / "parts")
    whole, parts = (
        pandas.read_csv(tmp_path / f / "csv" / "metrics.csv") for f in ("whole", "parts")
    )
    assert len(whole) == len(parts)
    for name in ("train_loss", "val_loss", "val_accuracy", "avg_tokens", "unsupervised_batches"):
        rows = [frame[["step", name]].dropna().values.tolist() for frame in (whole, parts)]
        assert rows[0] == rows[1], name
    assert parts["train_loss"].notna().sum() == 8
    files = sorted(path.name for path in (tmp_path / "parts" / "csv").iterdir())
    assert files == ["hparams.yaml", "metrics.csv"]


@pytest.mark.matrix
def test_tensorboard_gets_the_curves(checkpoint, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    own = ["logger=tensorboard", "trainer.log_every_n_steps=1", "trainer.max_steps=5"]
    training.train(config(checkpoint, *own), tmp_path)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("train_loss")] == [1, 2, 3, 4, 5]
    assert [event.step for event in events.Scalars("val_loss")] == [4, 5]
    told = summary(tmp_path)
    assert events.Scalars("train_loss")[-1].value == pytest.approx(told["train_loss"])
    assert events.Scalars("val_loss")[-1].value == pytest.approx(told["validation"]["loss"])
    assert events.Scalars("train/device/flops_per_sec")


def test_flops_are_those_of_the_survivors(loaded):
    data = VQADataModule(train=SceneDataset("train", 4), processor=loaded.processor, batch_size=4)
    found = {}
    for name, own in {"pruned": pruning(), "whole": None}.items():
        module = FineTune(loaded, own)
        fit(module, data, max_steps=1)
        found[name] = module.flops_per_batch
    (batch,) = data.train_dataloader()
    shape = tp.cost.DecoderShape.from_config(loaded.model.config)
    lengths = batch["inputs"]["attention_mask"].sum(1).tolist()
    for name, visual in {"whole": [16] * 6, "pruned": [16, 16, 8, 8, 4, 4]}.items():
        each = [tp.cost.flops(shape, visual, num_text=length - 16) for length in lengths]
        assert found[name] == pytest.approx(6 * sum(each))  # forward, twice that back; 2 per MAC
