"""What each row must give, by the unmodified model.

The reference knows no batch, no pads and no cache: it is the unmodified model run over one row's
tokens, each layer with a mask over what the trace says was dropped and with its own positions,
survivors mixed by hand. Attention is that of its eager layers.

A view is the conversation as a cut saw it in some turn: of that turn's tokens are left those that
the cut chose from. View 0 is the conversation as it went.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from models import NUM_LAYERS
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from hunt.cases import Case
from hunt.pictures import model_of, picture, signals
from hunt.talk import Told
from hunt.witness import Witness
from tokenprune.strategy import decoder_rows


@dataclass
class Mixture:
    """Survivors of a cut and a turn, mixed from what was alive.

    Attributes:
        stage: Number of the cut.
        turn: Of the conversation.
        before: Columns of what was alive.
        kept: Columns of the survivors.
        weights: (K, V).
        given: (V, C), what the projector is given, to mix that instead; or None.
        project: The projector.
    """

    stage: int
    turn: int
    before: Tensor
    kept: Tensor
    weights: Tensor
    given: Tensor | None
    project: Callable[[Tensor], Tensor] | None

    def apply(self, values: Tensor) -> Tensor:
        """Values (V, ...) of what was alive, as they are of the survivors (K, ...)."""
        if self.given is None:
            return (self.weights @ values.float()).to(values.dtype)
        assert self.project is not None
        chosen = (self.before == self.kept[:, None]).long().argmax(1)
        own = self.weights.gather(1, chosen[:, None])[:, 0]
        alone = (own == 1) & ((self.weights != 0).sum(1) == 1)
        alone = alone | self.given[chosen].isnan().any(1)
        mixed = self.project(self.weights @ self.given.nan_to_num())
        return torch.where(alone[:, None], values[chosen], mixed.to(values.dtype))


class Row:
    """One row's conversation, and what the unmodified model makes of it.

    Attributes:
        tokens: All of them.
        turns: int64 (T,), the call that brought each.
        visual: Bool (T,).
        alive: Per level, bool (T,).
        shown: Calls in which the row has visual tokens.
        views: Pairs of cut and call, those from 1 on.
        logits: (T, C).
        entered: Per layer, what enters it, (views, T, D).
        positions: Per layer, int64 (views or 1, T).
        attentions: Per layer (views, H, T, T), if anything is asked of the decoder.
    """

    def __init__(self, case: Case, told: Sequence[Told]) -> None:
        self.case, self.told = case, told
        self.tokens = [token for call in told for token in call.tokens]
        self.turns = torch.tensor([number for number, call in enumerate(told) for _ in call.tokens])
        self.visual = torch.tensor([token.visual for token in self.tokens])
        self.given = torch.tensor([position for call in told for position in call.positions])
        self.alive = self._alive()
        self.shown = [
            number
            for number, call in enumerate(told)
            if call.stages and any(token.visual for token in call.tokens)
        ]
        witnessed = any(isinstance(own, Witness) for own in case.strategies)
        self.reads = witnessed or any(decoder_rows(own) for own in case.strategies)
        self.views = (
            [(s, t) for s in range(len(case.cuts)) for t in self.shown] if self.reads else []
        )
        self.levels = [sum(cut <= layer for cut in case.cuts) for layer in range(NUM_LAYERS)]
        self.mixtures = list(self._mixtures())
        self._run()

    def _alive(self) -> list[Tensor]:
        """Which tokens are left at each level, by the trace; and that their number is right."""
        case = self.case
        alive = [torch.ones_like(self.visual)]
        for stage in range(len(case.cuts)):
            now = alive[-1].clone()
            for number, call in enumerate(self.told):
                own = ((self.turns == number) & self.visual).nonzero()[:, 0]
                if not call.stages or not len(own):
                    continue
                kept = call.stages[stage].kept
                marked = torch.zeros(len(own), dtype=torch.bool)
                marked[kept] = True
                assert kept == sorted(set(kept)), "kept is not ascending"
                assert (marked <= alive[-1][own]).all(), "a dropped token came back"
                most = min(self._budget(stage, number, len(own)), int(alive[-1][own].sum()))
                exact = case.strategies[stage].keeps_exactly
                assert len(kept) == most if exact else len(kept) <= most, "budget"
                now[own] = marked
            alive.append(now)
        return alive

    def _budget(self, stage: int, number: int, count: int) -> int:
        labelled = self.case.turns[-1].labelled and number == len(self.told) - 1
        if labelled and not self.asking(number):
            return count
        return self.case.schedule.count(stage, count)

    def asking(self, number: int) -> list[int]:
        """Columns whose attention chooses in a call."""
        columns = (self.turns == number).nonzero()[:, 0].tolist()
        if not (self.case.turns[-1].labelled and number == len(self.told) - 1):
            return columns[-1:]
        labels = [self.tokens[column].label for column in columns]
        found, tells, pictured, before = [], False, False, -100
        for column, label, following in zip(columns, labels, labels[1:], strict=False):
            pictured |= bool(self.visual[column])
            before = before if self.visual[column] else label
            if label == -100 and following != -100:
                found.append(column)
                tells |= pictured and (before == -100 or not self.visual[column])
        return found if tells or not pictured else []

    def prompt(self, number: int) -> list[int]:
        """Columns of a call's text that is no answer."""
        columns = (self.turns == number).nonzero()[:, 0].tolist()
        return [c for c in columns if not self.visual[c] and self.tokens[c].label == -100]

    def pictures(self, number: int, values: Callable[..., Tensor]) -> Tensor:
        """Something of each visual token of a call, (V, ...), image after image."""
        return torch.cat([values(self.case.family, *own) for own in self.told[number].images])

    def before(self, stage: int, number: int) -> Tensor:
        """Columns of a call's visual tokens that a cut chooses from."""
        own = (self.turns == number) & self.visual & self.alive[stage]
        return own.nonzero()[:, 0]

    def _mixtures(self) -> Iterator[Mixture]:
        for stage, strategy in enumerate(self.case.strategies):
            for number in self.shown:
                weights = self.told[number].stages[stage].weights
                if weights is None:
                    continue
                given = project = None
                if getattr(strategy, "space", "decoder") == "vision":
                    given = self.pictures(number, lambda *image: picture(*image).given)
                    project = model_of(self.case.family, "eager").model.multi_modal_projector
                before = self.before(stage, number)
                kept = self.before(stage + 1, number)
                assert weights.shape == (len(kept), len(before)), "weights"
                yield Mixture(stage, number, before, kept, weights, given, project)

    @cached_property
    def embeds(self) -> Tensor:
        """What enters the decoder, (T, D)."""
        model = model_of(self.case.family, "eager")
        embeds = model.get_input_embeddings()(torch.tensor([token.id for token in self.tokens]))
        if any(call.images for call in self.told):
            features = [self.pictures(n, lambda *image: picture(*image).features)
                        for n in range(len(self.told)) if self.told[n].images]  # fmt: skip
            embeds = embeds.clone()
            embeds[self.visual] = torch.cat(features)
        return embeds

    def _run(self) -> None:
        model = model_of(self.case.family, "eager")
        decoder, length = model.get_decoder(), len(self.tokens)
        self.entered: dict[int, Tensor] = {}
        hidden, self.positions = self._hidden()
        num_views = len(hidden[0])
        allowed = torch.ones(length, length, dtype=torch.bool).tril()
        eye = torch.eye(length, dtype=torch.bool)

        def hook(layer: int) -> Any:
            def before(module: nn.Module, args: Any, kwargs: Any) -> Any:
                states = self.mixed(layer, args[0], self.views)
                self.entered[layer] = args[0].detach()
                low = torch.finfo(states.dtype).min
                seen = (allowed & ~hidden[layer][:, None]) | eye
                mask = torch.zeros(num_views, 1, length, length, dtype=states.dtype)
                kwargs["attention_mask"] = mask.masked_fill(~seen[:, None], low)
                kwargs["position_embeddings"] = decoder.rotary_emb(states, self.positions[layer])
                return (states, *args[1:]), kwargs

            return before

        hooks = [
            module.register_forward_pre_hook(hook(layer), with_kwargs=True)
            for layer, module in enumerate(decoder.layers)
        ]
        try:
            output = decoder(
                inputs_embeds=self.embeds.expand(num_views, -1, -1),
                use_cache=False,
                output_attentions=num_views > 1,
            )
            self.logits = model.lm_head(output.last_hidden_state[0])
            self.attentions = output.attentions
        finally:
            for handle in hooks:
                handle.remove()

    def _hidden(self) -> tuple[list[Tensor], list[Tensor]]:
        """Per layer which tokens each view hides, and the positions."""
        hidden, positions = [], []
        for layer in range(NUM_LAYERS):
            now = self.alive[self.levels[layer]]
            at = [now]
            for stage, turn in self.views:
                seen = self.alive[stage] if self.case.cuts[stage] == layer else now
                at.append(torch.where(self.turns == turn, seen, now))
            hidden.append(~torch.stack(at))
            counted = hidden[-1].logical_not().long().cumsum(1) - 1
            loses = hidden[-1].any(1, keepdim=True) & (self.case.policy == "renumbered")
            positions.append(torch.where(loses, counted.clamp_min(0), self.given))
        return hidden, positions

    def mixed(self, layer: int, states: Tensor, views: Sequence[tuple[int, int]] = ()) -> Tensor:
        """What enters a layer (N, T, D), with the survivors of a cut there mixed.

        Args:
            layer: Its number.
            states: What left the layer before.
            views: Of the last of N; each sees what its own cut mixes as it was before.
        """
        for mixture in self.mixtures:
            if self.case.cuts[mixture.stage] != layer:
                continue
            states = states.clone()
            seen = [None] * (len(states) - len(views)) + list(views)
            for number, view in enumerate(seen):
                if view != (mixture.stage, mixture.turn):
                    own = mixture.apply(states[number, mixture.before])
                    states[number, mixture.kept] = own
        return states

    def followed(self, values: Tensor, stage: int, number: int, ahead: bool = False) -> Tensor:
        """What is known of a call's visual tokens (V, ...), of those that a cut chooses from.

        Args:
            values: Of all of the call's.
            stage: The cut.
            number: The call.
            ahead: Whether they are hidden states, which may be mixed before the projector.
        """
        for earlier in range(stage):
            own = [m for m in self.mixtures if (m.stage, m.turn) == (earlier, number)]
            before, kept = self.before(earlier, number), self.before(earlier + 1, number)
            if own and (ahead or own[0].given is None):
                values = own[0].apply(values)
            elif own:
                values = own[0].weights @ values
            else:
                values = values[torch.isin(before, kept)]
        return values

    def view_at(self, stage: int, number: int, source: str) -> tuple[int, int]:
        """The layer that a cut asks, and the view that it has."""
        cut = self.case.cuts[stage]
        if source == "next":
            return cut, 1 + self.views.index((stage, number))
        return cut - 1, 0

    def comparable(self, number: int, source: str) -> bool:
        """Whether a layer can be asked that holds keys of both sides of a cut.

        Counted anew, held keys stand where the cut left them, and new ones as before it.
        """
        return not (self.case.policy == "renumbered" and number and source == "next")

    def into(self, layer: int, view: int) -> Tensor:
        """What runs through a layer, (1, T, D): after a cut there, for whoever looks past it."""
        states = self.entered[layer][view : view + 1]
        return self.mixed(layer, states) if layer in self.case.cuts and view == 0 else states

    def keys(self, layer: int, view: int) -> Tensor:
        """Rotated keys of a layer, (T, G, E)."""
        decoder = model_of(self.case.family, "eager").get_decoder()
        module = decoder.layers[layer]
        states = self.into(layer, view)
        keys = module.self_attn.k_proj(module.input_layernorm(states))
        keys = keys.unflatten(-1, (-1, module.self_attn.head_dim)).transpose(1, 2)
        positions = self.positions[layer].expand(self.entered[layer].shape[0], -1)[view][None]
        cos, sin = decoder.rotary_emb(states, positions)
        return apply_rotary_pos_emb(keys, keys, cos, sin)[1][0].transpose(0, 1)


