"""One pass over the decoder's layers: what there is to prune, planned before the first of them.

Shape suffixes: B batch rows, T columns of the call, S cuts, M marked columns of all rows.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tokenprune.engine import caches, chance
from tokenprune.engine.levels import Level, Plan
from tokenprune.engine.packing import Layout, check_cache, packed, regroup
from tokenprune.engine.record import Record
from tokenprune.engine.rows import Ints, Rows, columns, counts, is_step, read_rows
from tokenprune.engine.sequences import not_apart
from tokenprune.engine.settings import ATTENTIONS, Settings, unsupported_attention
from tokenprune.engine.upload import HOST, bring
from tokenprune.engine.vision import Seen, Signals, Watch, match
from tokenprune.families.places import find_runs, places
from tokenprune.families.projection import scales_by_position
from tokenprune.strategy import Need, Words


@dataclass(eq=False)
class Call:
    """What the modules above the decoder were called with.

    Attributes:
        inputs: Arguments by name.
        open: Modules entered and not yet left.
        cache: The cache, if it came from outside.
        late_labels: Label tensors handed to the model's loss, to be filled when the survivors are
            known, and whether they are shifted ones.
        signals: What the vision tower was heard of, by kind of features, if a strategy asks.
    """

    inputs: dict[str, Any] = field(default_factory=dict)
    open: list[nn.Module] = field(default_factory=list)
    cache: Any = None
    late_labels: list[tuple[Tensor, bool]] = field(default_factory=list)
    signals: dict[str, Signals] = field(default_factory=dict)


@dataclass(eq=False)
class Asked:
    """A layer that is asked for attention or keys: the module, what enters it, its other arguments.

    Attributes:
        layer: Its number.
        module: The layer.
        hidden: (B, N, D), what enters it.
        named: Its other arguments, for these tokens.
        mask: The mask that it was given, for the whole conversation.
    """

    layer: int
    module: nn.Module
    hidden: Tensor
    named: dict[str, Any]
    mask: Any


@dataclass(frozen=True, eq=False)
class Rotation:
    """What a rotary module gave, and how to get it for other positions.

    Attributes:
        made: The first tensor that it gave; weakly where the pass may outlive its call.
        again: Of hidden states and positions, what it gives for these.
        by_longest: Whether it looks at the largest position to turn all of them.
    """

    made: Callable[[], Tensor | None]
    again: Callable[[Tensor, Tensor], Any]
    by_longest: bool


@dataclass(frozen=True, eq=False)
class Late:
    """Features that are added to what enters layers after the first cut.

    Attributes:
        marked: Bool, the columns that they are of, row after row: (B, T), or by sequence, (G, n).
        features: (M, D) of all of them, by the layer that they enter.
    """

    marked: Tensor
    features: Mapping[int, Tensor]


@dataclass(eq=False)
class Pass:
    """One run of the decoder's layers over new tokens.

    Attributes:
        settings: What `attach` was asked for.
        attention: The attention implementation that the layers are set to.
        call: The call that it belongs to.
        rows: What its rows hold.
        record: What the cache holds from before, or None.
        cache: The cache, once a layer has shown it.
        prunes: Whether there are visual tokens and cuts.
        idle: Whether layers that are given no mask need nothing done.
        budgets: Per cut, tokens that each row may keep.
        levels: Level 0, and one more per cut done.
        plan: What is known before the first layer; None in a pass that needs none of it.
        positions: int64 (B, T), the model's positions, once a layer has shown them.
        embeddings: (B, T, D), what entered layer 0, detached, if a strategy asks for it.
        seen: What the vision tower says of the visual tokens, if a strategy asks.
        late: Visual features that the model would add after the first cut, if any.
        places: Finds the places of the visual tokens.
        heard: What a layer was asked for, by the layer of the cut and need.
        rotations: What the rotary modules gave.
        made: What layers were handed, and what was made of it, by level; while they run.
        stages: Makes the trace of each cut done.
        open: Whether its layers run; if not, they are computed anew.
        copies: Levels and plans on other devices than where they were made, places, and what is
            known of packed rows.
    """

    settings: Settings
    attention: str
    call: Call
    rows: Rows
    record: Record | None
    cache: Any
    prunes: bool
    idle: bool
    budgets: list[list[int]]
    levels: list[Level]
    plan: Plan | None
    places: Callable[[], list[Tensor]]
    positions: Tensor | None = None
    embeddings: Tensor | None = None
    seen: Seen | None = None
    late: Late | None = None
    heard: dict[tuple[int, Need], Any] = field(default_factory=dict)
    rotations: list[Rotation] = field(default_factory=list)
    made: dict[Any, list[tuple[tuple[Any, ...], Any]]] = field(default_factory=dict)
    stages: list[Callable[[], Any]] = field(default_factory=list)
    open: bool = True
    copies: dict[tuple[Any, torch.device], Any] = field(default_factory=dict)

    @property
    def offset(self) -> int:
        """Columns of the conversation before this pass, but for a step of a fixed cache."""
        return 0 if self.record is None else self.record.num_columns

    def held(self, level: int) -> int:
        """Keys that a layer of a level holds from before."""
        return 0 if self.record is None else self.record.length(level)

    def at(self, level: int, device: torch.device) -> Level:
        """A level, with its tensors on the device of the layer that runs."""
        made = self.levels[level]
        if made.device in (None, device):
            return made
        if (level, device) not in self.copies:
            (self.copies[level, device],) = bring([made], device)
        return self.copies[level, device]  # type: ignore[no-any-return]

    def bring(self, first: int, device: torch.device) -> None:
        """Brings what the host has made, levels from `first` on, to the device of a layer.

        With the first level goes the plan. Copies stay on the host, for who chooses there.
        """
        if device == HOST:
            return
        made: list[Any] = [*self.levels[first:]]
        self.copies |= {(first + number, HOST): level for number, level in enumerate(made)}
        if first == 0 and self.plan is not None:
            self.copies[-1, HOST] = self.plan
            self.plan, *self.levels = bring([self.plan, *made], device)
        else:
            self.levels[first:] = bring(made, device)

    def layout(self, level: int, device: torch.device) -> Layout:
        """Where the tokens of packed rows stand at a level."""
        packing, made = self.rows.packing, self.levels[level]
        assert packing is not None
        if (("layout", level), device) not in self.copies:
            left = None if made.columns is None else made.num_real
            self.copies[("layout", level), device] = packing.layout(left, device)
        return self.copies[("layout", level), device]  # type: ignore[no-any-return]

    def apart(
        self, values: Tensor, level: int, *, batch: int = 0, dim: int = 1, pad: int | None = None
    ) -> Tensor:
        """Of tokens in the layers' rows, (B, N, ...), those of each sequence, (G, n, ...).

        Args:
            values: Rows along dimension `batch`, their tokens along `dim`.
            level: On which they stand.
            batch: Dimension of the rows.
            dim: Dimension of the tokens.
            pad: What pads hold; None for anything.
        """
        if self.rows.packing is None:
            return values
        seats = self.layout(level, values.device).seats
        found = regroup(values, seats, self.rows.shape[0], batch, dim)
        real = self.at(level, values.device).real
        return found if pad is None or real is None else found.masked_fill(~real, pad)

    def together(self, values: Tensor, level: int, *, pad: int | None = None) -> Tensor:
        """Of tokens of each sequence, (G, n, ...), the layers' rows, (B, N, ...)."""
        if self.rows.packing is None:
            return values
        layout = self.layout(level, values.device)
        found = regroup(values, layout.places, len(values))
        return found if pad is None or layout.real is None else found.masked_fill(~layout.real, pad)

    def laid(self, level: int, device: torch.device) -> Level:
        """A level as its layers run it: with the sequences of a row together."""
        made = self.at(level, device)
        if self.rows.packing is None:
            return made
        if (("laid", level), device) not in self.copies:
            layout = self.layout(level, device)
            columns, moved = made.columns, made.moved
            self.copies[("laid", level), device] = Level(
                length=layout.places.shape[1],
                num_real=layout.num_real,
                num_visual=[],
                columns=None
                if columns is None
                else self.together(columns + layout.first, level, pad=0),
                real=None if columns is None else layout.real,
                index=None,
                visual=None,
                counts=None,
                pads_left=False,
                moved=None if moved is None else self.together(moved, level),
            )
        return self.copies[("laid", level), device]  # type: ignore[no-any-return]

    def places_on(self, device: torch.device) -> Tensor:
        """Places of the call's visual tokens, int64 (B, V, 4), -1 for what does not exist."""
        if ("places", device) not in self.copies:  # the same at all cuts
            table = nn.utils.rnn.pad_sequence(self.places(), batch_first=True, padding_value=-1)
            self.copies["places", device] = table.to(device)
        return self.copies["places", device]  # type: ignore[no-any-return]

    def videos_on(self, device: torch.device) -> Tensor:
        """Which of the call's visual tokens are of videos, bool (B, V)."""
        if ("videos", device) not in self.copies:  # the same at all cuts
            table = nn.utils.rnn.pad_sequence(self.rows.of_videos(), batch_first=True)
            if table.any():
                table = table.to(device)
            else:  # none need not go up
                table = torch.zeros(table.shape, dtype=torch.bool, device=device)
            self.copies["videos", device] = table
        return self.copies["videos", device]  # type: ignore[no-any-return]

    def plan_on(self, device: torch.device) -> Plan:
        """The plan on the device of the layer that runs."""
        assert self.plan is not None
        if self.plan.order.device == device:
            return self.plan
        if (-1, device) not in self.copies:
            (self.copies[-1, device],) = bring([self.plan], device)
        return self.copies[-1, device]  # type: ignore[no-any-return]


