"""Supervised fine-tuning of a vision-language model, with its visual tokens pruned or whole.

A model trained under the schedule that it will run with loses less than one that was never pruned.
Shape suffixes: B batch rows, T positions, V vocabulary.
"""

from __future__ import annotations

import json
import math
import pickle
import time
import warnings
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from omegaconf import DictConfig, OmegaConf
from pytorch_lightning.trainer.states import TrainerFn
from torch import Tensor, nn

import tokenprune as tp
from tokenprune import compose, results
from tokenprune.compose import Pruning
from tokenprune.data.collate import IGNORED
from tokenprune.data.sample import Sample
from tokenprune.models import LoadedModel

PARTS = ("vision_tower", "projector", "decoder")
#: What a finished training says about itself; `metrics.json` would make it a run of a sweep.
SUMMARY = "training.json"
#: Where an interrupted training goes on from.
CHECKPOINT = "checkpoints/last.ckpt"


def parts_of(model: Any) -> dict[str, list[nn.Parameter]]:
    """Parameters of a model's vision tower, decoder (head included), and all between them."""
    encoder, head = model.get_encoder(modality="image"), model.get_output_embeddings()
    decoder = list(model.get_decoder().parameters())
    decoder += [] if head is None else list(head.parameters())
    tower = [] if encoder is model else list(encoder.parameters())
    taken = {id(parameter) for parameter in (*tower, *decoder)}
    between = [parameter for parameter in model.parameters() if id(parameter) not in taken]
    return dict(zip(PARTS, (tower, between, decoder), strict=True))


