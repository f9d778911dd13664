"""TRL's trainers, where TRL is installed: what they report is what the masked model gives.

It is no dependency. `pip install trl` into an environment with this package, and run this file; it
passes with TRL 1.16 and transformers 5.17 and 5.23.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models import build
from oracles import masked
from torch import Tensor
from trainings import build_processor

import tokenprune as tp

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")
Image = pytest.importorskip("PIL.Image")

pytestmark = pytest.mark.filterwarnings("ignore")  # TRL's, transformers' and torch's own

SCHEDULE = tp.Schedule.pyramid(layers=[1, 2], lam=0.6)
PDROP = tp.build_strategy("pyramiddrop")
TEMPLATE = (
    "{% for message in messages %}{{ message['role'].upper() }} : "
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<image> "
    "{% elif message['role'] == 'assistant' %}"
    "{% generation %}{{ part['text'] }} {% endgeneration %}"
    "{% else %}{{ part['text'] }} {% endif %}{% endfor %}{% endfor %}"
)
TALKS = (("Which symbol is left", "red"), ("What does the sign say", "a blue sign"))


def picture(number: int) -> Any:
    own = torch.Generator().manual_seed(number)
    pixels = torch.randint(0, 256, (32, 32, 3), generator=own, dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


def said(role: str, text: str) -> list[dict[str, str]]:
    return [{"role": role, "content": text}]


def rows(kind: str) -> Any:
    """Two samples as TRL reads them."""
    found = []
    for number, (question, answer) in enumerate(TALKS):
        asked, told = said("user", question), said("assistant", answer)
        forms = {
            "messages": {"messages": asked + told},
            "prompt": {"prompt": asked, "completion": told},
            "choice": {"prompt": asked, "chosen": told, "rejected": said("assistant", "no yes")},
        }
        found.append({"images": [picture(number)], **forms[kind]})
    return datasets.Dataset.from_list(found)


def options(folder: Path, **others: Any) -> dict[str, Any]:
    return {
        "output_dir": str(folder), "use_cpu": True, "bf16": False, "report_to": [],
        "per_device_train_batch_size": 2, "max_steps": 1, "learning_rate": 0.1, "optim": "sgd",
        "save_strategy": "no", "disable_tqdm": True, "logging_steps": 1, "max_length": None,
    } | others  # fmt: skip


def step(trainer: Any, method: str) -> tuple[dict[str, Any], dict[str, float]]:
    """Runs one; the batch of it, and what was logged."""
    batches = []
    original: Callable[..., Any] = getattr(trainer, method)

    @functools.wraps(original)
    def noted(model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        batches.append(dict(inputs))
        return original(model, inputs, *args, **kwargs)

    setattr(trainer, method, noted)
    trainer.train()
    return batches[0], trainer.state.log_history[0]


def of_masked(batch: dict[str, Any], trace: tp.Trace, **more: Tensor) -> Any:
    """What the unmodified model, given masks, makes of a batch."""
    model = build("llava")
    given = {key: batch[key] for key in ("input_ids", "attention_mask", "pixel_values")}
    visual = tp.visual_mask(model, batch["input_ids"])
    with torch.no_grad(), masked(model, batch["attention_mask"], visual, trace):
        return model(**given, **more, use_cache=False)


def processor() -> Any:
    made = build_processor()
    made.chat_template = TEMPLATE
    return made


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("logits", ["all", "supervised", "full"])
def test_a_step_on_completions(logits, when, tmp_path) -> None:
    """Attached before the trainer is made, or after; the fused head of TRL runs on survivors."""
    model = build("llava")
    handle = tp.attach(model, PDROP, SCHEDULE, logits=logits) if when == "before" else None
    trainer = trl.SFTTrainer(
        model, trl.SFTConfig(**options(tmp_path)), train_dataset=rows("prompt"),
        processing_class=processor(),
    )  # fmt: skip
    handle = handle or tp.attach(trainer.model, PDROP, SCHEDULE, logits=logits)
    batch, log = step(trainer, "compute_loss")
    handle.remove()
    assert handle.trace.visual_lengths[-1].tolist() == [5, 5]
    expected = of_masked(batch, handle.trace, labels=batch["labels"]).loss
    assert log["loss"] == pytest.approx(float(expected), abs=1e-4)


def test_label_smoothing(tmp_path) -> None:
    """It holds logits against ids, in a call without labels: no prompt may choose."""
    arguments = trl.SFTConfig(**options(tmp_path, label_smoothing_factor=0.1))
    trainer = trl.SFTTrainer(
        build("llava"), arguments, train_dataset=rows("prompt"), processing_class=processor()
    )
    handle = tp.attach(trainer.model, tp.build_strategy("uniform"), SCHEDULE, logits="full")
    batch, log = step(trainer, "compute_loss")
    handle.remove()
    labels = batch["labels"]
    expected = trainer.label_smoother(of_masked(batch, handle.trace), labels, shift_labels=True)
    assert log["loss"] == pytest.approx(float(expected), abs=1e-4)


def test_answers_alone(tmp_path) -> None:
    """`assistant_only_loss=True` labels what a template marks as the assistant's."""
    model = build("llava")
    arguments = trl.SFTConfig(**options(tmp_path, assistant_only_loss=True))
    try:
        trainer = trl.SFTTrainer(
            model, arguments, train_dataset=rows("messages"), processing_class=processor()
        )
    except ValueError as error:
        pytest.skip(str(error))  # older transformers
    handle = tp.attach(trainer.model, PDROP, SCHEDULE)
    batch, log = step(trainer, "compute_loss")
    handle.remove()
    expected = of_masked(batch, handle.trace, labels=batch["labels"]).loss
    assert handle.trace.visual_lengths[-1].tolist() == [5, 5]
    assert log["loss"] == pytest.approx(float(expected), abs=1e-4)