def merge(
    inputs: dict[str, Any], named: Mapping[str, Any], promised: list[tuple[Tensor, bool]]
) -> None:
    """Adds a module's arguments to those of the modules around it.

    An inner module's win, because a wrapper may change them on the way. But labels are known from
    outside only, and an attention mask says where pads are only in its 2-D form.
    """
    for key, value in named.items():
        if value is None:
            continue
        keeps = key in ("labels", "shift_labels", "visual_mask") or (
            key == "attention_mask" and not (isinstance(value, Tensor) and value.dim() == 2)
        )
        ours = promised and any(value is tensor for tensor, _ in promised)
        if not ours and not (keeps and key in inputs):
            inputs[key] = value


def plan_pass(
    settings: Settings,
    call: Call,
    inputs: dict[str, Any],
    tokens: Tensor,
    generating: bool,
    watch: Watch | None = None,
) -> Pass:
    """A pass over new tokens: which are visual, which ask, how many of each row may stay.

    Args:
        settings: What `attach` was asked for.
        call: The call that it belongs to.
        inputs: Arguments of the decoder and of the modules above it.
        tokens: Ids (B, T) or embeddings (B, T, D).
        generating: Whether the call is one of a `generate`.
        watch: What hears the vision tower, if a strategy asks.

    Raises:
        ValueError: If the call cannot be honoured.
    """
    num_rows, length = tokens.shape[:2]
    past = inputs.get("past_key_values")
    record = caches.read(past, settings.policy, settings.level_of, num_rows)
    offset = 0
    fixed = record is not None and caches.is_fixed(past)
    if fixed and is_step(settings, inputs, length):
        offset = 1  # something: how much, the device knows, and nobody asks
    elif record is not None:
        if fixed:
            caches.settle(past, record)
        offset = record.num_columns
    # Assisted decoding hands over a cache and asks for logits from the prompt's last token on.
    to_keep = inputs.get("logits_to_keep")
    tries = generating and past is not None and isinstance(to_keep, int)
    rows = read_rows(
        settings, inputs, tokens, offset, max(0, int(to_keep or 0) - 1) if tries else 0
    )
    check_cache(rows.packing, past)
    sees = any(rows.num_visual)
    prunes = sees and bool(settings.cuts)
    _check_window(settings, record, prunes, offset + rows.real.shape[1])
    if sees and record is not None and (rows.visual[:, 0] & record.ends_visual).any():
        raise ValueError(
            "prune: expected an image in one call, got one whose tokens go on in the next: its "
            "budget and its question are known to neither. Leave prefill_chunk_size out, or "
            "divide the prompt between images and text."
        )
    budgets: list[list[int]] = []
    seen = plan = None
    attention = settings.anatomy.attention
    if prunes:
        _check_inputs(settings, attention, inputs, rows, offset)
        budgets = [_budget(settings, rows, cut) for cut in range(len(settings.cuts))]
        _check_words(settings, rows, budgets)
        if watch is not None:
            seen = match(watch, settings.anatomy, inputs, call.signals, rows)
    if prunes or rows.padded or rows.targets is not None:
        plan = _plan(settings, rows, budgets, seen)
    differs = record is not None and record.cut
    shifts = differs and settings.renumbers
    hides = record is not None and (length > 1 or record.ragged or fixed)
    return Pass(
        settings=settings,
        attention=attention,
        call=call,
        rows=rows,
        record=record,
        cache=past,
        prunes=prunes,
        idle=not (prunes or shifts or (differs and hides)),
        budgets=budgets,
        levels=_levels(rows, plan, record, 0 if prunes else len(settings.cuts)),
        plan=plan,
        seen=seen,
        places=_place_finder(settings, rows),
    )