class FineTune(pl.LightningModule):
    """Next-token training on answers; validation by teacher forcing.

    Pruning is attached while the training and validation loops run. The labels decide the query
    rows, so training and validation prune alike.

    Args:
        loaded: Model and processor; the model is trained in place.
        pruning: Strategy, schedule and positions; None for the unpruned model.
        parts: What is trained: some of `vision_tower`, `projector` and `decoder`.
        learning_rate: Peak, after the warm-up; from there a cosine leads to zero.
        weight_decay: AdamW's, on matrices only.
        warmup: Share of the steps during which the learning rate rises.
        gradient_checkpointing: Recomputes layers in the backward pass: slower, less memory.

    Raises:
        ValueError: A value is out of range, or the model has no such part.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        pruning: Pruning | None = None,
        *,
        parts: Sequence[str] = ("projector", "decoder"),
        learning_rate: float = 2e-5,
        weight_decay: float = 0.0,
        warmup: float = 0.03,
        gradient_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        _check_number("learning_rate", learning_rate, learning_rate > 0, "above 0", 2e-5)
        _check_number("weight_decay", weight_decay, weight_decay >= 0, ">= 0", 0.0)
        _check_number("warmup", warmup, 0 <= warmup <= 1, "between 0 and 1", 0.03)
        self.loaded = loaded
        model: Any = loaded.model
        self.model = model
        self.pruning = pruning
        self.learning_rate, self.weight_decay, self.warmup = learning_rate, weight_decay, warmup
        self.strict_loading = False  # checkpoints leave out what is not trained
        self._choose(parts)
        if gradient_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        self._handle: tp.Handle | None = None
        self._tally: dict[str, list[int]] = {}
        self._loss = [0.0, 0]
        self._num_samples, self._started = 0, 0.0

    def __setstate__(self, state: dict[str, Any]) -> None:
        restore: Any = super().__setstate__
        restore(state)
        # transformers notes what a class of models can record when one is built, and LLaVA reads
        # its vision states from there: a process that only received a model must build one.
        with torch.device("meta"):
            type(self.model)(self.model.config)

    def _choose(self, parts: Sequence[str]) -> None:
        """Makes the chosen parts trainable, and no others."""
        unknown = [part for part in parts if part not in PARTS]
        if unknown or not parts:
            raise ValueError(
                f"parts: expected some of {list(PARTS)}, got {list(parts)}. "
                "Set parts=[projector,decoder]."
            )
        own = parts_of(self.model)
        self.model.requires_grad_(False)
        for part in parts:
            if not own[part]:
                raise ValueError(
                    f"parts: expected a part of {type(self.model).__name__}, got {part!r}, which "
                    f"it does not have apart. Choose from {[name for name in PARTS if own[name]]}."
                )
            for parameter in own[part]:
                if parameter.dtype in (torch.float16, torch.bfloat16):
                    name = str(parameter.dtype).removeprefix("torch.")
                    raise ValueError(
                        f"model.dtype: expected float32 for training, got {name}, in which small "
                        "updates vanish. Keep model.dtype=float32 and set "
                        "trainer.precision=bf16-mixed."
                    )
                parameter.requires_grad_(True)

    # -- pruning -------------------------------------------------------------------------------

    def attach(self, logits: str) -> None:
        """Prunes the model's calls from here on, until `detach`."""
        self.detach()
        if self.pruning is not None:
            own = self.pruning
            self._handle = tp.attach(self.model, own.strategy, own.schedule, own.positions, logits)

    def detach(self) -> None:
        """Leaves the model as it was found."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    def configure_callbacks(self) -> list[pl.Callback]:
        return [_Detach()]

    # -- training ------------------------------------------------------------------------------

    def on_fit_start(self) -> None:
        self.model.train()
        for module in self.model.modules():
            own = [parameter.requires_grad for parameter in module.parameters()]
            if own and not any(own):
                module.eval()  # no dropout in what is not trained

    def on_train_start(self) -> None:
        self._num_samples, self._started = 0, time.perf_counter()
        self.attach("supervised")

    def transfer_batch_to_device(
        self, batch: dict[str, Any], device: torch.device, dataloader_idx: int
    ) -> dict[str, Any]:
        # Samples hold pictures, which stay where they are.
        return batch | {"inputs": batch["inputs"].to(device, dtype=self.model.dtype)}

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        loss: Tensor = self.model(**batch["inputs"], use_cache=False).loss
        size = len(batch["samples"])
        self.log("train_loss", loss.detach(), prog_bar=True, batch_size=size)
        if self._handle is not None:
            visual = self._handle.trace.visual_lengths.float().mean()
            self.log("avg_tokens", visual, batch_size=size)
        return loss

    def on_train_batch_end(self, outputs: Any, batch: dict[str, Any], batch_idx: int) -> None:
        self._num_samples += len(batch["samples"]) * self.trainer.world_size
        seconds = time.perf_counter() - self._started
        self.log("samples_per_second", self._num_samples / seconds, prog_bar=True)
        self.log("learning_rate", self.trainer.optimizers[0].param_groups[0]["lr"])
        self.log("step", float(self.global_step))

    def on_train_end(self) -> None:
        self.detach()

    def configure_optimizers(self) -> Any:
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        groups: list[dict[str, Any]] = [
            {"params": [parameter for parameter in trained if parameter.dim() > 1]},
            {
                "params": [parameter for parameter in trained if parameter.dim() <= 1],
                "weight_decay": 0.0,
            },
        ]
        optimiser = torch.optim.AdamW(
            groups, lr=self.learning_rate, weight_decay=self.weight_decay, betas=(0.9, 0.98)
        )
        num_steps = int(self.trainer.estimated_stepping_batches)
        num_warmup = math.ceil(self.warmup * num_steps)

        def factor(step: int) -> float:
            if step < num_warmup:
                return (step + 1) / num_warmup
            done = (step - num_warmup) / max(1, num_steps - num_warmup)
            return 0.5 * (1 + math.cos(math.pi * min(1.0, done)))

        schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, factor)
        return {
            "optimizer": optimiser,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        frozen = {name for name, value in self.named_parameters() if not value.requires_grad}
        state = checkpoint["state_dict"]
        checkpoint["state_dict"] = {name: state[name] for name in state if name not in frozen}

    # -- validation ----------------------------------------------------------------------------

    def on_validation_start(self) -> None:
        self._paused = time.perf_counter()
        # Answers are compared: logits of the survivors are needed.
        self.attach("all")

    def on_validation_epoch_start(self) -> None:
        self._tally, self._loss = defaultdict(lambda: [0, 0]), [0.0, 0]

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        inputs, samples = batch["inputs"], batch["samples"]
        output = self.model(**inputs, use_cache=False)
        labels_BT = inputs["labels"]
        num_labels = int((labels_BT != IGNORED).sum())
        self._loss[0] += float(output.loss) * num_labels
        self._loss[1] += num_labels
        right_BT = self._guesses(inputs, output.logits) == labels_BT
        for row, sample in enumerate(samples):
            for kind, right in _turns(sample, labels_BT[row], right_BT[row]):
                self._tally[kind][0] += right
                self._tally[kind][1] += 1

    def _guesses(self, inputs: Mapping[str, Any], logits_BTV: Tensor) -> Tensor:
        """The most likely token at each position of the unpruned rows, int64 (B, T).

        A token is guessed at the survivor before it; what is guessed at dropped ones is no matter.
        """
        alive_BT = inputs["attention_mask"].bool()
        if self._handle is not None and self._handle.trace.stages:
            alive_BT = alive_BT.clone()
            visual_BT = tp.visual_mask(self.model, inputs["input_ids"])
            for row, kept in enumerate(self._handle.trace.stages[-1].kept):
                places = visual_BT[row].nonzero()[:, 0]
                alive_BT[row, places] = False
                alive_BT[row, places[kept.to(places.device)]] = True
        before_BT = (alive_BT.cumsum(1) - 2).clamp_min(0)
        return logits_BTV.argmax(-1).gather(1, before_BT)

    def on_validation_epoch_end(self) -> None:
        parts: list[Any] = [(dict(self._tally), self._loss)]
        if self.trainer.world_size > 1:
            mine, parts = parts[0], [None] * self.trainer.world_size
            torch.distributed.all_gather_object(parts, mine)
        tally: dict[str, list[int]] = defaultdict(lambda: [0, 0])
        for own, _ in parts:
            for kind, counts in own.items():
                tally[kind] = [a + b for a, b in zip(tally[kind], counts, strict=True)]
        num_labels = sum(loss[1] for _, loss in parts)
        right, total = (sum(counts[i] for counts in tally.values()) for i in (0, 1))
        numbers = {
            "val_loss": sum(loss[0] for _, loss in parts) / num_labels,
            "val_accuracy": right / total,
        }
        numbers |= {f"val_accuracy_{kind}": tally[kind][0] / tally[kind][1] for kind in tally}
        # All processes have the same numbers; sync_dist only tells the trainer so.
        for name, value in sorted(numbers.items()):
            self.log(name, value, prog_bar=name in ("val_loss", "val_accuracy"), sync_dist=True)

    def on_validation_end(self) -> None:
        self._started += time.perf_counter() - self._paused
        self.detach()
        if self.trainer.state.fn == TrainerFn.FITTING:
            self.attach("supervised")


class _Begin(pl.Callback):
    """Notes what is trained once there is something to train: not when a checkpoint has it all."""

    def __init__(self, folder: Path, config: Mapping[str, Any], marks: Mapping[str, str]) -> None:
        self.folder, self.config, self.marks = folder, config, marks

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.is_global_zero:
            (self.folder / SUMMARY).unlink(missing_ok=True)
            text = OmegaConf.to_yaml(OmegaConf.create(dict(self.config)))
            results.write_text(self.folder / results.CONFIG, text)
            results.write_versions(self.folder, self.marks)


class _Detach(pl.Callback):
    """Takes the pruning off when a loop ends by an exception: modules are not told."""

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        assert isinstance(pl_module, FineTune)
        pl_module.detach()


def _turns(sample: Sample, labels_T: Tensor, right_T: Tensor) -> list[tuple[str, bool]]:
    """Kind of each turn, and whether all tokens of its answer are right; answers lie apart."""
    answers: list[tuple[int, list[int]]] = []
    for place in (labels_T != IGNORED).nonzero()[:, 0].tolist():
        if not answers or answers[-1][1][-1] != place - 1:
            answers.append((place, []))
        answers[-1][1].append(place)
    return [
        (turn.kind, bool(right_T[places].all()))
        for turn, (_, places) in zip(sample.turns, answers, strict=True)
    ]


def _check_number(name: str, value: Any, holds: bool, condition: str, example: float) -> None:
    if isinstance(value, bool) or not holds:
        raise ValueError(
            f"{name}: expected a number {condition}, got {value!r}. Set {name}={example}."
        )


def train(config: DictConfig, output_dir: Path) -> None:
    """Fine-tunes a model and saves it in Hugging Face format.

    The folder gets `model/` (weights and processor, for `from_pretrained` and `model=hub
    model.path=...`), `checkpoints/last.ckpt`, `config.yaml`, `versions.json` and, last,
    `training.json`. A finished training that is asked to go on is left as it is.

    Args:
        config: As `configs/train.yaml` composes it.
        output_dir: The run's folder.

    Raises:
        ValueError: If something in the config cannot be honoured.
    """
    from hydra.utils import instantiate

    resolved = compose.plain(config)
    checkpoints = output_dir / "checkpoints"
    start = _checkpoint(config.ckpt_path, output_dir)
    marks = results.fingerprint(resolved)
    # Not from the evaluation's memory: this model changes.
    loaded = instantiate(config.model)
    shape = tp.cost.DecoderShape.from_config(loaded.model.config)
    pruning = compose.build_pruning(config, shape.num_layers)
    module = FineTune(
        loaded,
        pruning,
        parts=resolved["parts"],
        learning_rate=config.learning_rate,
        weight_decay=config.weight_decay,
        warmup=config.warmup,
        gradient_checkpointing=config.gradient_checkpointing,
    )
    module.attach("supervised")  # refuses here, before any data is read, what is not supported
    module.detach()
    data = instantiate(config.data, processor=loaded.processor)
    data.train_dataloader()  # refuses a config without training data
    options = dict(resolved["trainer"])
    options["callbacks"] = [
        *(options.get("callbacks") or []),
        {
            "_target_": "pytorch_lightning.callbacks.ModelCheckpoint",
            "dirpath": str(checkpoints),
            "filename": "last",
            "every_n_train_steps": config.checkpoint_every,
            "enable_version_counter": False,
        },
    ]
    if data.validation is None:
        options["limit_val_batches"] = 0
    logger = instantiate(config.logger) if config.get("logger") else False
    trainer = instantiate(options, logger=logger, enable_model_summary=False)
    trainer.callbacks.append(_Begin(output_dir, resolved, marks))
    torch.manual_seed(config.seed)  # dropout, where a model has it
    with _quiet(resumes=start is not None):
        trainer.fit(module, datamodule=data, ckpt_path=start, weights_only=True)
    if start is not None and (output_dir / SUMMARY).is_file():
        print(f"nothing left to train: {output_dir}", flush=True)
        return
    if trainer.is_global_zero:  # before anything else can go wrong
        loaded.model.eval()
        loaded.model.save_pretrained(output_dir / "model")
        loaded.processor.save_pretrained(output_dir / "model")
    numbers = {name: float(value) for name, value in trainer.callback_metrics.items()}
    if data.validation is not None:
        with _quiet():
            found = trainer.validate(module, datamodule=data, verbose=False)
        # None where trainer.limit_val_batches=0.
        numbers |= {name: float(value) for own in found for name, value in own.items()}
    if trainer.is_global_zero:
        numbers.setdefault("step", trainer.global_step)  # logged by the last step, where one ran
        summary = _summary(module, numbers)
        results.write_text(output_dir / SUMMARY, json.dumps(summary, indent=2))
        print(_sentence(summary, output_dir / "model"), flush=True)


@contextmanager
def _quiet(resumes: bool = False) -> Iterator[None]:
    """Keeps back warnings about what is meant to be so."""
    messages = [
        ".*in eval mode at the start of training",  # what is frozen has no dropout
        ".*overridden `transfer_batch_to_device`",  # pictures stay where they are
        ".*does not have many workers",
        ".*Using `DistributedSampler` with the dataloaders",  # ours repeats no sample
        ".*isinstance.treespec, LeafSpec",  # Lightning's own
    ]
    if resumes:
        messages.append(".*your dataloader is not resumable")  # the data module is
        messages.append("Checkpoint directory .* is not empty")
    with warnings.catch_warnings():
        for message in messages:
            warnings.filterwarnings("ignore", message=message)
        yield


def _checkpoint(choice: str | None, folder: Path) -> str | None:
    """The checkpoint to go on from."""
    if choice is None:
        return None
    path = folder / CHECKPOINT if choice == "last" else Path(choice).expanduser()
    if not path.is_file():
        raise ValueError(
            f"ckpt_path: expected a checkpoint, got {str(path)!r}, which does not exist. Set "
            "hydra.run.dir to the folder of the interrupted run, or ckpt_path=null to start anew."
        )
    try:
        # Mapped, not read; pickled code does not run.
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        reason = "" if isinstance(content, dict) and "loops" in content else "it has no loops"
    except (RuntimeError, OSError, EOFError, ValueError, pickle.UnpicklingError) as error:
        reason = str(error).strip().split("\n")[0].rstrip(".")
    if reason:
        raise ValueError(
            f"ckpt_path: expected a checkpoint that `tokenprune train` wrote, got {str(path)!r}: "
            f"{reason}. Choose another one, or ckpt_path=null to start anew."
        )
    return str(path)


def _summary(module: FineTune, numbers: Mapping[str, float]) -> dict[str, Any]:
    """What training.json says."""
    validation: dict[str, Any] = {}
    if "val_loss" in numbers:
        start = "val_accuracy_"
        validation = {
            "loss": numbers["val_loss"],
            "accuracy": numbers["val_accuracy"],
            "kinds": {
                name.removeprefix(start): value
                for name, value in sorted(numbers.items())
                if name.startswith(start)
            },
        }
    return {
        "steps": int(numbers["step"]),
        # None where all steps were done before this call.
        "train_loss": numbers.get("train_loss"),
        "validation": validation,
        "samples_per_second": numbers.get("samples_per_second"),
        "avg_tokens": numbers.get("avg_tokens"),
        "num_trained": sum(p.numel() for p in module.parameters() if p.requires_grad),
        "num_parameters": sum(p.numel() for p in module.parameters()),
    }


def _sentence(summary: Mapping[str, Any], folder: Path) -> str:
    """The summary for people."""
    parts = [f"{summary['steps']} steps"]
    if summary["train_loss"] is not None:
        parts.append(f"{summary['samples_per_second']:.1f} samples/s")
        parts.append(f"training loss {summary['train_loss']:.3f}")
    if summary["validation"]:
        own = summary["validation"]
        parts.append(f"validation loss {own['loss']:.3f}, accuracy {100 * own['accuracy']:.1f} %")
    return f"{', '.join(parts)}: {folder}"
