"""Whether a model's positions can be counted anew once tokens are gone."""

from __future__ import annotations

from torch import nn

from tokenprune.families.anatomy import examine, rotary_modules


def why_fixed(decoder: nn.Module) -> str | None:
    """What keeps a decoder from positions="renumbered", in words; None if it takes them.

    Positions 0..n-1 lie on one line. M-RoPE has several (time, height, width), and what is added
    before the first layer cannot be taken back before a later one.
    """
    rotary = rotary_modules(decoder)
    if not rotary:
        return f"{type(decoder).__name__}, which adds positions before its first layer"
    if any(getattr(module, "mrope_section", None) for module in rotary):
        return "rotary embeddings with several axes"
    return None


def fixed_positions(model: nn.Module) -> str | None:
    """Why a model takes `positions="original"` only; None if `"renumbered"` as well.

    Raises:
        ValueError: If the model cannot be pruned at all.
    """
    return why_fixed(examine(model).decoder)