def _budget(settings: Settings, rows: Rows, cut: int) -> list[int]:
    """Tokens that each row may keep at a cut."""
    return [
        count if rows.labelled and not asking else settings.schedule.count(cut, count)
        for count, asking in zip(rows.num_visual, rows.num_asking, strict=True)
    ]


def _levels(rows: Rows, plan: Plan | None, record: Record | None, num_cuts: int) -> list[Level]:
    """The first level, and those of cuts that remove nothing: where none does, all are known.

    Those whose layers hold the same share one.
    """
    levels: list[Level] = []
    for number in range(num_cuts + 1):
        if levels and (record is None or record.held[number] is record.held[number - 1]):
            levels.append(levels[-1])
            continue
        level = Level(
            length=rows.real.shape[1],
            num_real=rows.num_real,
            num_visual=rows.num_visual,
            columns=None,
            real=torch.from_numpy(rows.real) if rows.padded else None,
            index=None,
            visual=None if plan is None else plan.visual,
            counts=None if plan is None else plan.counts[0][:, None],
            # Generation reads the last column: pad on the left unless the batch is on the right.
            pads_left=rows.ends_real,
        )
        levels.append(level)
    return levels


#: Parts of a plan that not every pass has.
_OPTIONAL = ("prompt", "num_prompt", "num_follow", "targets", "learned", "seen", "tiles")


