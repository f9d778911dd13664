"""One pass over the decoder's layers: what there is to prune, and what is known of it.

Shape suffixes: B batch rows, T positions of a call, V visual tokens, S cuts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache, cached_property
from typing import Any, cast

import torch
from torch import Tensor, nn

from tokenprune.engine import masks
from tokenprune.engine import record as records
from tokenprune.engine.levels import Level
from tokenprune.engine.trace import TracedStage
from tokenprune.families.anatomy import Anatomy, window
from tokenprune.families.inputs import facts, layers_that_add_features, mark_visual, shows_images
from tokenprune.families.places import places
from tokenprune.families.projection import scales_by_position
from tokenprune.schedule import Schedule
from tokenprune.strategy import AttentionRows, PruningStrategy

ATTENTIONS = ("eager", "sdpa", "flex_attention", "flash_attention_2", "flash_attention_3")


@dataclass(frozen=True, eq=False)
class Settings:
    """What `attach` was asked for.

    Attributes:
        anatomy: The model's parts.
        strategy: Says which tokens survive a cut.
        schedule: Says how many.
        positions: `"original"` or `"renumbered"`.
        logits: `"all"` or `"supervised"`.
        visual_mask: Bool (B, T), or None.
    """

    anatomy: Anatomy
    strategy: PruningStrategy
    schedule: Schedule
    positions: str
    logits: str
    visual_mask: Tensor | None

    @property
    def renumbers(self) -> bool:
        return self.positions == "renumbered"

    @property
    def supervised(self) -> bool:
        return self.logits == "supervised"

    @cached_property
    def cuts(self) -> tuple[int, ...]:
        """Layers of the cuts."""
        return tuple(stage.layer for stage in self.schedule.stages)

    @cached_property
    def level_of(self) -> list[int]:
        """Level that each layer runs on."""
        return [sum(cut <= i for cut in self.cuts) for i in range(len(self.anatomy.layers))]

    @cached_property
    def policy(self) -> records.Policy:
        """What a cache must be continued with."""
        return records.Policy(self.cuts, self.positions)

    def asks_router(self, inputs: Mapping[str, Any]) -> bool:
        """Whether a call's loss has terms of a mixture's router."""
        asked = inputs.get("output_router_logits")
        if asked is None:
            asked = getattr(self.anatomy.text_config, "output_router_logits", False)
        return bool(asked)

    @cached_property
    def window(self) -> int | None:
        """Tokens up to which every layer attends to all."""
        return window(self.anatomy)

    @cached_property
    def requests(self) -> tuple[AttentionRows, ...]:
        """Attention that the strategy will ask for."""
        return tuple(self.strategy.attention_rows())

    @cached_property
    def asks_last(self) -> bool:
        """Whether the last prompt token's attention chooses."""
        return any(request.queries == "last" for request in self.requests)


@dataclass(eq=False)
class Call:
    """What the modules above the decoder were called with.

    Attributes:
        inputs: Arguments by name.
        open: Modules entered and not yet left.
        cache: The cache, while the modules are shown an unpruned view of it.
        record: What it holds.
        late_labels: Label tensors handed to the model's loss, to be filled when the survivors are
            known, and whether they are shifted ones.
    """

    inputs: dict[str, Any] = field(default_factory=dict)
    open: list[nn.Module] = field(default_factory=list)
    cache: Any = None
    record: records.Record | None = None
    late_labels: list[tuple[Tensor, bool]] = field(default_factory=list)


