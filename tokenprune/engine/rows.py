"""What the rows of a call hold: which tokens exist, which are visual, which ask.

Decided here once, for everything else, on the host: what a call says of its tokens is fetched from
the device in one transfer, before the first layer.

Shape suffixes: B batch rows, T columns of the call.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from tokenprune.engine import masks
from tokenprune.engine.packing import Packing
from tokenprune.engine.sequences import (
    begin_by_positions,
    begin_by_sight,
    check_mask,
    find,
    on_a_line,
)
from tokenprune.engine.settings import Settings
from tokenprune.families.inputs import facts, shows_images

Bools = npt.NDArray[np.bool_]
Ints = npt.NDArray[np.int64]
IGNORED = -100
_FEW = 2**10  # sizes of hundreds of images, and no mask of their pixels


@dataclass(frozen=True, eq=False)
class Rows:
    """Tokens of a call, on the host. Of packed rows each sequence is a row here.

    Attributes:
        real: Bool (B, T), no pads.
        visual: Bool (B, T).
        video: Bool (B, T), those with the placeholders of videos; None where there are no such, or
            no ids.
        asking: Bool (B, T), the `"last"` query rows.
        prompt: Bool (B, T), text that is no answer and no guess; None where nobody asks.
        ids: int64 (B, T), or None where the call has none or nothing needs them.
        targets: Bool (B, T), tokens whose labels are learned, where each is predicted by a token
            that survives whatever is chosen; None otherwise, or where nobody asks.
        labelled: Whether the call has labels.
        mute: Whether some row has labels and an image, but no token that asks.
        goes_back: Whether given positions fall between two neighbours of a row with an image.
        in_order: Whether positions are 0 .. T - 1 in each row, none of which has pads.
        guesses: Tokens at the end that assisted decoding tries out; they choose nothing.
        facts: What the call says of its images; the few numbers among it on the host.
        packing: Where the sequences stand in the rows of the call, or None if each has one.
    """

    real: Bools
    visual: Bools
    asking: Bools
    video: Bools | None = None
    prompt: Bools | None = None
    ids: Ints | None = None
    targets: Bools | None = None
    labelled: bool = False
    mute: bool = False
    goes_back: bool = False
    in_order: bool = False
    guesses: int = 0
    facts: dict[str, Any] = field(default_factory=dict)
    packing: Packing | None = None

    def of_videos(self) -> list[Tensor]:
        """Of each row, which visual tokens are of videos, bool (V,).

        None where images and videos have the same placeholders, or no ids say which they are,
        unless the call shows videos alone.
        """
        shown = {kind for kind in ("image", "video") if f"{kind}_grid_thw" in self.facts}
        alone = np.full_like(self.visual, shown == {"video"})
        video = alone if self.video is None else self.video
        rows = zip(video, self.visual, strict=True)
        return [torch.from_numpy(own[seen]) for own, seen in rows]

    @cached_property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of the call."""
        return self.real.shape if self.packing is None else self.packing.shape

    @cached_property
    def num_real(self) -> list[int]:
        rows, length = self.real.shape
        return counts(self.real) if self.padded else [length] * rows

    @cached_property
    def num_visual(self) -> list[int]:
        return counts(self.visual)

    @cached_property
    def num_asking(self) -> list[int]:
        return counts(self.asking)

    @cached_property
    def padded(self) -> bool:
        return not self.real.all()

    @cached_property
    def ends_real(self) -> bool:
        """Whether every row ends in a token; a row of pads alone is no matter."""
        return not self.padded or bool(self.real[self.real.any(1), -1].all())

    @cached_property
    def starts_real(self) -> bool:
        """Whether every row starts with a token; a row of pads alone is no matter."""
        return not self.padded or bool(self.real[self.real.any(1), 0].all())

    @cached_property
    def asks_at_its_end(self) -> bool:
        """Whether in every row the last column asks, it alone, and is text: it stays the last."""
        return bool(
            max(self.num_asking, default=0) == 1
            and not any(self.ends_visual)
            and self.asking[:, -1].all()
        )

    @cached_property
    def last_visual(self) -> int:
        """Latest column that is visual in some row, or -1."""
        columns: Any = self.visual.any(0)
        return int(columns.nonzero()[0].max(initial=-1))

    @cached_property
    def ends_visual(self) -> list[bool]:
        """Whether each row ends in a visual token."""
        ends: list[bool] = self.visual[:, -1].tolist()
        return ends

    @cached_property
    def num_prompt(self) -> list[int]:
        """Text tokens of the prompt, per row."""
        assert self.prompt is not None
        return counts(self.prompt)

    @cached_property
    def num_follow(self) -> list[int]:
        """Text tokens of the prompt after the last visual one, per row."""
        assert self.prompt is not None
        ahead = self.visual[:, ::-1].cumsum(1)[:, ::-1] > 0
        return counts(self.prompt & ~ahead)

    @cached_property
    def visual_asks(self) -> bool:
        """Whether a token that asks may be dropped."""
        return bool((self.asking & self.visual).any())


