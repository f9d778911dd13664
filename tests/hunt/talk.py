"""A conversation under way: the pruned model is called, and what it gave is noted row by row."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from models import PAD
from torch import Tensor, nn
from transformers import DynamicCache, StaticCache

import tokenprune as tp
from hunt.cases import FIXED, GUESSING, Case, Token, Turn
from hunt.pictures import assistant, model_of, picture
from hunt.replayed import held
from hunt.witness import Witness

BEAMS = 2
CHANCE, TEMPERATURE = 5, 1.3


@dataclass
class Stage:
    """One cut of a row.

    Attributes:
        kept: What is left, in the call's own numbers.
        scores: Of what was alive before it, or None.
        weights: How what is left is mixed, or None.
        seen: What a witness was shown, or None.
    """

    kept: list[int]
    scores: Tensor | None
    weights: Tensor | None
    seen: dict[Any, Any] | None


@dataclass
class Told:
    """What the pruned model gave for a row in one call of the decoder.

    Attributes:
        tokens: Its tokens of the call, without hidden ones.
        images: Its images of the call.
        positions: What the model was given, or would count.
        stages: Each cut; none if no row shows an image.
        logits: Of survivors, or None where none were given.
        which: Numbers among the call's survivors of those that have logits.
        counts: Survivors that the trace counts in the last layer, or None.
    """

    tokens: list[Token]
    images: list[tuple[int, tuple[int, int]]]
    positions: list[int]
    stages: list[Stage] = field(default_factory=list)
    logits: Tensor | None = None
    which: list[int] = field(default_factory=list)
    counts: int | None = None


class Conversation:
    """A case under way.

    Attributes:
        told: What each row was told, call by call.
        losses: Of the calls with labels.
        gradients: Of the decoder, by name, after training.
        output: What the last turn gave.
    """

    def __init__(self, case: Case, graphs: tp.Graphs | None = None) -> None:
        self.case, self.graphs = case, graphs
        self.model = model_of(case.family, case.attention)
        self.cache: Any = None
        config = self.model.config.get_text_config()
        if case.cache == "dynamic":
            self.cache = DynamicCache(config=config)
        elif case.cache == "static":
            self.cache = StaticCache(config=config, max_cache_len=FIXED)
        num_rows = len(case.turns[0].rows)
        self.told: list[list[Told]] = [[] for _ in range(num_rows)]
        self.ids = torch.zeros(num_rows, 0, dtype=torch.int64)
        self.real = torch.zeros(num_rows, 0, dtype=torch.bool)
        self.visual = torch.zeros(num_rows, 0, dtype=torch.bool)
        self.order = list(range(num_rows))
        self.losses: list[Tensor] = []
        self.gradients: dict[str, Tensor] = {}
        self.output: Any = None
        self._calls: list[tuple[list[tp.TracedStage], dict[int, Any], list[int]]] = []

    def run(self) -> None:
        case = self.case
        mask = self._marks() if case.told == "start" else None
        trains = case.training != "no"
        low = torch.autocast("cpu", torch.bfloat16) if case.precision != "float32" else None
        with (
            torch.set_grad_enabled(trains),
            _training(self.model, case.training),
            low or nullcontext(),
            tp.prune(
                self.model,
                case.strategy,
                case.schedule,
                case.policy,
                case.logits,
                mask,
                graphs=self.graphs,
            ) as trace,  # fmt: skip
            self._heard(trace),
        ):
            for turn in case.turns:
                self._turn(turn)
                self._after(turn)
            if trains and torch.isfinite(self.output.loss):
                self.output.loss.backward()
                self.gradients = gradients(self.model)

    def _marks(self) -> Tensor:
        """Which columns of the conversation are visual, bool (B, T)."""
        parts = []
        for turn in self.case.turns:
            part = torch.zeros(len(turn.rows), turn.width, dtype=torch.bool)
            for row, tokens in enumerate(turn.rows):
                for token, column in zip(tokens, turn.columns(row), strict=True):
                    part[row, column] = token.visual
            parts.append(part)
        return torch.cat(parts, 1)

    def results(self) -> list[Tensor]:
        """All that was given: logits and words, what cuts did, and what the cache holds."""
        found = held(self.cache)
        for told in (told for own in self.told for told in own):
            found += [] if told.logits is None else [told.logits]
            for stage in told.stages:
                found.append(torch.tensor(stage.kept, dtype=torch.int64))
                found += [own for own in (stage.scores, stage.weights) if own is not None]
        if self.case.turns[-1].generates:
            return [*found, self.output.sequences]
        return [*found, self.output.logits]

    @contextmanager
    def _heard(self, trace: tp.Trace) -> Iterator[None]:
        """Notes what the trace and witnesses say after each call of the decoder."""
        witnesses = [own for own in self.case.strategies if isinstance(own, Witness)]
        for witness in witnesses:
            witness.notes.clear()  # of other runs

        def note(*args: Any) -> None:
            seen: dict[int, Any] = {}
            for witness in witnesses:
                seen |= dict(witness.notes)
                witness.notes.clear()
            self._calls.append((list(trace.stages), seen, trace.lengths[-1].tolist()))

        hook = self.model.get_decoder().register_forward_hook(note)
        try:
            yield
        finally:
            hook.remove()

    def _turn(self, turn: Turn) -> None:
        case = self.case
        turn = copy.copy(turn)
        turn.rows = [turn.rows[row] for row in self.order]
        turn.images = [turn.images[row] for row in self.order]
        num_rows, width, offset = len(turn.rows), turn.width, self.ids.shape[1]
        ids = torch.full((num_rows, width), PAD)
        real = torch.zeros(num_rows, width, dtype=torch.bool)
        visual, labels = real.clone(), torch.full((num_rows, width), -100)
        for row, tokens in enumerate(turn.rows):
            for token, column in zip(tokens, turn.columns(row), strict=True):
                ids[row, column], labels[row, column] = token.id, token.label
                real[row, column], visual[row, column] = not token.hidden, token.visual
        self.ids = torch.cat([self.ids, ids], 1)
        self.real = torch.cat([self.real, real], 1)
        self.visual = torch.cat([self.visual, visual], 1)
        call: dict[str, Any] = {"input_ids": ids, **self._pixels(turn)}
        if turn.mask == "2d":
            call["attention_mask"] = self.real.long()
        elif turn.mask != "none":
            call["attention_mask"] = self._pairs(turn, offset, width)
        positions = self._positions(turn, offset, width)
        if case.positions in ("counted", "gaps") and not turn.generates:
            call["position_ids"] = positions
        if case.family == "llama" and case.told == "call":
            call["visual_mask"] = self.visual
        if turn.labelled:
            call["labels"] = labels
        if turn.to_keep:
            call["logits_to_keep"] = turn.to_keep
        self._calls.clear()
        if turn.generates:
            self.output = self._generate(call, turn)
            self._note_generation(turn, positions)
            return
        if case.words == "embeds":
            call["inputs_embeds"] = self.model.get_input_embeddings()(call.pop("input_ids"))
        cache = {} if self.cache is None else {"past_key_values": self.cache}
        self.output = self.model(**call, **cache, use_cache=self.cache is not None)
        if turn.labelled:
            self.losses.append(self.output.loss.detach())
        self._note(turn, positions, 0, range(width))
        self._note_logits(turn)

    def _pixels(self, turn: Turn) -> dict[str, Tensor]:
        shown = [picture(self.case.family, *image).pixels for own in turn.images for image in own]
        if not shown:
            return {}
        if self.case.family == "llava":
            return {"pixel_values": torch.cat(shown)}
        most = max(tiles.shape[1] for tiles in shown)
        padded = [
            nn.functional.pad(tiles, (0, 0) * 3 + (0, most - tiles.shape[1])) for tiles in shown
        ]
        sizes = [image[1] for own in turn.images for image in own]
        return {"pixel_values": torch.cat(padded), "image_sizes": torch.tensor(sizes)}

    def _positions(self, turn: Turn, offset: int, width: int) -> Tensor:
        """What the model counts, or is given."""
        if self.case.positions == "counted" or turn.generates:
            return (self.real.long().cumsum(1) - 1).clamp_min(0)[:, offset:]
        columns = torch.arange(offset, offset + width).expand(len(self.real), -1)
        if self.case.positions == "none":
            return columns
        # Gaps that differ between rows; no two columns share a position.
        return columns * 2 + torch.arange(len(self.real))[:, None] + (columns > 4).long()

    def _pairs(self, turn: Turn, offset: int, width: int) -> Tensor:
        """A mask over pairs of tokens."""
        total = offset + width
        queries, keys = torch.arange(offset, total), torch.arange(total)
        allowed = (keys <= queries[:, None]) & self.real[:, None, :]
        pads = ~self.real[:, offset:, None]
        if turn.pads == "open":
            allowed = allowed | pads
        elif turn.pads == "eye":
            allowed = allowed | (keys == queries[:, None])
        allowed = allowed[:, None]
        if self.case.cache == "static":
            allowed = nn.functional.pad(allowed, (0, FIXED - total), value=False)
        if turn.mask == "bool":
            return allowed
        return torch.zeros(allowed.shape).masked_fill(~allowed, torch.finfo(torch.float32).min)

    def _generate(self, call: dict[str, Any], turn: Turn) -> Any:
        call["input_ids"], call["attention_mask"] = self.ids, self.real.long()
        if self.case.words == "embeds":
            call["inputs_embeds"] = self.model.get_input_embeddings()(call.pop("input_ids"))
        more: dict[str, Any] = {
            "beams": {"num_beams": BEAMS, "num_return_sequences": BEAMS, "output_scores": True},
            "lookup": {"prompt_lookup_num_tokens": 2},
            "chunks": {"prefill_chunk_size": turn.chunk},
            "sample": {"do_sample": True, "top_k": 0, "temperature": TEMPERATURE},
        }.get(turn.way, {})
        if self.case.cache == "static":
            more["disable_compile"] = True
        if turn.way == "assisted":
            more["assistant_model"] = assistant(self.case.family, turn.assistant)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(CHANCE)
            return self.model.generate(
                **call,
                past_key_values=self.cache,
                max_new_tokens=turn.new_tokens,
                return_dict_in_generate=True,
                output_logits=True,
                **{"do_sample": False, **more},
            )

    # -- notes -----------------------------------------------------------------------------------

    def _note(self, turn: Turn, positions: Tensor, call: int, span: range, times: int = 1) -> None:
        """Notes what a call of the decoder gave each row: its tokens in a span of columns.

        Args:
            turn: As it was laid out.
            positions: Of the turn.
            call: Number of the call.
            span: Columns of the turn.
            times: How often generation repeats each row.
        """
        traced, seen, lengths = self._calls[call]
        before = [sum(t.visual for told in own for t in told.tokens) for own in self.told]
        rows = [
            [(t, c) for t, c in zip(tokens, turn.columns(row), strict=True)
             if c in span and not t.hidden]
            for row, tokens in enumerate(turn.rows)
        ]  # fmt: skip
        shows = any(token.visual for row in rows for token, _ in row)
        counts = shows and turn.way not in GUESSING  # there the trace counts guesses, too
        if shows:
            assert [stage.layer for stage in traced] == self.case.cuts
        for row, own in enumerate(rows):
            stages = []
            for stage in traced if shows else []:
                kept = (stage.kept[row * times] - before[row]).tolist()
                scores = None if stage.scores is None else stage.scores[row * times]
                weights = None if stage.weights is None else stage.weights[row * times]
                notes = seen.get(stage.layer)
                stages.append(
                    Stage(kept, scores, weights, None if notes is None else notes[row * times])
                )
            images = turn.images[row]
            if turn.way == "chunks":
                images = self._shown(row, images, sum(token.visual for token, _ in own))
            self.told[row].append(
                Told(
                    tokens=[token for token, _ in own],
                    images=images,
                    positions=[int(positions[row, column]) for _, column in own],
                    stages=stages,
                    # A pad that sees itself may pass for a token, where there are no others.
                    counts=lengths[row * times] if counts and len(own) > 1 else None,
                )
            )

    def _shown(self, row: int, images: list[Any], count: int) -> list[Any]:
        """The images of a row's prompt whose tokens, `count` of them, a chunk holds."""
        left = images[sum(len(told.images) for told in self.told[row]) :]
        shown = []
        while left and count > 0:
            shown.append(left.pop(0))
            count -= len(picture(self.case.family, *shown[-1]).features)
        return shown

    def _note_logits(self, turn: Turn) -> None:
        """Notes the logits of a forward call."""
        output, case, width = self.output, self.case, turn.width
        if output.logits is None:
            return
        own = [
            [(t, c) for t, c in zip(tokens, turn.columns(row), strict=True) if not t.hidden]
            for row, tokens in enumerate(turn.rows)
        ]
        alive, lost = [], False
        for row, pairs in enumerate(own):
            visual = [column for token, column in pairs if token.visual]
            stages = self.told[row][-1].stages
            kept = stages[-1].kept if stages else range(len(visual))
            lost = lost or len(kept) < len(visual)
            text = [column for token, column in pairs if not token.visual]
            alive.append(sorted(text + [visual[number] for number in kept]))
        whole = case.logits == "full" or not lost
        ends = all(not pairs or pairs[-1][1] == width - 1 for pairs in own)
        length = output.logits.shape[1]
        total = width if whole else max(map(len, alive))
        if turn.to_keep:
            assert length == min(turn.to_keep, total)
        elif whole:
            assert length == width
        else:
            total = length  # rows of pads alone may have one that passes for a token
        for row, columns in enumerate(alive):
            places = columns
            if not whole:
                start = total - len(columns) if ends else 0
                places = list(range(start, start + len(columns)))
            there = [number for number, place in enumerate(places) if place >= total - length]
            told = self.told[row][-1]
            told.which = there
            told.logits = output.logits[row, [places[n] - total + length for n in there]].detach()

    def _note_generation(self, turn: Turn, positions: Tensor) -> None:
        times = BEAMS if turn.way == "beams" else 1
        width = turn.width
        size = turn.chunk if turn.way == "chunks" else width
        for call, start in enumerate(range(0, width, size)):
            self._note(turn, positions, call, range(start, min(start + size, width)), times)
        for row in range(len(turn.rows)):
            told = self.told[row][-1]
            kept = [True] * len(told.tokens)
            if told.stages:
                visual = [n for n, token in enumerate(told.tokens) if token.visual]
                for number, index in enumerate(visual):
                    kept[index] = number in told.stages[-1].kept
            told.logits, told.which = self.output.logits[0][row * times][None], [sum(kept) - 1]
            if times > 1:
                continue
            before = told.positions[-1]
            for step in range(turn.new_tokens - 1):
                token = int(self.output.sequences[row, step - turn.new_tokens])
                logits = self.output.logits[step + 1][row][None]
                position = before + step + 1
                self.told[row].append(
                    Told([Token(token)], [], [position], logits=logits, which=[0])
                )
        if times == 1:  # what was said last is in no cache, and is left unsaid
            said = self.output.sequences[:, -turn.new_tokens : -1]
            self.ids = torch.cat([self.ids, said], 1)
            self.real = nn.functional.pad(self.real, (0, said.shape[1]), value=True)
            self.visual = nn.functional.pad(self.visual, (0, said.shape[1]))

    # -- between turns ---------------------------------------------------------------------------

    def _after(self, turn: Turn) -> None:
        parts = self.cache.layers if turn.layerwise else [self.cache]
        if turn.after == "copy":
            left = self.cache
            self.cache = copy.deepcopy(self.cache)
            self._mutter(left, 2)  # which must not be heard in the copy
        elif turn.after == "crop":
            self._mutter(self.cache, 3)
            for part in parts:
                part.crop(-3)
        elif turn.after == "length":
            assert self.cache.get_seq_length() == self.ids.shape[1]
        elif turn.after == "repeat":
            for part in parts:
                part.batch_repeat_interleave(2)
            self._reorder(torch.arange(len(self.order)).repeat_interleave(2))
        elif turn.after == "select":
            picked = torch.arange(len(self.order) - 1, -1, -1)
            left = [self.order[row] for row in picked[:2].tolist()]
            spoken = all(any(turn.rows[row] for row in left) for turn in self.case.turns)
            fewer = len(picked) > 2 and spoken
            picked = picked[:2] if fewer else picked
            for part in parts:
                part.batch_select_indices(picked) if fewer else part.reorder_cache(picked)
            self._reorder(picked)

    def _reorder(self, rows: Tensor) -> None:
        self.ids, self.real, self.visual = self.ids[rows], self.real[rows], self.visual[rows]
        self.told = [list(self.told[row]) for row in rows.tolist()]
        self.order = [self.order[row] for row in rows.tolist()]

    def _mutter(self, cache: Any, length: int) -> None:
        """Says something that is forgotten again."""
        more = nn.functional.pad(self.real.long(), (0, length), value=1)
        self.model(
            input_ids=torch.full((len(self.order), length), 5),
            attention_mask=more,
            past_key_values=cache,
        )


@contextmanager
def _training(model: Any, how: str) -> Iterator[None]:
    if how == "no":
        yield
        return
    model.train()
    with warnings.catch_warnings():
        # Renamed in transformers 6; frozen parts of a reentrant checkpoint.
        warnings.filterwarnings("ignore", message="`gradient_checkpointing_.*able` is deprecated")
        warnings.filterwarnings("ignore", message="None of the inputs have requires_grad=True")
        if how != "plain":
            model.gradient_checkpointing_enable({"use_reentrant": how == "reentrant"})
        try:
            yield
        finally:
            model.gradient_checkpointing_disable()
            model.disable_input_require_grads()  # whose hooks stay otherwise
            model.zero_grad(set_to_none=True)
            model.eval()


def gradients(model: Any) -> dict[str, Tensor]:
    """Of the decoder's parameters and the head's, by name."""
    parts = {"decoder": model.get_decoder(), "head": model.lm_head}
    return {
        f"{part}.{name}": parameter.grad.clone()
        for part, module in parts.items()
        for name, parameter in module.named_parameters()
        if parameter.grad is not None
    }