@dataclass(eq=False)
class Pass:
    """One run of the decoder's layers over new tokens.

    Attributes:
        settings: What `attach` was asked for.
        call: The call that it belongs to.
        ids: Token ids of the call, if it has any.
        record: What the cache holds from before, or None.
        cache: The cache, once a layer has shown it.
        levels: Level 0, and one more per cut done.
        prunes: Whether there are visual tokens and cuts.
        max_queries: Largest number of `"last"` query rows in a batch row.
        ends_visual: Whether each row ends in a visual token, 0 or 1.
        budgets: Per cut, tokens that each row may keep.
        budgets_SB: The same, int64 (S, B), on the device.
        places: Finds the places of the visual tokens.
        rows: Attention computed for a cut, by the cut's layer and request.
        rotations: What the rotary modules gave, and how to get it for other positions.
        stages: The trace of the cuts done.
        copies: Levels on other devices than where they were made, for models spread over several.
    """

    settings: Settings
    call: Call
    ids: Tensor | None
    record: records.Record | None
    cache: Any
    levels: list[Level]
    prunes: bool
    max_queries: int
    ends_visual: list[int]
    budgets: list[list[int]]
    budgets_SB: Tensor | None
    places: Callable[[], list[Tensor]]
    rows: dict[tuple[int, AttentionRows], Tensor] = field(default_factory=dict)
    rotations: list[tuple[Any, Callable[[Tensor, Tensor], Any]]] = field(default_factory=list)
    stages: list[TracedStage] = field(default_factory=list)
    copies: dict[tuple[int, torch.device], Level] = field(default_factory=dict)

    @property
    def offset(self) -> int:
        """Columns of the conversation before this pass."""
        return 0 if self.record is None else self.record.num_columns

    @property
    def is_fixed(self) -> bool:
        """Whether the cache has a fixed size, and shows entries that are not filled yet."""
        return bool(getattr(self.cache, "is_compileable", False))

    def held(self, level: int) -> tuple[int, Tensor | None]:
        """Keys that a layer of a level holds from before: how many, and which are real."""
        if self.record is None:
            return 0, None
        return self.record.length(level), self.record.real(level)

    def at(self, level: int, device: torch.device) -> Level:
        """A level, with its tensors on the device of the layer that runs."""
        made = self.levels[level]
        if made.columns.device == device:
            return made
        if (level, device) not in self.copies:
            self.copies[level, device] = made.on(device)
        return self.copies[level, device]


def merge(
    inputs: dict[str, Any], named: Mapping[str, Any], promised: list[tuple[Tensor, bool]]
) -> None:
    """Adds a module's arguments to those of the modules around it.

    An inner module's win, because a wrapper may change them on the way. But labels are known from
    outside only, and an attention mask says where pads are only in its 2-D form.
    """
    for key, value in named.items():
        keeps = key in ("labels", "shift_labels", "visual_mask") or (
            key == "attention_mask" and not (isinstance(value, Tensor) and value.dim() == 2)
        )
        ours = any(value is tensor for tensor, _ in promised)
        if value is not None and not ours and not (keeps and key in inputs):
            inputs[key] = value


def read_record(settings: Settings, past: Any, tokens: Tensor, mask: Any) -> records.Record | None:
    """What a cache holds, as far as this engine filled it; `tokens` are those of the call."""
    padding = masks.padding(mask, past, known=records.has_record(past))
    num_layers = len(settings.anatomy.layers)
    return records.read(past, settings.policy, num_layers, tokens.shape[0], padding)


