"""What a schedule costs: FLOPs and key-value bytes. Pure arithmetic, no model code.

Papers count multiply-accumulates and call them FLOPs; `flops` follows each paper's convention, and
its docstring says which.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

CONVENTIONS = ("pyramiddrop", "fastv")


@dataclass(frozen=True)
class DecoderShape:
    """The sizes of a decoder that its cost depends on."""

    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int

    @classmethod
    def from_config(cls, config: Any) -> DecoderShape:
        """Reads the text part of a Hugging Face config.

        Raises:
            ValueError: If the config lacks one of the sizes.
        """
        text = (
            config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
        )
        try:
            heads = text.num_attention_heads
            return cls(
                num_layers=text.num_hidden_layers,
                hidden_size=text.hidden_size,
                intermediate_size=text.intermediate_size,
                num_heads=heads,
                num_kv_heads=getattr(text, "num_key_value_heads", None) or heads,
                head_dim=getattr(text, "head_dim", None) or text.hidden_size // heads,
                vocab_size=text.vocab_size,
            )
        except AttributeError as error:
            raise ValueError(
                f"DecoderShape.from_config: expected a decoder config, got "
                f"{type(config).__name__}: {error}. Give the sizes by hand."
            ) from error


def flops(
    shape: DecoderShape,
    lengths: Sequence[int | float],
    num_text: int = 0,
    convention: str = "pyramiddrop",
) -> float:
    """Prefill cost of the decoder layers, by a paper's formula; not scaled to tera.

    With n tokens in a layer, hidden size d and intermediate size m, per layer:

    * `"pyramiddrop"`: 4nd² + 2n²d + 3ndm (arXiv 2410.17247, §3.3; SparseVLM counts the same),
    * `"fastv"`: 4nd² + 2n²d + 2ndm (arXiv 2403.06764, §4.2; DivPrune counts the same).

    Both count multiply-accumulates, full attention (not its causal half), no grouped queries, no
    vocabulary projection and no vision tower; `"fastv"` counts two of LLaMA's three MLP matrices.

    Args:
        shape: The decoder.
        lengths: Visual tokens of each layer, as `Schedule.lengths` gives them.
        num_text: Text tokens beside them in every layer.
        convention: `"pyramiddrop"` or `"fastv"`.

    Raises:
        ValueError: If `lengths` does not fit the decoder.
        KeyError: If the convention is unknown.
    """
    _check_lengths("flops", shape, lengths)
    if convention not in CONVENTIONS:
        from tokenprune.strategy import unknown_name

        raise unknown_name("flops.convention", convention, list(CONVENTIONS))
    matrices = 3 if convention == "pyramiddrop" else 2
    d, m = shape.hidden_size, shape.intermediate_size
    total = 0.0
    for length in lengths:
        n = length + num_text
        total += 4 * n * d**2 + 2 * n**2 * d + matrices * n * d * m
    return float(total)


def kv_bytes(
    shape: DecoderShape, lengths: Sequence[int], num_text: int = 0, bytes_per_value: int = 2
) -> int:
    """Bytes of the keys and values that the layers cache: 2 per token, layer, KV head and entry.

    Args:
        shape: The decoder.
        lengths: Visual tokens of each layer.
        num_text: Text tokens beside them in every layer.
        bytes_per_value: 2 for float16 and bfloat16, 4 for float32.

    Raises:
        ValueError: If `lengths` does not fit the decoder.
    """
    _check_lengths("kv_bytes", shape, lengths)
    tokens = sum(lengths) + num_text * shape.num_layers
    return 2 * tokens * shape.num_kv_heads * shape.head_dim * bytes_per_value


def _check_lengths(where: str, shape: DecoderShape, lengths: Sequence[int | float]) -> None:
    if len(lengths) != shape.num_layers or any(length < 0 for length in lengths):
        raise ValueError(
            f"{where}.lengths: expected {shape.num_layers} counts >= 0, one per layer, got "
            f"{len(lengths)}: {list(lengths)}. Use Schedule.lengths."
        )