def _plan(settings: Settings, rows: Rows, budgets: list[list[int]], seen: Seen | None) -> Plan:
    """What is known of a pass, on the host."""
    length = rows.real.shape[1]
    pad = -1 if rows.ends_real else length
    num_text = list(map(operator.sub, rows.num_real, rows.num_visual))
    tables: dict[str, Ints] = {
        "order": np.arange(length),
        "text": columns(rows.real & ~rows.visual, num_text, pad),
        "visual": columns(rows.visual, rows.num_visual, 0),
        "counts": np.array([rows.num_visual, *budgets], dtype=np.int64),
        "asking": columns(rows.asking, rows.num_asking, 0),
        "num_asking": np.array(rows.num_asking, dtype=np.int64)[:, None],
    }
    if rows.prompt is not None:
        tables["prompt"] = columns(rows.prompt, rows.num_prompt, 0)
        if not any(rows.num_prompt):  # an entry that does not exist spares all others the case
            tables["prompt"] = np.zeros((len(rows.prompt), 1), dtype=np.int64)
        tables["num_prompt"] = np.array(rows.num_prompt, dtype=np.int64)[:, None]
        tables["num_follow"] = np.array(rows.num_follow, dtype=np.int64)[:, None]
    if rows.targets is not None:
        tables["targets"] = columns(rows.targets, counts(rows.targets), -1)
        tables["learned"] = np.flatnonzero(tables["targets"] >= 0)
        tables["targets"] = tables["targets"].clip(0)
    if seen is not None:
        tables["seen"], tables["tiles"] = seen.index, seen.tiles
    drawn = chance.foreseen(settings, rows, budgets) if settings.draws else {}
    made: dict[str, Any] = {name: torch.from_numpy(table) for name, table in tables.items()}
    random = {key: torch.from_numpy(numbers) for key, numbers in drawn.items()}
    absent: dict[str, Any] = dict.fromkeys(_OPTIONAL)
    return Plan(pad=pad, random=random, **absent | made)