def counts(marked: Bools) -> list[int]:
    """True entries of each row."""
    numbers: list[int] = marked.sum(1).tolist()
    return numbers


def columns(marked: Bools, numbers: list[int], pad: int) -> Ints:
    """Columns of the True entries of each row, ascending, int64 (B, most), filled with `pad`.

    Args:
        marked: Bool (B, T).
        numbers: True entries of each row.
        pad: What fills rows with fewer than others.
    """
    found = marked.nonzero()[1].astype(np.int64)
    if len(set(numbers)) == 1:
        return found.reshape(len(numbers), -1)
    table = np.full((len(numbers), max(numbers)), pad, dtype=np.int64)
    table[np.arange(table.shape[1]) < np.array(numbers)[:, None]] = found
    return table


def read_rows(
    settings: Settings, inputs: Mapping[str, Any], tokens: Tensor, offset: int, guesses: int
) -> Rows:
    """Reads the rows of a call.

    Args:
        settings: What `attach` was asked for.
        inputs: Arguments of the decoder and of the modules above it.
        tokens: Ids (B, T) or embeddings (B, T, D).
        offset: Columns of the conversation before the call.
        guesses: Tokens at the end that assisted decoding tries out.

    Raises:
        ValueError: If the call does not say where its visual tokens are, or its mask is too short.
    """
    num_rows, length = tokens.shape[:2]
    marks = _visual_mask(settings, inputs, num_rows, length, offset)
    by_ids = marks is None and _shows_ids(settings, inputs, offset)
    padding = masks.padding(inputs.get("attention_mask"))
    if marks is None and not by_ids and (length == 1 or padding is None):
        # A decoding step asks the device nothing: what the caller hides, its mask goes on hiding.
        known: Rows = text(num_rows, length)
        return known
    nothing = np.zeros((num_rows, length), dtype=np.bool_)
    if padding is not None and padding.shape[1] < offset + length:
        raise ValueError(
            f"prune: expected an attention_mask of {offset + length} columns, all of the "
            f"conversation, got {padding.shape[1]}. Lengthen it turn by turn."
        )
    sights = None
    if padding is None and length > 1:
        sights = masks.sights(inputs.get("attention_mask"), num_rows, length, offset)
    shifted, labels = inputs.get("shift_labels"), inputs.get("labels")
    _check_lengths(inputs, length, by_ids)
    positions = on_a_line(inputs.get("position_ids"), padding)
    told = facts(inputs)
    few = {name: value for name, value in told.items() if _is_small(value)}
    fetched = fetch(
        {
            **{f"told {name}": value for name, value in few.items()},
            "visual": marks,
            "ids": _of_length(inputs.get("input_ids"), length),
            "real": None if padding is None else padding[:, offset : offset + length],
            "sights": sights,
            "labels": labels if shifted is None else shifted,
            "positions": _of_length(positions, length),
        },
        tokens.device,
    )
    real = fetched["real"] != 0 if "real" in fetched else ~nothing
    begins = first = None
    if "sights" in fetched:
        first = fetched["sights"] >> 3
        real, begins = begin_by_sight(fetched.pop("sights"))
    elif "positions" in fetched and inputs.get("attention_mask") is None:
        begins = begin_by_positions(settings, inputs, fetched["positions"], num_rows)
    visual = nothing
    if by_ids:
        visual = np.isin(fetched["ids"], settings.anatomy.visual_ids) & real
        visual[:, length - guesses :] = False  # text, whatever their numbers
    elif marks is not None:
        times = num_rows // marks.shape[0]
        visual = (fetched.pop("visual") != 0).repeat(times, 0) & real
    packing = None
    if settings.cuts and (begins is not None or "real" in fetched) and visual.any():
        if "real" in fetched:
            check_mask(fetched["real"])
        packing = None if begins is None else find(begins, real, visual, first)
    if packing is not None:
        visual, real = packing.apart(visual, False), packing.real
        tables = fetched.keys() & {"ids", "labels", "positions"}
        fetched |= {name: packing.apart(fetched[name], IGNORED) for name in tables}
        nothing = np.zeros_like(real)
    ids = fetched.get("ids")
    of_videos = settings.anatomy.video_ids
    labelled: Bools | None = None
    followed: Bools | None = None
    if "labels" in fetched:
        given = fetched["labels"] != IGNORED
        if shifted is None:
            labelled, followed = given, np.pad(given, ((0, 0), (0, 1)))[:, 1:]
        else:  # then these are what the loss reads
            given[:, -1] &= packing is None  # which no token of the same sequence follows
            labelled, followed = np.pad(given, ((0, 0), (1, 0)))[:, :-1], given
    sees: Any = visual.any(1)
    asking = _asking(real, visual, labelled, followed, guesses) if sees.any() else nothing
    return Rows(
        real=real,
        visual=visual,
        asking=asking,
        video=None if ids is None or not of_videos else np.isin(ids, of_videos) & visual,
        prompt=_prompt(real & ~visual, labelled, asking) if settings.reads_text else None,
        ids=ids,
        targets=_targets(real, visual, labelled)
        if settings.supervised and shifted is None
        else None,
        mute=followed is not None and bool((followed.any(1) & sees & ~asking.any(1)).any()),
        labelled=labelled is not None,
        goes_back="positions" in fetched and _goes_back(fetched["positions"], real & sees[:, None]),
        in_order=_in_order(settings, inputs, fetched.get("positions"), offset, real, packing),
        guesses=guesses,
        facts=told | {name: torch.from_numpy(fetched[f"told {name}"]) for name in few},
        packing=packing,
    )


