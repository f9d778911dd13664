"""The module that is trained: losses per supervised token, pruning that follows its schedule.

Shape suffixes: B batch rows, T positions.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.trainer.states import TrainerFn
from torch import Tensor

import tokenprune as tp
from tokenprune.cost import DecoderShape
from tokenprune.data.collate import IGNORED
from tokenprune.runs.compose import Pruning
from tokenprune.runs.models import LoadedModel
from tokenprune.training.check import Lora, check_logits, check_rates
from tokenprune.training.quiet import quiet_if_started
from tokenprune.training.sharding import WEIGHTS, shard
from tokenprune.training.throughput import forward_flops
from tokenprune.training.tuning import build_optimizer, cosine, parts_of, tune
from tokenprune.training.validation import Tally, guesses
from tokenprune.training.window import Window


class FineTune(pl.LightningModule):
    """Next-token training on answers; validation by teacher forcing.

    Pruning is attached while the training and validation loops run. The labels decide the query
    rows, so training and validation prune alike.

    A step's loss is the mean over all supervised tokens of its batches, on all processes and in all
    accumulated batches: means of batches would count a token in a short answer for more.

    Args:
        loaded: Model and processor; the model is trained in place.
        pruning: Strategy, schedule and positions; None for the unpruned model.
        tuning: `"full"`, `"projector"` or `"lora"`, see `tokenprune.training.tuning.tune`.
        parts: What is trained: some of `vision_tower`, `projector` and `decoder`.
        lora: Size of the adapters.
        learning_rate: Peak, after the warm-up; from there a cosine leads to zero.
        learning_rates: Peaks of single parts; None is `learning_rate`.
        weight_decay: AdamW's, on matrices only.
        warmup: Share of the steps during which the learning rate rises.
        schedule_warmup: Share of the steps during which `keep` falls from 1 to the schedule's.
            Validation always prunes by the schedule itself.
        gradient_checkpointing: Recomputes layers in the backward pass: slower, less memory.
        logits: What a pruned training step's call returns, as in `tokenprune.attach`: any other
            than `"supervised"` costs memory, for callbacks and hooks that read logits.

    Raises:
        ValueError: A value is out of range, or the model has no such part.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        pruning: Pruning | None = None,
        *,
        tuning: str = "full",
        parts: Sequence[str] = ("projector", "decoder"),
        lora: Lora | None = None,
        learning_rate: float = 2e-5,
        learning_rates: Mapping[str, float | None] | None = None,
        weight_decay: float = 0.0,
        warmup: float = 0.03,
        schedule_warmup: float = 0.0,
        gradient_checkpointing: bool = False,
        logits: str = "supervised",
    ) -> None:
        super().__init__()
        rates = dict(learning_rates or {})
        check_rates(learning_rate, rates, weight_decay, warmup, schedule_warmup)
        check_logits(logits)
        self.logits = logits
        self.loaded = loaded
        model: Any = loaded.model
        self.model = model
        self.pruning = pruning
        self.learning_rate, self.learning_rates = learning_rate, rates
        self.weight_decay, self.warmup = weight_decay, warmup
        self.schedule_warmup = schedule_warmup
        self.strict_loading = False  # checkpoints leave out what is not trained
        #: FLOPs of the latest batch, which ThroughputMonitor asks for.
        self.flops_per_batch = 0.0
        self._shape = DecoderShape.from_config(model.config)
        self.adapters = tune(model, tuning, parts, lora)
        self._trained_parts = {
            part for part, own in parts_of(model).items() if any(p.requires_grad for p in own)
        }
        self._recomputes, self._recomputing = gradient_checkpointing, False
        self._handle: tp.Handle | None = None
        self._schedule: tp.Schedule | None = None
        self._window: Window | None = None
        #: Batches without a supervised token so far, on all processes.
        self.num_unsupervised: Tensor | float = 0.0
        self._tally = Tally()
        self._num_samples, self._started = 0, 0.0
        self._num_own = self._num_left = 0

    def __setstate__(self, state: dict[str, Any]) -> None:
        quiet_if_started()  # nothing of a training arrives earlier
        restore: Any = super().__setstate__
        restore(state)
        # transformers notes what a class of models can record when one is built, and LLaVA reads
        # its vision states from there: a process that only received a model must build one.
        with torch.device("meta"):
            type(self.model)(self.model.config)

    def configure_model(self) -> None:
        """Lets layers be recomputed, and shards the model where the trainer's strategy does so."""
        if self._recomputes and not self._recomputing:
            # In the process that trains: what this hangs on a model cannot be sent to another.
            model: Any = self.model
            model.gradient_checkpointing_enable({"use_reentrant": False})
            self._recomputing = True
        if self.device_mesh is not None:
            shard(self.model, self.device_mesh["data_parallel"])

    def merge(self) -> None:
        """Makes a plain model of one with LoRA adapters."""
        if self.adapters is not None:
            self.adapters.merge()
            self.adapters = None

    # -- pruning -------------------------------------------------------------------------------

    def attach(self, logits: str, schedule: tp.Schedule | None = None) -> None:
        """Prunes the model's calls from here on, until `detach`.

        Args:
            logits: As in `tokenprune.attach`.
            schedule: Instead of the target.
        """
        self.detach()
        if self.pruning is not None:
            own = self.pruning
            self._schedule = own.schedule if schedule is None else schedule
            self._handle = tp.attach(
                self.model, own.strategy, self._schedule, own.positions, logits
            )

    def detach(self) -> None:
        """Leaves the model as it was found."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    @property
    def trace(self) -> tp.Trace | None:
        """What the latest call kept; None while the model is not pruned."""
        return None if self._handle is None else self._handle.trace

    def schedule_at(self, step: int) -> tp.Schedule | None:
        """What training prunes by at a step: `keep` falls linearly from 1 to the target's."""
        if self.pruning is None:
            return None
        target = self.pruning.schedule
        num_steps = math.ceil(self.schedule_warmup * self.trainer.estimated_stepping_batches)
        if step >= num_steps:
            return target
        stages = [
            tp.Stage(stage.layer, round(1 - (1 - stage.keep) * step / num_steps, 12))
            for stage in target.stages
        ]
        return tp.Schedule(tuple(stages), target.rounding)

    def configure_callbacks(self) -> list[pl.Callback]:
        return [_Detach()]

    # -- training ------------------------------------------------------------------------------

    def on_fit_start(self) -> None:
        self.model.train()
        for module in self.model.modules():
            own = [parameter.requires_grad for parameter in module.parameters()]
            if own and not any(own):
                module.eval()  # no dropout in what is not trained
        if self._recomputes:
            # transformers recomputes layers in training mode only; their parts stay as they are.
            for module in self.model.get_decoder().modules():
                if hasattr(module, "gradient_checkpointing"):
                    module.training = True

    def on_train_start(self) -> None:
        self._num_samples, self._started = 0, time.perf_counter()
        self._window = None
        self.attach(self.logits, self.schedule_at(self.global_step))

    def transfer_batch_to_device(
        self, batch: dict[str, Any], device: torch.device, dataloader_idx: int
    ) -> dict[str, Any]:
        inputs = batch["inputs"]
        if "labels" in inputs:
            # Counted here, where no device has to be waited for. A row's first token is no target.
            labels_BT = inputs["labels"]
            num_supervised = int((labels_BT[:, 1:] != IGNORED).sum())
            lengths = inputs["attention_mask"].sum(1).tolist()
            batch = batch | {"num_supervised": num_supervised, "lengths": lengths}
            if num_supervised == 0 and self.trainer.training:
                # The mean over nothing is NaN: any token will do, for it is counted 0 times.
                inputs["labels"] = labels_BT.clone()
                last = int(inputs["attention_mask"][0].nonzero()[-1])
                inputs["labels"][0, last] = inputs["input_ids"][0, last]
        # Samples hold pictures, which stay where they are.
        return batch | {"inputs": inputs.to(device, dtype=self.model.dtype)}

    def on_train_batch_start(self, batch: dict[str, Any], batch_idx: int) -> None:
        if self._window is None and self.schedule_warmup > 0:
            schedule = self.schedule_at(self.global_step)
            if schedule != self._schedule:
                self.attach(self.logits, schedule)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        inputs, num_supervised = batch["inputs"], batch["num_supervised"]
        loss = self.model(**inputs, use_cache=False).loss.float() * num_supervised
        passes = 3 if self._decoder_trained_whole() else 2
        self.flops_per_batch = passes * forward_flops(self._shape, batch["lengths"], self.trace)
        if self.trace is not None:
            visual = self.trace.visual_lengths.float().mean()
            self.log("avg_tokens", visual, batch_size=len(batch["samples"]))
        num_batches = self.trainer.accumulate_grad_batches
        if self._window is None:
            self._window = Window.open(self._over_processes, num_supervised * num_batches, loss)
        self._window.add(loss.detach(), num_supervised)
        loss = loss + self._zero(inputs)
        # The trainer takes the mean over processes and accumulated batches: undone here.
        scaled: Tensor = loss * (self.trainer.world_size * num_batches) / self._window.reference
        return scaled

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        assert self._window is not None
        window, self._window = self._window, None
        loss, num_supervised, num_unsupervised = self._over_processes(window.sums)
        # Gradients so far are those of the sum over tokens, by a number close to theirs.
        factor = window.reference / num_supervised.clamp_min(1)
        for parameter in self.parameters():
            if parameter.grad is not None:
                own: Any = parameter.grad
                getattr(own, "_local_tensor", own).mul_(factor)
        self.num_unsupervised = self.num_unsupervised + num_unsupervised
        self.log("train_loss", loss / num_supervised.clamp_min(1), prog_bar=True)
        self.log("unsupervised_batches", self.num_unsupervised)

    def _over_processes(self, numbers: Tensor) -> Tensor:
        """The sum over all processes."""
        total = self.trainer.strategy.reduce(numbers.clone(), reduce_op="sum")
        assert isinstance(total, Tensor)
        return total

    def _zero(self, inputs: Mapping[str, Any]) -> Tensor | float:
        """0, attached to trained parameters that a batch may not use.

        Processes wait for each other's gradients: those of the projector where one has no image,
        and of the last layers of a vision tower whose output is taken before them.
        """
        shows = any("pixel" in name for name in inputs)
        doubtful = {"vision_tower"} if shows else {"vision_tower", "projector"}
        if not doubtful & self._trained_parts:
            return 0.0
        parts = parts_of(self.model)
        own = [p for part in doubtful for p in parts[part] if p.requires_grad]
        return torch.stack([p.flatten()[0].float() for p in own]).sum() * 0.0

    def _decoder_trained_whole(self) -> bool:
        return "decoder" in self._trained_parts and self.adapters is None

    def on_train_batch_end(self, outputs: Any, batch: dict[str, Any], batch_idx: int) -> None:
        self._num_samples += len(batch["samples"]) * self.trainer.world_size
        seconds = time.perf_counter() - self._started
        self.log("samples_per_second", self._num_samples / seconds, prog_bar=True)
        for group in self.trainer.optimizers[0].param_groups:
            self.log(f"learning_rate_{group['part']}", group["lr"])
        self.log("step", float(self.global_step))

    def on_train_end(self) -> None:
        self.detach()

    def configure_optimizers(self) -> Any:
        optimiser = build_optimizer(
            self.model, self.learning_rate, self.learning_rates, self.weight_decay
        )
        factor = cosine(int(self.trainer.estimated_stepping_batches), self.warmup)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, factor)
        return {
            "optimizer": optimiser,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        # By one name each: a head that is the embeddings has another in the state.
        trained = {name for name, value in self.named_parameters() if value.requires_grad}
        kept = trained | {name for name, _ in self.named_buffers()}
        state = checkpoint["state_dict"]
        own = {name: state[name] for name in state if name in kept}
        checkpoint["state_dict"] = own
        checkpoint[WEIGHTS] = {name: list(value.shape) for name, value in own.items()}
        checkpoint["unsupervised_batches"] = float(self.num_unsupervised)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.num_unsupervised = checkpoint.get("unsupervised_batches", 0.0)

    # -- validation ----------------------------------------------------------------------------

    def on_validation_start(self) -> None:
        self._paused = time.perf_counter()
        # Answers are compared: logits of the survivors are needed.
        self.attach("all")

    def on_validation_epoch_start(self) -> None:
        self._tally = Tally()
        # A sharded layer runs only where it runs on all processes: they agree on a number.
        trainer = self.trainer
        sanity = trainer.sanity_checking
        batches = trainer.num_sanity_val_batches if sanity else trainer.num_val_batches
        self._num_own = self._num_left = int(sum(batches))
        if self.device_mesh is not None:
            most = torch.tensor(self._num_left, device=self.device)
            self._num_left = int(trainer.strategy.reduce(most, reduce_op="max"))

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        inputs = batch["inputs"]
        output = self.model(**inputs, use_cache=False)
        self.flops_per_batch = forward_flops(self._shape, batch["lengths"], self.trace)
        labels_BT = inputs["labels"]
        if (num_labels := batch["num_supervised"]) > 0:
            self._tally.add_loss(float(output.loss), num_labels)
        right_BT = guesses(self.model, inputs, output.logits, self.trace) == labels_BT
        self._tally.add_answers(batch["samples"], labels_BT, right_BT)
        self._num_left -= 1
        ends = batch_idx + 1 == self._num_own
        while ends and self.device_mesh is not None and self._num_left > 0:
            self.model(**inputs, use_cache=False)  # for the others
            self._num_left -= 1

    def on_validation_epoch_end(self) -> None:
        numbers = self._tally.numbers(self.trainer.world_size)
        # All processes have the same numbers; sync_dist only tells the trainer so.
        for name, value in sorted(numbers.items()):
            self.log(name, value, prog_bar=name in ("val_loss", "val_accuracy"), sync_dist=True)
        if self.trainer.state.fn == TrainerFn.FITTING:
            self.log("step", float(self.global_step), sync_dist=True)
            self.log("validated_step", float(self.global_step), logger=False, sync_dist=True)

    def on_validation_end(self) -> None:
        self._started += time.perf_counter() - self._paused
        self.detach()
        if self.trainer.state.fn == TrainerFn.FITTING:
            self.attach(self.logits, self.schedule_at(self.global_step))


class _Detach(pl.Callback):
    """Takes the pruning off when a loop ends by an exception: modules are not told."""

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        assert isinstance(pl_module, FineTune)
        pl_module.detach()