def plan(settings: Settings, call: Call, inputs: dict[str, Any], tokens: Tensor) -> Pass:
    """A pass over new tokens: which are visual, which ask, how many of each row may stay.

    Args:
        settings: What `attach` was asked for.
        call: The call that it belongs to.
        inputs: Arguments of the decoder and of the modules above it.
        tokens: Ids (B, T) or embeddings (B, T, D).

    Raises:
        ValueError: If the call cannot be honoured.
    """
    num_rows, length = tokens.shape[:2]
    device = tokens.device
    past = inputs.get("past_key_values")
    past = call.cache if records.is_unpruned(past) else past
    padding = masks.padding(inputs.get("attention_mask"), past, records.has_record(past))
    record = call.record
    if record is None:
        record = read_record(settings, past, tokens, inputs.get("attention_mask"))
    offset = 0 if record is None else record.num_columns
    visual = _find_visual(settings, inputs, num_rows, length, offset)
    real = None
    if padding is not None and padding.shape[1] < offset + length:
        raise ValueError(
            f"prune: expected an attention_mask of {offset + length} columns, all of the "
            f"conversation, got {padding.shape[1]}. Lengthen it turn by turn."
        )
    if padding is not None:
        real = padding[:, offset : offset + length].to(device=device, dtype=torch.bool)
    if visual is not None:
        visual = visual.to(device) if real is None else visual.to(device) & real
    blank = torch.zeros(num_rows, length, dtype=torch.bool, device=device)
    labels = _labels(inputs, device)
    # Assisted decoding hands over a cache and asks for logits from the prompt's last token on.
    to_keep = inputs.get("logits_to_keep")
    guesses = to_keep - 1 if past is not None and isinstance(to_keep, int) and to_keep > 1 else 0
    asks = blank if visual is None else _asking(blank, real, labels, guesses)
    # A decoding step has nothing to ask the device.
    per_row = [[0, length, 0, 0, 1, 0, 0]] * num_rows
    if visual is not None or real is not None:
        ones = torch.ones_like(blank)
        known = ones if real is None else real
        per_row = torch.stack(  # the only synchronisation of a prefill
            [
                (blank if visual is None else visual).sum(1),
                known.sum(1),
                asks.sum(1),
                (blank if visual is None else _turns_back(inputs, known)).sum(1),
                known[:, -1].long(),
                (blank if visual is None else visual)[:, 0].long(),
                (blank if visual is None else visual)[:, -1].long(),
            ],
            1,
        ).tolist()
    num_visual, num_real, num_asking, turns_back, ends_real, starts_visual, ends_visual = map(
        list, zip(*per_row, strict=True)
    )
    prunes = any(num_visual) and bool(settings.cuts)
    _check_window(settings, record, prunes, offset + length)
    if record is not None and any(map(min, zip(record.ends_visual, starts_visual, strict=True))):
        raise ValueError(
            "prune: expected an image in one call, got one whose tokens go on in the next: its "
            "budget and its question are known to neither. Leave prefill_chunk_size out, or "
            "divide the prompt between images and text."
        )
    if prunes:
        padded = any(n < length for n in num_real)
        _check_inputs(settings, inputs, any(turns_back), padded, offset)
    budgets = [
        [
            count if labels is not None and not asking else settings.schedule.count(stage, count)
            for count, asking in zip(num_visual, num_asking, strict=True)
        ]
        for stage in range(len(settings.cuts) if prunes else 0)
    ]
    counts_SB = torch.tensor([num_visual, *budgets], device=device) if prunes else None
    visual = blank if visual is None else visual
    coordinate = visual.cumsum(1) - 1 if prunes else blank
    if prunes and record is not None:
        coordinate = coordinate + torch.tensor(record.num_visual, device=device)[:, None]
    level = Level(
        index=None,
        columns=(torch.arange(length, device=device) + offset).expand(num_rows, -1),
        real=None if all(n == length for n in num_real) else real,
        num_real=num_real,
        visual=visual,
        num_visual=num_visual,
        alive=blank if counts_SB is None else counts_SB[0],
        coordinate=coordinate,
        queries=asks / asks.sum(1, keepdim=True).clamp_min(1) if prunes else blank,
        # Generation reads the last column: pad on the left unless the batch is on the right.
        pads_left=all(ends_real),
    )
    return Pass(
        settings=settings,
        call=call,
        ids=inputs.get("input_ids"),
        record=record,
        cache=past,
        levels=[level],
        prunes=prunes,
        max_queries=max(num_asking),
        ends_visual=ends_visual,
        budgets=budgets,
        budgets_SB=None if counts_SB is None else counts_SB[1:],
        places=cache(_place_finder(settings, inputs, visual, num_visual)),
    )


def _check_window(
    settings: Settings, record: records.Record | None, prunes: bool, length: int
) -> None:
    """Refuses conversations of pruned tokens that are longer than a layer's window."""
    pruned = record is not None and any(map(record.differs, range(len(settings.cuts) + 1)))
    if settings.window is not None and (prunes or pruned) and length > settings.window:
        raise ValueError(
            f"prune: expected at most {settings.window} tokens, up to which every layer of "
            f"{type(settings.anatomy.config).__name__} attends to all of them alike, got "
            f"{length}. Shorten the prompt or the answer."
        )


