"""Pure functions on tensors: choose tokens, take tokens, attention rows from queries and keys.

Shape suffixes: B batch rows, T sequence positions, N kept positions, V visual tokens, U units,
H query heads, G key heads, Q query rows, K keys, E head dimension.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch
from torch import Tensor


def top_k(scores_BV: Tensor, valid_BV: Tensor | None, keep_B: Tensor) -> Tensor:
    """Marks the `keep` highest-scoring valid tokens of each row; the lower index wins ties.

    Args:
        scores_BV: Scores, compared in float32.
        valid_BV: False where a row has no such token; never marked. None if all exist.
        keep_B: int64, tokens to keep per row; more than a row has keeps them all.

    Returns:
        Bool mask (B, V) with min(keep, number valid) True entries per row.
    """
    kept_BV = _ranking(scores_BV, valid_BV).argsort(dim=1) < keep_B[:, None]
    return kept_BV if valid_BV is None else kept_BV & valid_BV


def best(scores_BV: Tensor, valid_BV: Tensor | None, keep: int) -> Tensor:
    """Positions of the tokens that `top_k` marks, ascending, where each row keeps as many.

    Args:
        scores_BV: As for `top_k`.
        valid_BV: As for `top_k`.
        keep: Tokens to keep of each row, which has no fewer.

    Returns:
        int64 (B, keep).
    """
    return _ranking(scores_BV, valid_BV)[:, :keep].sort(dim=1).values


def _ranking(scores_BV: Tensor, valid_BV: Tensor | None) -> Tensor:
    """Tokens from the highest score to the lowest, int64 (B, V); what does not exist comes last."""
    low = torch.finfo(torch.float32).min
    # NaN would sort first; it means "no evidence" and goes last among the valid tokens.
    scores_BV = torch.nan_to_num(scores_BV.float(), nan=low, neginf=low)
    if valid_BV is not None:
        scores_BV = scores_BV.masked_fill(~valid_BV, -torch.inf)
    return scores_BV.argsort(dim=1, descending=True, stable=True)


def ascending(mask_BT: Tensor, length: int) -> Tensor:
    """Positions of the True entries of each row, ascending, padded to `length`.

    Pads are positions of unmarked ones, on the right.
    Works without a device synchronisation: `length` must be the largest count.

    Returns:
        int64 (B, length).
    """
    return mask_BT.view(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :length]


def take(values: Tensor, index_BN: Tensor, *, batch: int = 0, dim: int = 1) -> Tensor:
    """Gathers positions `index_BN` along `dim`, row by row along dimension `batch`.

    A batch dimension of 1 is expanded to that of the index.
    (B|1, T, ...) -> (B, N, ...) with the default dimensions.
    """
    num_rows, num_kept = index_BN.shape
    if num_rows == 1:
        return values.index_select(dim, index_BN[0])
    target = list(values.shape)
    target[batch] = num_rows
    values = values.expand(target)
    target[dim] = num_kept
    shape = [1] * values.dim()
    shape[batch], shape[dim] = num_rows, num_kept
    return values.gather(dim, index_BN.view(shape).expand(target))


def first_alike(unit_BVD: Tensor, cosine_BVV: Tensor) -> Tensor:
    """The first token that is equal to each one, itself if there is none before it, (B, V).

    Equal tokens, as newlines are, get numbers from a matrix product that differ in the last digit:
    what is read at this index is equal again, and the lower index wins.

    Args:
        unit_BVD: Float32 vectors of length 1, or 0.
        cosine_BVV: Their products, however precise products are there.
    """
    own_BV = cosine_BVV.diagonal(dim1=1, dim2=2)
    least_BVV = torch.maximum(own_BV[:, :, None], own_BV[:, None]) - 2e-6
    alike_BVV = (cosine_BVV >= least_BVV) & (own_BV > 0.5)[:, None]
    # Cosines do not tell directions that are a thousandth apart; sums of entries, signed, do.
    signs_D = torch.arange(unit_BVD.shape[-1], device=unit_BVD.device).square().cos()
    sum_BV = (unit_BVD * signs_D).sum(-1)
    alike_BVV = alike_BVV & ((sum_BV[:, :, None] - sum_BV[:, None]).abs() <= 2e-6)
    own_VV = torch.eye(cosine_BVV.shape[-1], dtype=torch.bool, device=cosine_BVV.device)
    return (alike_BVV | own_VV).to(torch.uint8).argmax(-1)


def to_device(value: Any, device: torch.device) -> Any:
    """A tensor, or a tuple of tensors, on another device; anything else as it is."""
    if isinstance(value, Tensor):
        return value if value.device == device else value.to(device)
    if isinstance(value, tuple):
        return tuple(to_device(part, device) for part in value)
    return value


def split_budget(budget_B: Tensor, sizes_BU: Tensor) -> Tensor:
    """Splits each row's budget over units by size, largest remainder first (ties: lower unit).

    Args:
        budget_B: int64, tokens to hand out.
        sizes_BU: int64, size of each unit (image, grid); 0 for absent units.

    Returns:
        int64 (B, U) that sums to min(budget, total size) per row.
    """
    total_B1 = sizes_BU.sum(1, keepdim=True)
    budget_B1 = torch.minimum(budget_B[:, None], total_B1)
    quota_BU = budget_B1 * sizes_BU // total_B1.clamp_min(1)
    remainder_BU = budget_B1 * sizes_BU - quota_BU * total_B1
    left_B = (budget_B1 - quota_BU.sum(1, keepdim=True)).squeeze(1)
    return quota_BU + top_k(remainder_BU.float(), sizes_BU > 0, left_B).long()


def share_out(keep_B: Tensor, unit_BV: Tensor, valid_BV: Tensor) -> tuple[Tensor, Tensor]:
    """Splits each row's budget over units by size; tokens in none get what units leave over.

    Args:
        keep_B: int64, tokens to keep per row.
        unit_BV: int64, number of each token's unit, from 0; -1 for tokens in none.
        valid_BV: False where a row has no such token.

    Returns:
        Units int64 (B, V), where tokens in none are in unit V, and quotas int64 (B, V + 1).
    """
    last = unit_BV.shape[1]
    unit_BV = unit_BV.masked_fill(~valid_BV | (unit_BV < 0), last)
    quota_BU = split_budget(keep_B, sizes_of_units(unit_BV)[:, :last])
    left_B1 = keep_B[:, None] - quota_BU.sum(1, keepdim=True)
    return unit_BV, torch.cat([quota_BU, left_B1], 1)


def rank_in_units(scores_BV: Tensor, unit_BV: Tensor, valid_BV: Tensor) -> Tensor:
    """Places of tokens among those of their unit, from the highest score; ties by index.

    Args:
        scores_BV: Scores, compared in float32; in unit V, which is none, the index counts.
        unit_BV: int64, unit of each token, as `share_out` numbers them.
        valid_BV: False where a row has no such token; those come last.

    Returns:
        int64 (B, V), from 0.
    """
    last, low = unit_BV.shape[1], torch.finfo(torch.float32).min
    scores_BV = torch.nan_to_num(scores_BV.float(), nan=low, neginf=low)
    scores_BV = scores_BV.masked_fill(unit_BV == last, 0).masked_fill(~valid_BV, -torch.inf)
    order_BV = scores_BV.argsort(dim=1, descending=True, stable=True)
    order_BV = order_BV.gather(1, unit_BV.gather(1, order_BV).argsort(dim=1, stable=True))
    sizes_BU = sizes_of_units(unit_BV)
    first_BU = sizes_BU.cumsum(1) - sizes_BU
    return order_BV.argsort(dim=1) - first_BU.gather(1, unit_BV)


def sizes_of_units(unit_BV: Tensor) -> Tensor:
    """Tokens of each unit, int64 (B, V + 1); of the last, what does not exist, too."""
    return _sums_of_units(torch.ones_like(unit_BV), unit_BV)


def count_in_unit(marked_BV: Tensor, unit_BV: Tensor) -> Tensor:
    """Of each token, how many of its unit are marked, int64 (B, V)."""
    return _sums_of_units(marked_BV.long(), unit_BV).gather(1, unit_BV)


def _sums_of_units(values_BV: Tensor, unit_BV: Tensor) -> Tensor:
    """Sum of int64 values over each unit, (B, V + 1)."""
    sums_BU = unit_BV.new_zeros(unit_BV.shape[0], unit_BV.shape[1] + 1)
    return sums_BU.scatter_add(1, unit_BV, values_BV)


def snap(values_BV: Tensor, tolerance: float) -> Tensor:
    """Makes numbers of a row equal that rounding alone holds apart, so that ties go by the index.

    Sorted, each is as the one before if that is no further than `tolerance`.
    """
    sorted_BV, order_BV = values_BV.sort(dim=1)
    place_V = torch.arange(values_BV.shape[1], device=values_BV.device)
    is_new_BV = torch.nn.functional.pad(~(sorted_BV.diff(dim=1) <= tolerance), (1, 0))  # NaN, too
    first_BV = (place_V * is_new_BV).cummax(1).values
    return torch.empty_like(values_BV).scatter(1, order_BV, sorted_BV.gather(1, first_BV))


def find(keys_BV: Tensor, wanted_BN: Tensor) -> tuple[Tensor, Tensor]:
    """Looks numbers up among those of a row.

    Args:
        keys_BV: int64; of equal ones the first is found.
        wanted_BN: int64, what is looked for.

    Returns:
        Where each stands, int64 (B, N), anywhere if it is not there; and whether it is, bool.
    """
    sorted_BV, order_BV = keys_BV.sort(dim=1, stable=True)
    at_BN = torch.searchsorted(sorted_BV, wanted_BN.contiguous()).clamp_max(keys_BV.shape[1] - 1)
    return order_BV.gather(1, at_BN), sorted_BV.gather(1, at_BN) == wanted_BN


def mark(picks: Sequence[Tensor], keep_B: Tensor, valid_BV: Tensor) -> Tensor:
    """Marks the first `keep` of each row's picks.

    Args:
        picks: Picks one after the other, int64 (B, 1) each; a row may pick again what it has.
        keep_B: int64, how many of them count.
        valid_BV: False where a row has no such token; never marked.

    Returns:
        Bool mask (B, V).
    """
    if not picks:
        return torch.zeros_like(valid_BV)
    picks_BN = torch.cat(tuple(picks), 1)
    counts_BN = (torch.arange(len(picks), device=keep_B.device) < keep_B[:, None]).long()
    times_BV = torch.zeros(valid_BV.shape, dtype=torch.int64, device=keep_B.device)
    return (times_BV.scatter_add(1, picks_BN, counts_BN) > 0) & valid_BV


def mixture(row_BV: Tensor, share_BV: Tensor, num_rows: int) -> Tensor:
    """How survivors are mixed, where each token goes into one of them at most.

    Args:
        row_BV: int64, which survivor a token goes into.
        share_BV: float32, its weight there; 0 where it goes into none.
        num_rows: Survivors of the row that keeps the most.

    Returns:
        Weights (B, num_rows, V) for `Selection`.
    """
    weights = share_BV.new_zeros(len(row_BV), num_rows, row_BV.shape[1])
    if num_rows == 0:
        return weights
    return weights.scatter(1, row_BV.clamp(0, num_rows - 1)[:, None], share_BV[:, None])


def join_nearest(kept_BV: Tensor, alike_BVV: Tensor) -> tuple[Tensor, Tensor]:
    """The survivor that each token joins: itself, or of the others the most like it, the first.

    Args:
        kept_BV: Bool, survivors.
        alike_BVV: Likeness of a token to those that it may join, -inf to all others.

    Returns:
        Its place, int64 (B, V), and its number among the survivors, int64 (B, V).
    """
    place_V = torch.arange(kept_BV.shape[1], device=kept_BV.device)
    seat_BV = torch.where(kept_BV, place_V, alike_BVV.argmax(2))
    return seat_BV, (kept_BV.cumsum(1) - 1).gather(1, seat_BV)


def number_grids(places: Tensor) -> Tensor:
    """Numbers the grids of each row 0, 1, ... in order; a row without grids is one unit.

    Args:
        places: int64 (B, V, 4), image, grid, row and column of each token, -1 where unknown.

    Returns:
        int64 (B, V).
    """
    grid = torch.where(places[..., 2:3] >= 0, places[..., :2], -1)
    changes = (grid[:, 1:] != grid[:, :-1]).any(-1)
    return torch.nn.functional.pad(changes.long().cumsum(1), (1, 0))


def grid_units(places: Tensor, valid_BV: Tensor) -> tuple[Tensor, Tensor]:
    """The grid of each token, as units that share a budget, and how many tokens each has.

    Args:
        places: As for `number_grids`.
        valid_BV: False where a row has no such token: those form a last unit of size 0, which gets
            no budget.

    Returns:
        Units int64 (B, V), and sizes int64 (B, V + 1).
    """
    width = valid_BV.shape[1]
    unit_BV = number_grids(places).masked_fill(~valid_BV, width)
    sizes_BU = unit_BV.new_zeros(unit_BV.shape[0], width + 1)
    return unit_BV, sizes_BU.scatter_add(1, unit_BV, valid_BV.long())


def attention_rows(
    queries_BHQE: Tensor,
    keys_BGKE: Tensor,
    allowed: Tensor | None,
    scaling: float,
    softcap: float | None = None,
) -> Tensor:
    """Softmax over all keys, in float32, for the asked query rows only.

    Args:
        queries_BHQE: Rotated queries of the asked rows.
        keys_BGKE: Rotated keys of the whole sequence; H is a multiple of G (grouped queries).
        allowed: Bool (B, 1, Q, K), or an additive float mask of that shape; None for all keys.
        scaling: Factor on the logits, usually E ** -0.5.
        softcap: Squeezes the logits into (-softcap, softcap) by a tanh, if given.

    Returns:
        Attention weights (B, H, Q, K), float32. A row that may attend to nothing is all zero.
    """
    num_rows, num_heads, num_queries, _ = queries_BHQE.shape
    num_groups = keys_BGKE.shape[1]
    grouped = queries_BHQE.float().reshape(  # no key head is copied
        num_rows * num_groups, num_heads // num_groups * num_queries, -1
    )
    logits = torch.bmm(grouped, keys_BGKE.float().flatten(0, 1).transpose(1, 2)) * scaling
    logits_BHQK = logits.view(num_rows, num_heads, num_queries, -1)
    if softcap is not None:
        logits_BHQK = (logits_BHQK / softcap).tanh() * softcap
    if allowed is None:
        return logits_BHQK.softmax(-1)
    if allowed.dtype == torch.bool:
        logits_BHQK = logits_BHQK.masked_fill(~allowed, -torch.inf)
    else:
        logits_BHQK = logits_BHQK + allowed.float()
    return torch.nan_to_num(logits_BHQK.softmax(-1))


def causal(rows_BQ: Tensor, num_keys: int, before: int) -> Tensor:
    """Bool (B, 1, Q, K): asked rows see all keys held before, and new ones up to themselves."""
    order = torch.arange(num_keys, device=rows_BQ.device)
    return order <= rows_BQ[:, None, :, None] + before


def hide_pads(mask: Tensor, known_BK: Tensor, real_BN: Tensor | None) -> Tensor:
    """Forbids the keys that are not real; a pad's own row stays open, so that none is empty."""
    hidden = ~known_BK[:, None, None]
    if real_BN is not None:
        hidden = hidden & real_BN[:, None, :, None]
    if mask.dtype == torch.bool:
        return mask & ~hidden
    return mask.masked_fill(hidden, torch.finfo(mask.dtype).min)


def single_precision(device: torch.device) -> AbstractContextManager[None]:
    """What is computed in float32 stays so, under autocast as well."""
    kind = device.type
    if _casts(kind) and torch.is_autocast_enabled(kind):
        return torch.autocast(kind, enabled=False)
    return _NOTHING


def no_grad() -> AbstractContextManager[None]:
    """As torch's, which is entered only where there is something to leave out."""
    return torch.no_grad() if torch.is_grad_enabled() else _NOTHING


_casts = cache(torch.amp.is_autocast_available)
_NOTHING = nullcontext()