def test_labels_everywhere_are_told_of(tmp_path) -> None:
    trainer = trl.SFTTrainer(
        build("llava"), trl.SFTConfig(**options(tmp_path)), train_dataset=rows("messages"),
        processing_class=processor(),
    )  # fmt: skip
    handle = tp.attach(trainer.model, PDROP, SCHEDULE)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        trainer.train()
    handle.remove()
    ours = [str(one.message) for one in told if str(one.message).startswith("prune")]
    (one,) = ours
    assert "completion_only_loss=True or assistant_only_loss=True" in one
    assert handle.trace.visual_lengths[-1].tolist() == [16, 16]


@pytest.mark.parametrize("adapter", [False, True])
def test_preferences(adapter, tmp_path) -> None:
    """DPO holds log-probabilities against ids: `logits="full"`."""
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")
    model, reference = build("llava"), None if adapter else build("llava")
    trainer = trl.DPOTrainer(
        model, reference, args=trl.DPOConfig(**options(tmp_path)), train_dataset=rows("choice"),
        processing_class=processor(), peft_config=lora if adapter else None,
    )  # fmt: skip
    handles = [
        tp.attach(one, PDROP, SCHEDULE, logits="full")
        for one in (trainer.model, trainer.ref_model)
        if one is not None
    ]
    batch, log = step(trainer, "_compute_loss")
    for handle in handles:
        handle.remove()
    ids = batch["input_ids"]
    likely = of_masked(batch, handles[0].trace).logits.log_softmax(-1)[:, :-1]
    likely = likely.gather(2, ids[:, 1:, None])[..., 0] * batch["completion_mask"][:, 1:]
    chosen, rejected = likely.sum(1).chunk(2)
    assert log["logps/chosen"] == pytest.approx(float(chosen.mean()), abs=1e-4)
    assert log["logps/rejected"] == pytest.approx(float(rejected.mean()), abs=1e-4)


@pytest.mark.parametrize("logits", ["all", "supervised", "full"])
def test_padding_free_batches(logits, tmp_path) -> None:
    """TRL refuses them for images of its own; a collator may join them all the same."""
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    samples = []
    for number, (question, answer) in enumerate(TALKS):
        text = f"USER : <image> {question} ? ASSISTANT : {answer}"
        made = build_processor()(images=[picture(number)], text=text, return_tensors="pt")
        ids, length = made["input_ids"][0], len(answer.split())
        labels = ids.clone()
        labels[:-length] = -100
        samples.append(
            {
                "input_ids": ids.tolist(),
                "labels": labels.tolist(),
                "pixel_values": made["pixel_values"][0],
            }
        )
    join = DataCollatorForLanguageModeling(0, padding_free=True, pad_to_multiple_of=32)

    def collate(chosen: list[dict[str, Any]]) -> dict[str, Any]:
        texts = [{key: one[key] for key in ("input_ids", "labels")} for one in chosen]
        pixels = torch.stack([torch.as_tensor(one["pixel_values"]) for one in chosen])
        return join(texts) | {"pixel_values": pixels}

    more = {"dataset_kwargs": {"skip_prepare_dataset": True}, "remove_unused_columns": False}
    trainer = trl.SFTTrainer(
        build("llava"), trl.SFTConfig(**options(tmp_path, **more)), data_collator=collate,
        train_dataset=datasets.Dataset.from_list(samples), processing_class=processor(),
    )  # fmt: skip
    handle = tp.attach(trainer.model, PDROP, SCHEDULE, logits=logits)
    batch, log = step(trainer, "compute_loss")
    handle.remove()
    assert batch["input_ids"].shape == (1, 64)
    assert handle.trace.visual_lengths[-1].tolist() == [5, 5]
    losses, counts = [], []
    model = build("llava")
    for sample in samples:
        labels = torch.tensor([sample["labels"]])
        call = {"input_ids": torch.tensor([sample["input_ids"]]), "labels": labels}
        with torch.no_grad(), tp.prune(model, PDROP, SCHEDULE):
            losses.append(model(**call, pixel_values=sample["pixel_values"][None]).loss)
        counts.append(int((labels != -100).sum()))
    expected = sum(a * b for a, b in zip(losses, counts, strict=True)) / sum(counts)
    assert log["loss"] == pytest.approx(float(expected), abs=1e-4)
