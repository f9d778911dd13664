"""What the two recipes share: packed turns, phases of training that go on where they stopped."""

from __future__ import annotations

import argparse
import json
import math
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from model import build_processor
from pytorch_lightning.callbacks import ModelCheckpoint
from torch import Tensor, nn

from tokenprune.data.scenes import COLOURS, SYMBOLS

#: What stands before the image in every prompt.
WORDS = ("<s>", "USER", ":")


def pixels_of(image: Any) -> Tensor:
    """As the processor makes them: float32 (3, H, W) in [-1, 1]."""
    array = np.asarray(image, dtype=np.float32)
    return torch.from_numpy(array / 127.5 - 1).permute(2, 0, 1)


class Phase(pl.LightningModule):
    """What all phases share: AdamW over what is trainable, under a given learning-rate curve."""

    def __init__(self, model: nn.Module, rate: float, num_steps: int, curve: str) -> None:
        super().__init__()
        self.model, self.rate, self.num_steps, self.curve = model, rate, num_steps, curve

    def configure_optimizers(self) -> Any:
        trained = [p for p in self.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in trained if p.dim() > 1]},
            {"params": [p for p in trained if p.dim() <= 1], "weight_decay": 0.0},
        ]
        optimiser = torch.optim.AdamW(groups, lr=self.rate, betas=(0.9, 0.98), weight_decay=0.02)

        def factor(step: int) -> float:
            warm = min(1.0, (step + 1) / 100)
            if self.curve == "constant":
                return warm
            # Of floats, not of NumPy's: a checkpoint with these is not read again.
            return warm * max(0.0, 0.5 * (1 + math.cos(math.pi * min(1.0, step / self.num_steps))))

        schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, factor)
        return {"optimizer": optimiser, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Asking(Phase):
    """A phase of questions: the decoder alone learns, and right answers are counted by kind."""

    #: What of a phase grows with success, and stands in its checkpoints.
    growing: str

    def __init__(
        self,
        model: nn.Module,
        rate: float,
        num_steps: int,
        curve: str,
        hides: bool,
        kinds: Sequence[str],
    ) -> None:
        super().__init__(model, rate, num_steps, curve)
        freeze_all_but_the_decoder(model)
        self.kinds = tuple(kinds)
        # A small decoder copies the whole scene into every image token and looks it up in its first
        # layer; large ones keep the evidence where it is and look further in. To get the latter's
        # shape, nine batches of ten hide image tokens from each other, and from the questions in
        # the first layers; the tenth is as at inference.
        self.hides = hides
        self.right: dict[str, list[float]] = defaultdict(list)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint[self.growing] = getattr(self, self.growing)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        setattr(self, self.growing, checkpoint[self.growing])

    def now_hides(self) -> bool:
        """Whether this batch does."""
        return self.training and self.hides and self.global_step % 10 > 0

    def shift(self, num_rows: int, num_patches: int, device: torch.device) -> Tensor:
        """By so much questions start earlier, int64 (B, 1); for half of the rows they do not.

        Images of one size would teach that questions start at one position. A model that counts on
        it is lost when positions are renumbered after pruning.
        """
        shift = torch.randint(0, num_patches, (num_rows, 1), device=device)
        return shift * torch.randint(0, 2, (num_rows, 1), device=device)

    def answer(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """The loss of a batch, and which of its turns are right, bool (B, turns)."""
        raise NotImplementedError

    def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor:
        loss, right = self.answer(batch)
        self.log("loss", loss.detach())
        for number, kind in enumerate(self.kinds):
            own = right[batch["kinds"] == number].float()
            if len(own):
                self.right[kind].append(own.mean().item())
        self.log("accuracy", right.float().mean())
        self.log(self.growing, float(getattr(self, self.growing)))
        return loss

    def means(self, last: int) -> dict[str, float]:
        """Logs the accuracy of each kind over the epoch's last batches, and begins anew."""
        means = {kind: float(np.mean(values[-last:])) for kind, values in self.right.items()}
        for kind, mean in means.items():
            self.log(f"accuracy_{kind}", mean)
        self.right.clear()
        return means


class Naming(Phase):
    """A phase in which patches learn the words for what they show.

    Args:
        vocabulary: The model's words.
    """

    def __init__(self, model: nn.Module, num_steps: int, vocabulary: Sequence[str]) -> None:
        super().__init__(model, 2e-3, num_steps, "cosine")
        width = model.config.text_config.hidden_size  # type: ignore[union-attr]
        self.none = nn.Parameter(torch.randn(3, width) * width**-0.5)  # no symbol, no colour, sign
        ids = [vocabulary.index(word) for word in (*SYMBOLS, *COLOURS)]
        self.register_buffer("ids", torch.tensor(ids), persistent=False)

    def read(self, states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Features of patches (B, P, D), and how like each word of a symbol and of a colour.

        Before the symbols is that for none, before the colours, too; after these that of a sign.
        """
        features = self.model.model.multi_modal_projector(states)
        features = nn.functional.rms_norm(features, features.shape[-1:])
        words = self.model.get_input_embeddings().weight[self.ids]
        symbols = torch.cat([self.none[:1], words[: len(SYMBOLS)]])
        colours = torch.cat([self.none[1:2], words[len(SYMBOLS) :], self.none[2:]])
        return features, features @ symbols.T, features @ colours.T


def weighed(logits: Sequence[Tensor], classes: Tensor, weights: Sequence[float]) -> Tensor:
    """Cross-entropy of several read-outs of patches, with their classes (B, P, read-outs)."""
    losses = [
        weight * nn.functional.cross_entropy(own.flatten(0, 1), target.flatten())
        for own, target, weight in zip(logits, classes.unbind(-1), weights, strict=True)
    ]
    return torch.stack(losses).sum()


class Packed:
    """Causal attention in which turns see the prefix and themselves: (B, H, T, E) -> (B, T, H, E).

    Equal to a block mask, at 60 % of its cost. With `hides`, turns see the image only from layer
    `first_look` on, and image tokens do not see each other.

    Args:
        turn_length: Tokens of a turn, pads included.
        first_look: See above.
        watched: Layers of which it is kept where turns look.

    Attributes:
        hides: See above.
        start: Tokens before the turns.
        looked: What is kept, (B, H, tokens of turns, tokens before these and of their turn).
    """

    def __init__(self, turn_length: int, first_look: int, watched: Collection[int] = ()) -> None:
        self.turn_length, self.first_look, self.watched = turn_length, first_look, watched
        self.hides, self.start = False, 0
        self.looked: dict[int, Tensor] = {}

    def __call__(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float = 1.0,
        **unused: Any,
    ) -> tuple[Tensor, None]:
        (query_p, query_t), (key_p, key_t), (value_p, value_t) = (
            (tensor[:, :, : self.start], tensor[:, :, self.start :])
            for tensor in (query, key, value)
        )
        if self.hides:
            prefix = self._lonely(query_p * scaling, key_p, value_p)
        else:
            prefix = nn.functional.scaled_dot_product_attention(
                query_p, key_p, value_p, is_causal=True, scale=scaling
            )
        length = self.turn_length
        query_t = query_t * scaling
        own_q, own_k, own_v = (t.unflatten(2, (-1, length)) for t in (query_t, key_t, value_t))
        future = torch.ones(length, length, dtype=torch.bool, device=query.device).triu(1)
        own = (own_q @ own_k.transpose(-1, -2)).masked_fill(future, -torch.inf).flatten(2, 3)
        if self.hides and module.layer_idx < self.first_look:
            key_p, value_p = key_p[:, :, : len(WORDS)], value_p[:, :, : len(WORDS)]
        shared = query_t @ key_p.transpose(-1, -2)
        weights = torch.cat([shared, own], -1).softmax(-1)
        seen = key_p.shape[2]
        if module.layer_idx in self.watched and module.training:
            self.looked[module.layer_idx] = weights
        turns = weights[..., :seen] @ value_p
        turns = turns + (weights[..., seen:].unflatten(2, (-1, length)) @ own_v).flatten(2, 3)
        return torch.cat([prefix, turns], 2).transpose(1, 2).contiguous(), None

    @staticmethod
    def _lonely(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Prefix whose image tokens see the words before them and themselves, (B, H, P, E)."""
        words = len(WORDS)
        past = query @ key[:, :, :words].transpose(-1, -2)
        order = torch.arange(key.shape[2], device=key.device)
        past = past.masked_fill(order[:words] >= order[:, None], -torch.inf)
        weights = torch.cat([past, (query * key).sum(-1, keepdim=True)], -1).softmax(-1)
        return weights[..., :-1] @ value[:, :, :words] + weights[..., -1:] * value


def freeze_all_but_the_decoder(model: Any) -> None:
    """Projector and words keep the common language of the first phase.

    At the decoder's learning rate a hundred steps would wipe it out, and the lookup did not begin
    within 1 000.
    """
    model.requires_grad_(False)
    model.model.language_model.layers.requires_grad_(True)
    model.model.language_model.norm.requires_grad_(True)
    model.model.language_model.set_attn_implementation("packed")


def train(
    phase: Phase, name: str, folder: Path, epochs: int, feed: pl.LightningDataModule, precision: str
) -> None:
    """Runs a phase to its end, or goes on where a killed run stopped."""
    torch.manual_seed(1)
    keep = ModelCheckpoint(
        folder / name, filename="last", save_top_k=1, every_n_epochs=1, enable_version_counter=False
    )
    number = len(list((folder / name).glob("log_*")))  # a resumed run starts a log of its own
    log = pl.loggers.CSVLogger(folder, name=name, version=f"log_{number}")
    trainer = pl.Trainer(
        accelerator="auto",
        devices=1,
        precision=precision,  # type: ignore[arg-type]
        max_epochs=epochs,
        gradient_clip_val=1.0,
        callbacks=[keep],
        logger=log,
        log_every_n_steps=10,
        enable_progress_bar=False,
        enable_model_summary=False,
        reload_dataloaders_every_n_epochs=1,
    )
    last = folder / name / "last.ckpt"
    trainer.fit(phase, datamodule=feed, ckpt_path=str(last) if last.exists() else None)


class Phases:
    """Phases one after another, in a folder; those that are done are not done again.

    Args:
        model: What they train.
        folder: Where checkpoints, logs and times go.

    Attributes:
        times: Seconds of the process that ended each phase.
    """

    def __init__(self, model: Any, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.model, self.folder, self._file = model, folder, folder / "times.json"
        known = self._file.read_text() if self._file.exists() else "{}"
        self.times: dict[str, float] = json.loads(known)

    def run(
        self,
        name: str,
        phase: Phase,
        epochs: int,
        feed: Callable[[Phase], pl.LightningDataModule],
        precision: str = "32-true",
    ) -> None:
        """Runs one, unless it is done, and loads what it has learnt."""
        done, begun = self.folder / f"{name}.pt", time.monotonic()
        if not done.exists():
            train(phase, name, self.folder, epochs, feed(phase), precision)
            torch.save(self.model.state_dict(), done)
            self.times[name] = round(time.monotonic() - begun)
            self._file.write_text(json.dumps(self.times))
            print(f"{name}: {self.times[name]} s", flush=True)
        self.model.load_state_dict(torch.load(done, weights_only=True))

    def save(self, name: str, level: str) -> None:
        """Writes a checkpoint for `from_pretrained`."""
        self.model.save_pretrained(self.folder / name)
        build_processor(level).save_pretrained(self.folder / name)


def arguments(parser: argparse.ArgumentParser, **epochs: int) -> argparse.Namespace:
    """The command's options: folder, threads, epochs of each phase."""
    parser.add_argument("--threads", type=int, default=2)
    for name, number in epochs.items():
        parser.add_argument(f"--{name}-epochs", type=int, default=number)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    return given