def is_step(settings: Settings, inputs: Mapping[str, Any], length: int) -> bool:
    """Whether a call goes on by one token of text, of which nobody asks where it stands.

    Flash kernels do: by a mask whose length says how much of a fixed cache is filled.

    Args:
        settings: What `attach` was asked for.
        inputs: Arguments of the decoder and of the modules above it.
        length: Tokens of the call.
    """
    marked = inputs.get("visual_mask", settings.visual_mask) is not None
    asked = marked or settings.window is not None or settings.anatomy.attention.startswith("flash")
    return length == 1 and not asked and not shows_images(inputs)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def text(num_rows: int, length: int) -> Rows:
    """Rows of text without pads; the same ones for every step of a generation."""
    return _text(num_rows, length)


@lru_cache(16)
def _text(num_rows: int, length: int) -> Rows:
    nothing = np.zeros((num_rows, length), dtype=np.bool_)
    rows = Rows(~nothing, nothing, nothing)
    for name, known in vars(Rows).items():  # a compiler that meets them finds them
        if isinstance(known, cached_property) and name not in ("num_prompt", "num_follow"):
            getattr(rows, name)
    return rows


def fetch(parts: Mapping[str, Tensor | None], device: torch.device) -> dict[str, Ints]:
    """Integer tensors on the host, by name, in one transfer; those that are there."""
    given = {name: part for name, part in parts.items() if part is not None}
    if len(given) == 1:
        ((name, part),) = given.items()
        part = part if part.dtype in (torch.bool, torch.int64) else part.to(torch.int64)
        return {name: part.numpy(force=True)}
    flat = [part.to(device=device, dtype=torch.int64).flatten() for part in given.values()]
    joined = torch.cat(flat).numpy(force=True)
    ends = np.cumsum([len(part) for part in flat])[:-1]
    found = zip(given.items(), np.split(joined, ends), strict=True)
    return {name: own.reshape(part.shape) for (name, part), own in found}


def _is_small(value: Any) -> bool:
    """Whether something that a call says of its images is a few numbers, as grids are."""
    kinds = (torch.int32, torch.int64)
    return isinstance(value, Tensor) and value.dtype in kinds and value.numel() <= _FEW


def _visual_mask(
    settings: Settings, inputs: Mapping[str, Any], num_rows: int, length: int, offset: int
) -> Tensor | None:
    """The call's part of a mask that says which tokens are visual, or None without one."""
    mask = inputs.get("visual_mask", settings.visual_mask)
    if mask is None:
        return None
    if mask.dim() != 2 or mask.dtype != torch.bool or num_rows % mask.shape[0]:
        raise ValueError(
            f"prune: expected visual_mask of dtype bool and shape ({num_rows}, T), got "
            f"{mask.dtype} and {tuple(mask.shape)}. Mark the visual columns with True."
        )
    part: Tensor = mask[:, offset : offset + length]
    if part.shape[1] == 0:
        return None
    missing = length - part.shape[1]
    return nn.functional.pad(part, (0, missing)) if missing else part


