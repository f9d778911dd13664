"""Where one sequence of a row ends and another begins, as the model sees it.

A row holds several where a mask over pairs keeps them apart, or, without a mask, positions that
start anew: `DataCollatorWithFlattening` of transformers and padding-free training make such rows.

Shape suffixes: B batch rows, T columns of the call.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import numpy as np
from torch import Tensor

from tokenprune.engine.packing import CACHE_HINT, Bools, Ints, Packing, packed
from tokenprune.engine.settings import Settings


def find(begins: Bools, real: Bools, visual: Bools, first: Ints | None) -> Packing | None:
    """The sequences of a call's rows; None if no row holds several.

    Text at the end of a row that sees nothing but itself is padding; at its start it is no token,
    by sight.

    Args:
        begins: Bool (B, T), tokens that see nothing before them.
        real: Bool (B, T), no pads.
        visual: Bool (B, T).
        first: int64 (B, T), the first column that each token sees; None where positions, and no
            mask, keep sequences apart.

    Raises:
        ValueError: If sequences see one another, or one has holes.
    """
    begins = begins & real
    begins[np.arange(len(real)), real.argmax(1)] |= real.any(1)
    if (begins.sum(1) <= 1).all():
        return None
    lone = begins & ~visual & np.pad(begins | ~real, ((0, 0), (0, 1)), constant_values=True)[:, 1:]
    pads = np.logical_and.accumulate((lone | ~real)[:, ::-1], 1)[:, ::-1]
    row, start = np.nonzero(begins & ~pads)
    tokens = np.flatnonzero(real & ~pads)
    number = (begins & ~pads).ravel().cumsum()[tokens] - 1
    if (np.diff(tokens)[np.diff(number) == 0] != 1).any():
        raise packed("an attention_mask that hides tokens within one of several")
    if first is not None and (first.ravel()[tokens] < start[number]).any():
        raise packed("an attention_mask under which one of several sees tokens of another")
    return Packing(begins.shape, row, start, np.bincount(number), first is None)


def check_mask(mask: Ints) -> None:
    """Refuses a mask (B, T) that numbers sequences, which transformers reads as one of ones."""
    if mask.max(initial=0) > 1:
        raise packed(
            f"an attention_mask with numbers up to {mask.max()}",
            "Keep sequences apart by a mask over pairs of tokens, or by position_ids.",
        )


def begin_by_sight(sights: Ints) -> tuple[Bools, Bools]:
    """Which tokens are real, and which begin a sequence, by who sees whom (see `masks.sights`).

    Pads on the left are seen by nobody. At the end of a sequence nobody sees the last token either:
    what follows it there is a pad, whether it sees the row or only itself.
    """
    itself, sees, seen = (sights & bit != 0 for bit in (1, 2, 4))
    real: Bools = seen.copy()
    begins = np.zeros_like(real)
    for row in range(len(sights)):
        ends = np.flatnonzero(seen[row])
        end = int(ends[-1]) + 1 if len(ends) else 0
        starts = np.flatnonzero(itself[row, :end] & ~sees[row, :end])
        starts = starts[starts > ends[0]] if len(ends) else starts
        begins[row, starts] = True
        for start, stop in pairwise([0, *starts.tolist(), real.shape[1]]):
            own = np.flatnonzero(seen[row, start:stop])
            end = start + int(own[-1]) + 1 if len(own) else start
            # Of several that nobody sees all are pads that see the row; a row of tokens that see
            # only themselves is any of them.
            last = end + np.flatnonzero(
                itself[row, end:stop] & (sees[row, end:stop] | (end == start))
            )
            if end == start or len(last) == 1:
                real[row, last] = True
    return real, begins


def begin_by_positions(
    settings: Settings, inputs: Mapping[str, Any], positions: Ints, num_rows: int
) -> Bools:
    """Which tokens begin a sequence by their positions, as transformers reads them, bool (B, T)."""
    if settings.anatomy.attention.startswith("flash"):
        begins = positions == positions.min() if num_rows == 1 else np.zeros(positions.shape, bool)
    elif _caches(settings, inputs):
        begins = np.zeros(positions.shape, bool)
    else:
        begins = np.diff(positions, prepend=positions[:, :1] - 1) != 1
    return np.repeat(begins, num_rows // len(begins), 0)


def not_apart(settings: Settings, inputs: Mapping[str, Any]) -> ValueError:
    """The error for positions that start anew where the model sees one sequence: why it does."""
    if inputs.get("attention_mask") is not None:
        why, hint = "beside an attention_mask", "Leave it out"
    elif settings.anatomy.attention.startswith("flash"):
        why, hint = "in one of several rows, under flash attention", "Flatten them to one row"
    else:
        why, hint = "with a cache", CACHE_HINT
    return packed(
        f"position_ids that start anew within one, {why}, for which the model takes it as one",
        f"{hint}; or pass sequences as rows of a batch, with padding.",
    )


def _caches(settings: Settings, inputs: Mapping[str, Any]) -> bool:
    """Whether the decoder is given a cache, or will make one."""
    if inputs.get("past_key_values") is not None:
        return True
    decoder: Any = settings.anatomy.decoder
    asked = inputs.get("use_cache")
    asked = getattr(settings.anatomy.text_config, "use_cache", False) if asked is None else asked
    computes_anew = decoder.training and getattr(decoder, "gradient_checkpointing", False)
    return bool(asked) and not computes_anew


def on_a_line(positions: Tensor | None, padding: Tensor | None) -> Tensor | None:
    """Positions (B, T) that transformers reads sequences from: of several axes the text's."""
    if positions is None or positions.dim() != 3 or len(positions) != 4 or padding is not None:
        return positions
    return positions[0]
