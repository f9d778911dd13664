"""What a schedule costs: FLOPs, cache bytes, tokens per layer. Pure arithmetic, no model code."""

from tokenprune.cost.compute import (
    CONVENTIONS,
    ExactFlops,
    decode_flops,
    exact,
    flops,
    rows_flops,
    scoring_flops,
)
from tokenprune.cost.memory import AVERAGES, DTYPE_BYTES, average_tokens, dtype_bytes, kv_bytes
from tokenprune.cost.shape import PRESETS, DecoderShape, Preset, find_preset, visual_tokens

__all__ = [
    "AVERAGES",
    "CONVENTIONS",
    "DTYPE_BYTES",
    "PRESETS",
    "DecoderShape",
    "ExactFlops",
    "Preset",
    "average_tokens",
    "decode_flops",
    "dtype_bytes",
    "exact",
    "find_preset",
    "flops",
    "kv_bytes",
    "rows_flops",
    "scoring_flops",
    "visual_tokens",
]
