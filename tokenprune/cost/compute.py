"""FLOPs of a prefill, of a decoding step and of scoring, by each paper's convention and exactly.

Papers count multiply-accumulates and call them FLOPs; `flops` follows each paper's convention, and
its docstring says which. The convention `"exact"` counts what a kernel does, two per multiply-add,
and equals `torch.utils.flop_counter.FlopCounterMode` on real forwards (tests/cost/test_cost.py).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from tokenprune.cost.shape import DecoderShape, check_layers, check_lengths
from tokenprune.strategy import PruningStrategy, decoder_rows, unknown_name

CONVENTIONS = ("pyramiddrop", "fastv", "exact")


def flops(
    shape: DecoderShape,
    lengths: Sequence[int | float],
    num_text: int = 0,
    convention: str = "pyramiddrop",
    causal: bool = True,
) -> float:
    """Prefill cost of the decoder layers, by a convention; not scaled to tera.

    With n tokens in a layer, hidden size d and intermediate size m, per layer:

    * `"pyramiddrop"`: 4nd² + 2n²d + 3ndm (arXiv 2410.17247, §3.3; SparseVLM counts the same),
    * `"fastv"`: 4nd² + 2n²d + 2ndm (arXiv 2403.06764, §4.2; DivPrune counts the same),
    * `"exact"`: two per multiply-add of the layer that runs: with H query heads, G key-value heads
      of width E and 3 MLP matrices, 2(2ndHE + 2ndGE + 3ndm) + 4n²HE, whose last term is halved
      for causal attention (flash kernels skip the upper half; others compute it).

    The papers' two count multiply-accumulates, full attention, no grouped queries; `"fastv"` counts
    two of LLaMA's three MLP matrices. None has the vocabulary projection, the scoring or the vision
    tower in it; `exact` gives the first two as terms of their own.

    Args:
        shape: The decoder.
        lengths: Visual tokens of each layer, as `Schedule.lengths` gives them.
        num_text: Text tokens beside them in every layer.
        convention: `"pyramiddrop"`, `"fastv"` or `"exact"`.
        causal: Whether `"exact"` counts half of the attention; the papers' never do.

    Raises:
        ValueError: If `lengths` does not fit the decoder, or `"exact"` does not know its layers.
        KeyError: If the convention is unknown.
    """
    check_lengths("flops", shape, lengths)
    if convention not in CONVENTIONS:
        raise unknown_name("flops.convention", convention, list(CONVENTIONS))
    if convention == "exact":
        return exact(shape, lengths, num_text, causal=causal).layers
    matrices = 3 if convention == "pyramiddrop" else 2
    d, m = shape.hidden_size, shape.intermediate_size
    total = 0.0
    for length in lengths:
        n = length + num_text
        total += 4 * n * d**2 + 2 * n**2 * d + matrices * n * d * m
    return float(total)


@dataclass(frozen=True)
class ExactFlops:
    """Terms of a call's cost, two FLOPs per multiply-add.

    Attributes:
        linear: Projections and MLPs of the layers, experts' routers included.
        attention: Queries times keys, and weights times values.
        scoring: What the strategy's attention rows take.
        vocabulary: The projection to the vocabulary.
    """

    linear: float
    attention: float
    scoring: float
    vocabulary: float

    @property
    def layers(self) -> float:
        """Cost of the decoder layers."""
        return self.linear + self.attention

    @property
    def total(self) -> float:
        """All four terms."""
        return self.layers + self.scoring + self.vocabulary


def exact(
    shape: DecoderShape,
    lengths: Sequence[int | float],
    num_text: int = 0,
    *,
    causal: bool = True,
    num_logits: int = 1,
    cuts: Sequence[int] = (),
    strategy: PruningStrategy | None = None,
    num_visual: int | None = None,
    captured: Collection[int] = (),
) -> ExactFlops:
    """Prefill cost, term by term: what the matrix products of a forward pass take.

    Norms, rotations, softmax and activations are left out, as in every FLOP counter that counts
    matrix products (`torch.utils.flop_counter`). Windows are not taken off: up to their size there
    is nothing to take.

    Args:
        shape: The decoder.
        lengths: Visual tokens of each layer.
        num_text: Text tokens beside them in every layer.
        causal: Counts attention as half, n²/2 pairs; False counts all pairs, as counters do.
        num_logits: Rows projected to the vocabulary: 1 when generating, all tokens of the last
            layer in a plain forward.
        cuts: Layers of the cuts, before each of which the strategy scores.
        strategy: Whose attention rows are counted; none of them without one.
        num_visual: Visual tokens before any cut; needed for a cut at layer 0, else `lengths[0]`.
        captured: Cuts whose scores come from the layer's own code (see `scoring_flops`).

    Raises:
        ValueError: If `lengths` does not fit the decoder, or the formula not its layers.
    """
    check_lengths("exact", shape, lengths)
    check_layers(shape)
    before = [lengths[0] if num_visual is None else num_visual, *lengths]
    totals = [length + num_text for length in lengths]
    return ExactFlops(
        linear=float(2 * sum(totals) * _linear(shape)),
        attention=float(
            (2 if causal else 4) * sum(n**2 for n in totals) * shape.num_heads * shape.head_dim
        ),
        scoring=float(
            sum(
                rows_flops(shape, strategy.at(i), before[cut], num_text, cut in captured)
                for i, cut in enumerate(cuts)
            )
            if strategy is not None
            else 0
        ),
        vocabulary=float(2 * num_logits * shape.hidden_size * shape.vocab_size),
    )


def rows_flops(
    shape: DecoderShape,
    strategy: PruningStrategy,
    num_visual: float,
    num_text: float,
    captured: bool = False,
) -> float:
    """What all attention rows take that a cut's strategy asks for.

    Args:
        shape: The decoder.
        strategy: The cut's.
        num_visual: Visual tokens before the cut.
        num_text: Text tokens beside them.
        captured: See `scoring_flops`.
    """
    requests, num_tokens = decoder_rows(strategy), num_visual + num_text
    return sum(
        (scoring_flops(shape, num_tokens, own.queries, captured, num_text) for own in requests), 0.0
    )


def scoring_flops(
    shape: DecoderShape,
    num_tokens: float,
    queries: str = "last",
    captured: bool = False,
    num_text: float = 0,
) -> float:
    """What one cut's attention rows take, with n tokens before the cut and q rows that ask.

    The engine makes queries of the asked rows and keys of all tokens, one row of logits per asked
    row over all keys, and, of several rows, their mean: 2(qdHE + ndGE + qnHE + qnH), the last term
    only for q > 1; text rows are not averaged. The rows are whole whether attention is causal or
    not. A layer unlike LLaMA's is "captured": its own code runs up to the attention kernel, so
    queries, keys and values of all tokens: 2(ndHE + 2ndGE + qnHE + qnH). The first time that a
    layer is asked, and again when a call is twice as long as any before, both are run, to choose.

    Args:
        shape: The decoder.
        num_tokens: Visual and text tokens before the cut.
        queries: `"last"`, one row, `"all"`, every token, or `"text"`, every text token.
        captured: Whether the layer's own code is run.
        num_text: Text tokens among them.
    """
    asking = {"last": 1.0, "all": num_tokens, "text": num_text}[queries]
    wide, narrow = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    if captured:
        projections = num_tokens * (wide + 2 * narrow)
    else:
        projections = asking * wide + num_tokens * narrow
    per_key = shape.num_heads * (shape.head_dim + (1 if asking > 1 and queries == "all" else 0))
    logits = asking * num_tokens * per_key
    return float(2 * (projections * shape.hidden_size + logits))


def decode_flops(shape: DecoderShape, lengths: Sequence[int | float], num_text: int = 0) -> float:
    """Cost of generating one token, two per multiply-add, the vocabulary projection included.

    Args:
        shape: The decoder.
        lengths: Visual tokens that each layer has cached.
        num_text: Text tokens beside them, prompt and answer so far. The new token attends to all
            of them and to itself; the context is `lengths[layer] + num_text`.

    Raises:
        ValueError: If `lengths` does not fit the decoder, or the formula not its layers.
    """
    check_lengths("decode_flops", shape, lengths)
    check_layers(shape)
    keys = sum(lengths) + (num_text + 1) * shape.num_layers
    layers = 2 * shape.num_layers * _linear(shape) + 4 * keys * shape.num_heads * shape.head_dim
    return float(layers + 2 * shape.hidden_size * shape.vocab_size)


def _linear(shape: DecoderShape) -> int:
    """Multiply-adds per token of a layer's linear maps."""
    heads = 2 * shape.num_heads + 2 * shape.num_kv_heads  # queries and output, keys and values
    mlp = shape.num_matrices * shape.intermediate_size + shape.router_size
    return shape.hidden_size * (heads * shape.head_dim + mlp)