def _shows_ids(settings: Settings, inputs: Mapping[str, Any], offset: int) -> bool:
    """Whether the call's ids say which tokens are visual; False where there can be none."""
    if inputs.get("visual_mask", settings.visual_mask) is not None:
        return False
    # A generated id is text, whatever its number: later calls show images only with pixels.
    if offset > 0 and not shows_images(inputs):
        return False
    if not settings.anatomy.visual_ids:
        raise ValueError(
            "prune: expected visual_mask, bool (B, T), or placeholder ids of visual tokens in "
            f"the config, got neither for {type(settings.anatomy.config).__name__}. Pass the mask "
            "to prune or to the call."
        )
    if inputs.get("input_ids") is None:
        raise ValueError(
            "prune: expected input_ids or visual_mask, got inputs_embeds alone. Pass "
            "visual_mask, bool (B, T), to say which columns are visual."
        )
    return True


def _asking(
    real: Bools, visual: Bools, labelled: Bools | None, followed: Bools | None, guesses: int
) -> Bools:
    """The `"last"` query rows. Assisted decoding puts guesses after the prompt.

    With labels, they are the ends of prompts, if one of them sees an image. An image that follows
    labelled text ends none: there all text is labelled, and the image alone is not.
    """
    if labelled is not None and followed is not None:
        asking: Bools = ~labelled & followed & real
        tells = asking & (visual.cumsum(1) > 0)
        if (tells & visual).any():
            order = np.where(real & ~visual, np.arange(real.shape[1]), -1)
            before = np.maximum.accumulate(order, 1)
            tells &= ~(visual & (before >= 0) & np.take_along_axis(labelled, before, 1))
        asking &= tells.any(1, keepdims=True) | ~visual.any(1, keepdims=True)
        return asking
    lone = np.zeros_like(real)
    if real[:, -1].all():
        lone[:, max(real.shape[1] - 1 - guesses, 0)] = True
        return lone
    last = real.shape[1] - 1 - real[:, ::-1].argmax(1)
    lone[np.arange(len(real)), np.maximum(last - guesses, 0)] = real.any(1)
    return lone


def _prompt(text: Bools, labelled: Bools | None, asking: Bools) -> Bools:
    """Text of the prompt: no answer, and no guess of assisted decoding after what asks."""
    if labelled is not None:
        return text & ~labelled
    ahead: Bools = asking[:, ::-1].cumsum(1)[:, ::-1] > 0
    return text & ahead


def _targets(real: Bools, visual: Bools, labelled: Bools | None) -> Bools | None:
    """Labelled tokens that have something before them; None if that may be gone, or they may."""
    if labelled is None:
        return None
    text = real & ~visual
    targets: Bools = labelled & real & (real.cumsum(1) > 1)
    sure = (targets <= (text & (text.cumsum(1) > 1))).all()
    return targets if sure and targets.any() else None


def _of_length(values: Tensor | None, length: int) -> Tensor | None:
    """Values (B, T) with an entry per token of the call; None for others."""
    fits = values is not None and values.dim() == 2 and values.shape[1] == length
    return values if fits else None


def _check_lengths(inputs: Mapping[str, Any], length: int, by_ids: bool) -> None:
    """Refuses ids and labels of other lengths than what the decoder is given."""
    for name in ("input_ids", "labels", "shift_labels"):
        values = inputs.get(name)
        if values is None or values.shape[1] == length or (name == "input_ids" and not by_ids):
            continue
        raise ValueError(
            f"prune: expected {name} with an entry for each of the {length} tokens that the "
            f"decoder is given, got {values.shape[1]}: something puts tokens of its own into the "
            "prompt (prompt tuning, p-tuning). Pass visual_mask, bool (B, T), over all of them, "
            "and no labels; to train, attach to what gets them in full (peft: get_base_model())."
        )


def _in_order(
    settings: Settings,
    inputs: Mapping[str, Any],
    positions: Ints | None,
    offset: int,
    real: Bools,
    packing: Packing | None,
) -> bool:
    """Whether positions are 0 .. T - 1, as they are unless others are given; if anybody asks."""
    if not settings.renumbers or offset or packing is not None or not real.all():
        return False
    if positions is None:
        return inputs.get("position_ids") is None
    return bool((positions == np.arange(real.shape[1])).all())


def _goes_back(positions: Ints, real: Bools) -> bool:
    """Whether given positions do not rise from one real token to the next."""
    back = positions[:, 1:] <= positions[:, :-1]
    return bool((back & real[:, 1:] & real[:, :-1]).any())
