"""What `attach` was asked for, checked against the model and looked up once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor

from tokenprune.engine.record import Policy
from tokenprune.families.anatomy import Anatomy, final_norm, window
from tokenprune.families.positions import why_fixed
from tokenprune.schedule import Schedule
from tokenprune.strategy import (
    BESIDE,
    LOGITS,
    POSITIONS,
    BeforeProjector,
    Change,
    DecoderKeys,
    DecoderRows,
    Entered,
    Need,
    Normed,
    PerStage,
    Projected,
    PruningStrategy,
    Question,
    RandomNumbers,
    Text,
    Videos,
    VisionNeed,
    VisionRows,
    Words,
    vision_needs,
)

ATTENTIONS = ("eager", "sdpa", "flex_attention", "flash_attention_2", "flash_attention_3")


@dataclass(frozen=True, eq=False)
class Settings:
    """What `attach` was asked for.

    Attributes:
        anatomy: The model's parts.
        strategy: Says which tokens survive a cut.
        schedule: Says how many.
        positions: `"original"` or `"renumbered"`.
        logits: `"all"`, `"supervised"` or `"full"`.
        visual_mask: Bool (B, T), or None.
    """

    anatomy: Anatomy
    strategy: PruningStrategy
    schedule: Schedule
    positions: str
    logits: str
    visual_mask: Tensor | None

    @cached_property
    def renumbers(self) -> bool:
        return self.positions == "renumbered"

    @cached_property
    def supervised(self) -> bool:
        return self.logits == "supervised"

    @cached_property
    def full(self) -> bool:
        return self.logits == "full"

    @cached_property
    def cuts(self) -> tuple[int, ...]:
        """Layers of the cuts."""
        return tuple(stage.layer for stage in self.schedule.stages)

    @cached_property
    def level_of(self) -> list[int]:
        """Level that each layer runs on."""
        return [sum(cut <= i for cut in self.cuts) for i in range(len(self.anatomy.layers))]

    @cached_property
    def policy(self) -> Policy:
        """What a cache must be continued with."""
        return Policy(self.cuts, self.positions)

    @cached_property
    def window(self) -> int | None:
        """Tokens up to which every layer attends to all."""
        return window(self.anatomy)

    @cached_property
    def strategies(self) -> tuple[PruningStrategy, ...]:
        """The strategy of each cut."""
        return tuple(self.strategy.at(cut) for cut in range(len(self.cuts)))

    @cached_property
    def declared(self) -> tuple[tuple[Need, ...], ...]:
        """What the strategy of each cut says that it needs."""
        return tuple(strategy.needs() for strategy in self.strategies)

    @cached_property
    def requests(self) -> tuple[tuple[DecoderRows | DecoderKeys | Change, ...], ...]:
        """What the strategy of each cut asks of a layer: attention, keys, what enters it."""
        kinds = (DecoderRows, DecoderKeys, Change)
        return tuple(
            tuple(dict.fromkeys(need for need in needs if isinstance(need, kinds)))
            for needs in self.declared
        )

    @cached_property
    def needs(self) -> frozenset[Need]:
        """What the strategies of all cuts ask for."""
        return frozenset(need for needs in self.declared for need in needs)

    @cached_property
    def reads_embeddings(self) -> bool:
        """Whether a strategy asks for what enters the decoder."""
        return bool(self.needs & {Projected(), Entered(), Text()})

    @cached_property
    def reads_text(self) -> bool:
        """Whether a strategy asks for the prompt's text, or what it attends to."""
        return any(
            isinstance(need, (Text, Question, DecoderKeys, Normed, Words))
            or (isinstance(need, DecoderRows) and need.queries == "text")
            for need in self.needs
        )

    @cached_property
    def vision_needs(self) -> frozenset[VisionNeed]:
        """What the strategies of all cuts ask of the vision tower."""
        return frozenset(need for strategy in self.strategies for need in vision_needs(strategy))

    @cached_property
    def draws(self) -> bool:
        """Whether a strategy asks for numbers by chance."""
        return any(isinstance(need, RandomNumbers) for need in self.needs)

    @cached_property
    def reads_prompt(self) -> bool:
        """Whether a choice depends on which tokens of a call are the prompt's."""
        kinds = (DecoderRows, RandomNumbers)
        return self.reads_text or any(isinstance(need, kinds) for need in self.needs)

    @cached_property
    def reads_labels(self) -> bool:
        """Whether a choice depends on labels, which say what of a row is the prompt."""
        rows = [need for need in self.needs if isinstance(need, DecoderRows)]
        return self.reads_text or any(need.queries == "last" for need in rows)

    def asks_router(self, inputs: Mapping[str, Any]) -> bool:
        """Whether a call's loss has terms of a mixture's router."""
        asked = inputs.get("output_router_logits")
        if asked is None:
            asked = getattr(self.anatomy.text_config, "output_router_logits", False)
        return bool(asked)

    def check(self, name: str) -> None:
        """Refuses what this model cannot give; `name` is its class.

        Raises:
            ValueError: If an option, the schedule or the strategy cannot be honoured.
        """
        for option, value, choices in (
            ("positions", self.positions, POSITIONS),
            ("logits", self.logits, LOGITS),
        ):
            if value not in choices:
                raise ValueError(
                    f"prune: expected {option} to be one of {list(choices)}, got {value!r}. "
                    "See the docstring of tokenprune.attach."
                )
        self.schedule.check_depth(len(self.anatomy.layers))
        if self.anatomy.attention not in ATTENTIONS:
            raise unsupported_attention(self.anatomy)
        if self.renumbers and (reason := why_fixed(self.anatomy.decoder)) is not None:
            raise ValueError(
                'prune: expected one-dimensional rotary embeddings with positions="renumbered", '
                f'got {reason}. Use positions="original".'
            )
        if isinstance(self.strategy, PerStage):
            self.strategy.check(self.cuts)
        for cut, strategy, requests in zip(self.cuts, self.strategies, self.requests, strict=True):
            reads_previous = any(request.source == "previous" for request in requests)
            first = max(self.anatomy.adapter.first_layer, int(reads_previous))
            if cut < first:
                raise ValueError(
                    f"prune: expected cuts at layer {first} or later for "
                    f"{type(strategy).__name__} on {name}, got {list(self.cuts)}. "
                    "Move the first cut."
                )
        if Normed() in self.needs and final_norm(self.anatomy.decoder) is None:
            raise ValueError(
                f"prune: expected a decoder whose last norm is known, for hidden states after it, "
                f"got {type(self.anatomy.decoder).__name__} in {name}. Choose another strategy."
            )
        known = (
            *(Change, DecoderRows, DecoderKeys, Entered, Normed, Projected, Question, Text),
            *(RandomNumbers, Videos, VisionNeed, BeforeProjector, Words),
        )
        for need in self.needs:
            if not isinstance(need, known):
                raise ValueError(
                    f"prune: expected needs that the engine knows, got {need!r}. "
                    "See tokenprune.strategy."
                )
        beside = {BeforeProjector(), *BESIDE}
        for strategy in self.strategies:
            seeing = [need for need in strategy.needs() if not isinstance(need, RandomNumbers)]
            if strategy.blind and seeing:
                raise ValueError(
                    f"{type(strategy).__name__}: expected needs of random numbers alone where "
                    f"blind is True, got {seeing}. Set blind to False."
                )
            if beside & set(strategy.needs()) and not vision_needs(strategy):
                raise ValueError(
                    f"{type(strategy).__name__}.needs: expected VisionRows or VisionStates beside "
                    f"what goes with them, got {list(strategy.needs())}. Declare one of them."
                )
        for vision_need in sorted(self.vision_needs, key=repr):
            self._check_vision(vision_need, name)
        self._check_projector(name)

    def _check_projector(self, name: str) -> None:
        """Refuses mixtures before the projector where they cannot be."""
        parts = self.anatomy.vision
        for cut, strategy in zip(self.cuts, self.strategies, strict=True):
            if BeforeProjector() not in strategy.needs():
                continue
            if cut > 0 or parts is None or parts.projector is None:
                got = f"layer {cut}" if cut > 0 else f"{name}, whose projector is not known"
                raise ValueError(
                    "prune: expected a cut at layer 0 of a model that projects each patch, for "
                    f"{type(strategy).__name__}, which mixes what the projector is given, got "
                    f'{got}. Use space="decoder".'
                )

    def _check_vision(self, need: VisionNeed, name: str) -> None:
        """Refuses what this model's vision tower cannot give."""
        parts = self.anatomy.vision
        if parts is None:
            reason = self.anatomy.adapter.unread
            way_out = "Choose a strategy that does not read the tower"
            raise ValueError(
                f"prune: expected a model whose vision tower is known, for {need}, got {name} "
                f"({self.anatomy.config.model_type}): {reason}. {way_out}."
                if reason
                else f"prune: expected a model whose vision tower is known, for {need}, got {name} "
                f"({self.anatomy.config.model_type}). {way_out}, or describe the tower with "
                "register_adapter."
            )
        if not -len(parts.layers) <= need.layer < len(parts.layers):
            last = len(parts.layers) - 1
            raise ValueError(
                f"prune: expected a layer from {-last - 1} to {last} of {name}'s vision tower, got "
                f"{need.layer} ({need}). Give another to the strategy's field that names it."
            )
        if isinstance(need, VisionRows) and need.queries == "class" and not parts.num_class:
            raise ValueError(
                f"prune: expected a vision tower with a class token, for {need}, got {name}, whose "
                'tower has none. Use queries="all", or another strategy.'
            )


def unsupported_attention(anatomy: Anatomy) -> ValueError:
    """The error for an attention implementation that the engine cannot make masks for."""
    return ValueError(
        f"prune: expected attn_implementation to be one of {list(ATTENTIONS)}, got "
        f"{anatomy.attention!r}. Load the model with another one."
    )