def _check_window(settings: Settings, record: Record | None, prunes: bool, length: int) -> None:
    """Refuses conversations of pruned tokens that are longer than a layer's window."""
    if settings.window is None or length <= settings.window:
        return
    if prunes or (record is not None and record.cut):
        raise ValueError(
            f"prune: expected at most {settings.window} tokens, up to which every layer of "
            f"{type(settings.anatomy.config).__name__} attends to all of them alike, got "
            f"{length}. Shorten the prompt or the answer."
        )


def _check_inputs(
    settings: Settings, attention: str, inputs: Mapping[str, Any], rows: Rows, offset: int
) -> None:
    """Refuses what cannot be honoured in a pass that prunes."""
    if attention not in ATTENTIONS:
        raise unsupported_attention(settings.anatomy)
    if isinstance(inputs.get("logits_to_keep"), Tensor) and not settings.full:
        raise ValueError(
            "prune: expected an integer logits_to_keep, got a tensor, whose indices point into the "
            'unpruned sequence. Use logits="full".'
        )
    if not rows.ends_real and not rows.starts_real:
        raise ValueError(
            "prune: expected rows padded on one side, got some that start with pads and some that "
            "end in them: which column is a row's last is not the same for all. Pad the batch on "
            "the left, or on the right."
        )
    padded = rows.padded if rows.packing is None else rows.packing.padded
    if padded and rows.labelled and settings.asks_router(inputs):
        raise ValueError(
            "prune: expected a batch without padding for a loss with router terms, got a "
            "padded one. Use batches of one, or output_router_logits=False."
        )
    if attention.startswith("flash") and scales_by_position(settings.anatomy.layers[0].self_attn):
        raise ValueError(
            "prune: expected sdpa or eager attention for a model that scales queries by position, "
            f"got {attention}, which takes the gaps between survivors for packed "
            'sequences. Use attn_implementation="sdpa".'
        )
    if caches.is_fixed(inputs.get("past_key_values")) and offset > 0:
        raise ValueError(
            "prune: expected a cache that grows, for images of a later turn, got "
            f"{type(inputs['past_key_values']).__name__}. Leave cache_implementation out."
        )
    position_ids = inputs.get("position_ids")
    if settings.renumbers and position_ids is not None and position_ids.dim() > 2:
        raise ValueError(
            'prune: expected one-dimensional positions with positions="renumbered", got '
            f'{position_ids.shape[0]}-dimensional ones. Use positions="original".'
        )
    if rows.goes_back:
        raise not_apart(settings, inputs)
    ends = inputs.get("cu_seq_lens_q")
    if rows.packing is None and ends is not None and len(ends) > 2:
        raise packed(
            f"cu_seq_lens_q of {len(ends) - 1} and no position_ids that start anew with each",
            "Pass these, too; where positions have several axes, the text's before them.",
        )


def _check_words(settings: Settings, rows: Rows, budgets: list[list[int]]) -> None:
    """Refuses rows that would lose tokens by what text says of them, and have no such text."""
    for needs, strategy, budget in zip(
        settings.declared, settings.strategies, budgets, strict=True
    ):
        for follow in (need.follow for need in needs if isinstance(need, Words)):
            assert rows.prompt is not None
            found = zip(
                rows.num_visual,
                budget,
                rows.num_follow if follow else rows.num_prompt,
                strict=True,
            )
            without = [
                row for row, (had, keep, words) in enumerate(found) if keep < had > 0 == words
            ]
            if without:
                where = " after the last image" if follow else ""
                raise ValueError(
                    f"prune: expected text of the prompt{where} in every row that loses tokens, "
                    f"for {type(strategy).__name__}, got none in row {without[0]}. Put the "
                    "question there, in the same call, or choose another strategy."
                )


def _place_finder(settings: Settings, rows: Rows) -> Callable[[], list[Tensor]]:
    # A trace must keep neither pixels nor the model alive.
    told, layout, config = rows.facts, settings.anatomy.adapter.layout, settings.anatomy.config
    visual, video = rows.visual, rows.video
    return lambda: places(layout, config, told, find_runs(visual, video))
