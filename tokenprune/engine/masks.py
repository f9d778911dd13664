"""Attention masks in the form that each attention implementation reads.

Shape suffixes: B batch rows, Q query rows, K keys.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

#: Additive masks hide by less than this (-1e4 is -9984 in bfloat16); above are biases, which steer.
HIDDEN = -9e3


def padding(mask: Any) -> Tensor | None:
    """A mask that says which tokens of the conversation are real, (B, columns), if it is one."""
    mask = _of_full_attention(mask)
    return mask if isinstance(mask, Tensor) and mask.dim() == 2 else None


def sights(mask: Any, num_rows: int, length: int, offset: int) -> Tensor | None:
    """What a mask over pairs says of the tokens of a call, as bits, int64 (B, T).

    Bit 0: a token sees itself; bit 1: it sees an earlier one; bit 2: a later one sees it; from bit
    3: the first column of the call that it sees. Rows that see everything, the future too, are pads
    that a kernel wants open, and see nothing here.

    Args:
        mask: Bool, additive or a flex mask, or one per kind of layer; None without one.
        num_rows: Rows of the batch.
        length: Tokens of the call.
        offset: Columns of the conversation before it.
    """
    given = dense(_of_full_attention(mask), num_rows)
    if given is None or given.shape[2] != length or given.shape[3] < offset + length:
        return None
    allowed = visible(given)[:, :, : offset + length]
    own = allowed[:, :, offset:]
    open_BT1 = own.all(2, keepdim=True)
    # A last token sees everything by right, unless it follows such a pad; and where all tokens do,
    # attention goes both ways, and none is a pad.
    open_BT1[:, -1] &= open_BT1[:, -2] & ~open_BT1.all(1)
    earlier = own.tril(-1) & ~open_BT1
    sees = earlier.any(2) | (allowed[:, :, :offset] & ~open_BT1).any(2)
    itself = own.diagonal(dim1=1, dim2=2) & ~open_BT1[..., 0]
    first = own.to(torch.uint8).argmax(2)
    return itself.long() + 2 * sees.long() + 4 * earlier.any(1).long() + 8 * first


def visible(given: Tensor) -> Tensor:
    """Which keys some head shows to each query row, bool (B, Q, K), by a mask as `dense` has it."""
    return (given if given.dtype == torch.bool else given > HIDDEN).any(1)


def _of_full_attention(mask: Any) -> Any:
    """Of masks for each kind of layer, as `generate` makes for fixed caches, the one of most."""
    if isinstance(mask, dict):
        return mask.get("full_attention", next(iter(mask.values()), None))
    return mask


def dense(mask: Any, num_rows: int) -> Tensor | None:
    """A given mask as a tensor (B, 1|H, Q, K), bool or additive; None if it is none."""
    if isinstance(mask, Tensor):
        return mask.expand(num_rows, -1, -1, -1) if mask.dim() == 4 else None
    if mask is None or not hasattr(mask, "mask_mod"):
        return None
    from torch.nn.attention.flex_attention import create_mask

    num_queries, num_keys = mask.seq_lengths
    device = mask.kv_num_blocks.device
    allowed = create_mask(mask.mask_mod, num_rows, 1, num_queries, num_keys, device=device)
    return allowed.bool()


def form(allowed: Tensor, attention: str, dtype: torch.dtype, num_keys: int) -> Any:
    """A mask (B, 1, Q, K), bool or additive, as `attention` reads it.

    Args:
        allowed: Bool (True may be attended to) or additive.
        attention: `"eager"`, `"sdpa"` or `"flex_attention"`.
        dtype: Of an additive mask.
        num_keys: Keys that the layer shows, if more than K: those after are not filled yet.
    """
    low = torch.finfo(dtype).min
    if attention != "flex_attention" and attention != "sdpa" and allowed.dtype == torch.bool:
        allowed = torch.zeros_like(allowed, dtype=dtype).masked_fill(~allowed, low)
    missing = num_keys - allowed.shape[-1]
    if missing > 0:
        value = False if allowed.dtype == torch.bool else low
        allowed = nn.functional.pad(allowed, (0, missing), value=value)
    if attention != "flex_attention":
        return allowed
    from torch.nn.attention.flex_attention import create_block_mask

    num_rows, _, num_queries, num_keys = allowed.shape

    def may_attend(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return allowed[row, 0, query, key]

    return create_block_mask(
        may_attend, num_rows, None, num_queries, num_keys, device=str(allowed.device)
    )