def tower(family: str, need: Any) -> Callable[..., Tensor]:
    """Makes what the tower says of an image's tokens."""
    return lambda _, *image: signals(family, *image)[need]


@contextmanager
def as_cut(case: Case, row: Row) -> Iterator[None]:
    """The unmodified model, in a generation from one row alone: masks, mixtures and positions.

    For calls with a cache, whose rows, if there are several, are the row's.
    """
    model = model_of(case.family, "eager")
    decoder = model.get_decoder()

    def hook(layer: int) -> Any:
        dropped = ~row.alive[row.levels[layer]]

        def before(module: nn.Module, args: Any, kwargs: Any) -> Any:
            states = args[0]
            cache = kwargs["past_key_values"]
            offset = int(cache.get_seq_length(layer))
            if offset == 0:
                states = row.mixed(layer, states)
            total = offset + states.shape[1]
            own = nn.functional.pad(dropped, (0, total - len(dropped)))
            seen = torch.ones(total, total, dtype=torch.bool).tril() & ~own
            seen = (seen | torch.eye(total, dtype=torch.bool))[offset:]
            low = torch.finfo(torch.float32).min
            kwargs["attention_mask"] = torch.zeros(seen.shape).masked_fill(~seen, low)[None, None]
            if case.policy == "renumbered" and own.any():
                counted = ((~own).long().cumsum(0) - 1).clamp_min(0)[None, offset:]
                kwargs["position_embeddings"] = decoder.rotary_emb(states, counted)
            return (states, *args[1:]), kwargs

        return before

    hooks = [
        module.register_forward_pre_hook(hook(layer), with_kwargs=True)
        for layer, module in enumerate(decoder.layers)
    ]
    try:
        yield
    finally:
        for handle in hooks:
            handle.remove()