def _find_visual(
    settings: Settings, inputs: Mapping[str, Any], num_rows: int, length: int, offset: int
) -> Tensor | None:
    """Which of the call's tokens are visual, bool (B, T); None if there can be none."""
    mask = inputs.get("visual_mask", settings.visual_mask)
    if mask is not None:
        if mask.dim() != 2 or mask.dtype != torch.bool or num_rows % mask.shape[0]:
            raise ValueError(
                f"prune: expected visual_mask of dtype bool and shape ({num_rows}, T), got "
                f"{mask.dtype} and {tuple(mask.shape)}. Mark the visual columns with True."
            )
        part = mask[:, offset : offset + length]
        if part.shape[1] == 0:
            return None
        part = nn.functional.pad(part, (0, length - part.shape[1]))
        return part.repeat_interleave(num_rows // mask.shape[0], 0)
    # A generated id is text, whatever its number: later calls show images only with pixels.
    if offset > 0 and not shows_images(inputs):
        return None
    if not settings.anatomy.visual_ids:
        raise ValueError(
            "prune: expected visual_mask, bool (B, T), or placeholder ids of visual tokens in "
            f"the config, got neither for {type(settings.anatomy.config).__name__}. Pass the mask "
            "to prune or to the call."
        )
    ids = inputs.get("input_ids")
    if ids is None:
        raise ValueError(
            "prune: expected input_ids or visual_mask, got inputs_embeds alone. Pass "
            "visual_mask, bool (B, T), to say which columns are visual."
        )
    return mark_visual(settings.anatomy.visual_ids, ids)


def _labels(inputs: Mapping[str, Any], device: torch.device) -> Tensor | None:
    labels, shifted = inputs.get("labels"), inputs.get("shift_labels")
    if shifted is not None:  # then these are what the loss reads
        labels = nn.functional.pad(shifted, (1, 0), value=-100)[:, :-1]
    return None if labels is None else cast(Tensor, labels.to(device))


def _asking(blank: Tensor, real: Tensor | None, labels: Tensor | None, guesses: int) -> Tensor:
    """The `"last"` query rows, bool (B, T).

    Assisted decoding puts guesses after the prompt, and asks for logits from its last token on.
    """
    known = torch.ones_like(blank) if real is None else real
    if labels is None:
        order = torch.arange(1, blank.shape[1] + 1, device=blank.device)
        last = (known * order).argmax(1, keepdim=True)
        return order - 1 == (last - guesses).clamp_min(0)
    labelled = labels != -100
    return ~labelled & nn.functional.pad(labelled, (0, 1))[:, 1:] & known


def _check_inputs(
    settings: Settings, inputs: Mapping[str, Any], turns_back: bool, padded: bool, offset: int
) -> None:
    """Refuses what cannot be honoured in a pass that prunes."""
    if settings.anatomy.attention not in ATTENTIONS:
        raise unsupported_attention(settings.anatomy)
    if isinstance(inputs.get("logits_to_keep"), Tensor):
        raise ValueError(
            "prune: expected an integer logits_to_keep, got a tensor. "
            "Its indices would point into the unpruned sequence."
        )
    if settings.asks_router(inputs) and padded and inputs.get("labels") is not None:
        raise ValueError(
            "prune: expected a batch without padding for a loss with router terms, got a "
            "padded one. Use batches of one, or output_router_logits=False."
        )
    if settings.anatomy.attention.startswith("flash") and scales_by_position(
        settings.anatomy.layers[0].self_attn
    ):
        raise ValueError(
            "prune: expected sdpa or eager attention for a model that scales queries by position, "
            f"got {settings.anatomy.attention}, which takes the gaps between survivors for packed "
            'sequences. Use attn_implementation="sdpa".'
        )
    first = layers_that_add_features(inputs)
    if getattr(inputs.get("past_key_values"), "is_compileable", False) and offset > 0:
        raise ValueError(
            "prune: expected a cache that grows, for images of a later turn, got "
            f"{type(inputs['past_key_values']).__name__}. Leave cache_implementation out."
        )
    if settings.cuts[0] < first:
        raise ValueError(
            f"prune: expected cuts at layer {first} or later, because the model adds visual "
            f"features before that, got {list(settings.cuts)}. Move the first cut."
        )
    position_ids = inputs.get("position_ids")
    if settings.renumbers and position_ids is not None and position_ids.dim() > 2:
        raise ValueError(
            'prune: expected one-dimensional positions with positions="renumbered", got '
            f'{position_ids.shape[0]}-dimensional ones. Use positions="original".'
        )
    if turns_back:
        raise ValueError(
            "prune: expected position_ids that rise along each row, got a row that starts "
            "anew: several sequences packed into one. Pass them as rows of a batch."
        )


def _place_finder(
    settings: Settings, inputs: Mapping[str, Any], visual: Tensor, num_visual: list[int]
) -> Callable[[], list[Tensor]]:
    # A trace must keep neither pixels nor the model alive.
    small, layout, config = facts(inputs), settings.anatomy.adapter.layout, settings.anatomy.config
    return lambda: places(layout, config, small, visual, num_visual)


def unsupported_attention(anatomy: Anatomy) -> ValueError:
    """The error for an attention implementation that the engine cannot make masks for."""
    return ValueError(
        f"prune: expected attn_implementation to be one of {list(ATTENTIONS)}, got "
        f"{anatomy.attention!r}. Load the model with another one."
    )


def _turns_back(inputs: Mapping[str, Any], real: Tensor) -> Tensor:
    """Where given positions do not rise from one real token to the next: bool (B, T - 1)."""
    given = inputs.get("position_ids")
    if given is None or given.dim() > 2:
        return real.new_zeros(real.shape[0], 1)
    back = given[:, 1:] <= given[:, :-1]
    return cast(Tensor, back & real[:, 1:] & real[:, :-1])
