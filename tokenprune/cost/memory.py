"""Tokens averaged over layers, and bytes of the key-value cache."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tokenprune.cost.shape import DecoderShape, check_lengths
from tokenprune.strategy import unknown_name

AVERAGES = ("inputs", "outputs")
#: Bytes of a cached value.
DTYPE_BYTES = {
    "float32": 4,
    "float16": 2,
    "bfloat16": 2,
    "float8_e4m3fn": 1,
    "float8_e5m2": 1,
    "int8": 1,
}


def average_tokens(lengths: Sequence[int | float], over: str = "inputs") -> float:
    """Mean number of visual tokens over the layers.

    Papers mix two counts: FastV, PyramidDrop and VScan average what the layers are given
    (`"inputs"`), SparseVLM's code what they leave (`"outputs"`: a cut before layer k shortens the
    output of layer k - 1; the last layer's output is its input).

    Args:
        lengths: Visual tokens of each layer, as `Schedule.lengths` gives them.
        over: `"inputs"` or `"outputs"`.

    Raises:
        ValueError: If `lengths` is empty.
        KeyError: If `over` is unknown.
    """
    if over not in AVERAGES:
        raise unknown_name("average_tokens.over", over, list(AVERAGES))
    if not lengths:
        raise ValueError(
            "average_tokens.lengths: expected at least one layer, got none. Use Schedule.lengths."
        )
    counts = lengths if over == "inputs" else [*lengths[1:], lengths[-1]]
    return sum(counts) / len(counts)


def dtype_bytes(dtype: Any) -> int:
    """Bytes of a cached value of that type, given by name or as a torch.dtype.

    Raises:
        KeyError: If the type is unknown.
    """
    name = str(dtype).removeprefix("torch.")
    if name not in DTYPE_BYTES:
        raise unknown_name("cost.dtype", name, list(DTYPE_BYTES))
    return DTYPE_BYTES[name]


def kv_bytes(
    shape: DecoderShape,
    lengths: Sequence[int],
    num_text: int = 0,
    bytes_per_value: int = 2,
    dtype: Any = None,
) -> int:
    """Bytes of the keys and values that the layers cache: 2 per token, layer, KV head and entry.

    Args:
        shape: The decoder.
        lengths: Visual tokens of each layer.
        num_text: Text tokens beside them in every layer.
        bytes_per_value: 2 for float16 and bfloat16, 4 for float32.
        dtype: A type that says it instead, `"bfloat16"` or torch.bfloat16.

    Raises:
        ValueError: If `lengths` does not fit the decoder, or its layers cache other sizes.
        KeyError: If `dtype` is unknown.
    """
    check_lengths("kv_bytes", shape, lengths)
    if not shape.caches_alike:
        raise ValueError(
            f"cost.kv_bytes: expected layers that cache keys and values of one size, got "
            f"{shape.unlike}. Add up what the model's own cache holds."
        )
    tokens = sum(lengths) + num_text * shape.num_layers
    size = bytes_per_value if dtype is None else dtype_bytes(dtype)
    return 2 * tokens * shape.num_kv_heads * shape.head_dim * size
