"""What a schedule costs: FLOPs, key-value bytes, tokens per layer. Pure arithmetic, no model code.

Papers count multiply-accumulates and call them FLOPs; `flops` follows each paper's convention, and
its docstring says which. The convention `"exact"` counts what a kernel does, two per multiply-add,
and equals `torch.utils.flop_counter.FlopCounterMode` on real forwards (tests/test_cost.py).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tokenprune.strategy import AttentionRows, unknown_name

CONVENTIONS = ("pyramiddrop", "fastv", "exact")
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


@dataclass(frozen=True)
class DecoderShape:
    """The sizes of a decoder that its cost depends on.

    Attributes:
        num_layers: Decoder layers.
        hidden_size: Width of the hidden states.
        intermediate_size: Inner width of the MLP; of a mixture of experts, the widths that one
            token passes through, together.
        num_heads: Query heads.
        num_kv_heads: Key and value heads; fewer than `num_heads` where queries are grouped.
        head_dim: Width of a head.
        vocab_size: Rows of the vocabulary projection.
        num_matrices: Matrices of the MLP: 3 with a gate (LLaMA), 2 without (OPT).
        router_size: Scores that a mixture of experts makes per token; 0 without one.
        unlike: What of the layers the formula of `"exact"` does not know; empty if nothing.
    """

    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    num_matrices: int = 3
    router_size: int = 0
    unlike: str = ""

    @property
    def caches_alike(self) -> bool:
        """Whether every layer caches `num_kv_heads` x `head_dim` keys, and so many values."""
        return self.unlike not in _CACHED_OTHERWISE

    @classmethod
    def from_config(cls, config: Any) -> DecoderShape:
        """Reads the text part of any Hugging Face config.

        Raises:
            ValueError: If the config lacks one of the sizes.
        """
        text = _text(config)
        heads = _first(text, "num_attention_heads", "n_heads", "decoder_attention_heads")
        hidden = _first(text, "hidden_size", "d_model", "n_embd")
        inner = _first(text, "intermediate_size", "ffn_dim", "ffn_hidden_size", "d_ff", "n_inner")
        found = {
            "num_hidden_layers": _first(text, "num_hidden_layers", "num_layers", "n_layers"),
            "hidden_size": hidden,
            "intermediate_size": inner,
            "num_attention_heads": heads,
            "vocab_size": _first(text, "vocab_size"),
        }
        missing = [name for name, value in found.items() if not isinstance(value, int)]
        if missing:
            raise ValueError(
                f"DecoderShape.from_config: expected a decoder config, got "
                f"{type(config).__name__} without {missing[0]}. Give the sizes by hand."
            )
        routed, active = _experts(text)
        return cls(
            num_layers=found["num_hidden_layers"],
            hidden_size=hidden,
            intermediate_size=active or inner,
            num_heads=heads,
            num_kv_heads=_first(text, "num_key_value_heads", "num_kv_heads") or heads,
            head_dim=_first(text, "head_dim") or hidden // heads,
            vocab_size=found["vocab_size"],
            num_matrices=2 if getattr(text, "model_type", "") in _UNGATED else 3,
            router_size=routed,
            unlike=_unlike(text),
        )

    @classmethod
    def preset(cls, name: str) -> DecoderShape:
        """The decoder of a published model, by its name in `PRESETS` or its Hub id.

        Raises:
            KeyError: If the name is unknown.
        """
        return find_preset(name).shape


_LATENT, _GAPS, _SIZES = "latent attention", "layers without attention", "layers of several sizes"
_CACHED_OTHERWISE = (_LATENT, _GAPS, _SIZES)
#: Text models whose MLP has no gate: two matrices.
_UNGATED = {
    *("opt", "kosmos_2_text_model", "kosmos_2_5_text_model", "gpt2", "gpt_neox", "phi"),
    *("persimmon", "starcoder2", "bloom", "falcon", "mpt", "gpt_neo", "gptj", "cosmos3_edge_text"),
}
#: Text models with maps that no size in their config shows.
_WITH_MORE = {
    "muse_glimmer_text": "a gate on the attention",
    "muse_spark_text": "a gate on the attention",
    "step3p5": "a gate on the attention",
    "minimax_m3_vl_text": "shared experts and sparse attention of their own",
}


def _text(config: Any) -> Any:
    return config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config


def _first(config: Any, *names: str) -> Any:
    """The first of the attributes that is there and not None."""
    for name in names:
        try:
            value = getattr(config, name, None)
        except RuntimeError:  # Gemma 4's differ by layer; the config's own is the usual one
            value = config.to_dict().get(name)
        if value is not None:
            return value
    return None


def _experts(text: Any) -> tuple[int, int]:
    """Of a mixture of experts: experts routed to, and inner width that a token passes through."""
    number = _first(text, "num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
    each = _first(text, "num_experts_per_tok", "moe_k", "num_experts_per_token", "moe_topk")
    size = _first(text, "moe_intermediate_size", "expert_dim", "intermediate_size")
    if not (isinstance(number, int) and isinstance(each, int) and isinstance(size, int)):
        return 0, 0
    shared = _first(text, "shared_expert_intermediate_size")
    if shared is None:
        shared = size * (_first(text, "n_shared_experts", "moe_num_shared_experts") or 0)
    return number, each * size + shared


def _unlike(text: Any) -> str:
    """What sets the layers apart from LLaMA's, as far as a config shows it."""
    if _first(text, "kv_lora_rank", "q_lora_rank"):
        return _LATENT
    if getattr(text, "model_type", "") in _WITH_MORE:
        return _WITH_MORE[text.model_type]
    kinds = set(_first(text, "layer_types") or ())
    if any("linear" in kind or "conv" in kind or "mamba" in kind for kind in kinds):
        return _GAPS
    if _first(text, "hidden_size_per_layer_input", "global_head_dim", "num_kv_shared_layers"):
        return _SIZES
    if _differs_by_layer(text):
        return _SIZES
    mixed = (
        len(set(_first(text, "mlp_layer_types") or ())) > 1
        or any(
            _first(text, name)
            for name in ("first_k_dense_replace", "mlp_only_layers", "moe_layer_start_index")
        )
        or any(
            (_first(text, name) or 1) != 1
            for name in ("decoder_sparse_step", "interleave_moe_layer_step", "moe_layer_interval")
        )
    )
    return "experts in some layers only" if mixed else ""


def _differs_by_layer(text: Any) -> bool:
    """Whether some layers have sizes of their own, which transformers keeps beside the config's.

    Gemma 4's layers of full attention: wider heads, fewer of them for keys, and no map for values.
    """
    named = text.to_dict() if hasattr(text, "to_dict") else {}
    others = named.get("per_layer_config") or {}
    own = others.values() if isinstance(others, Mapping) else others
    return any(
        isinstance(value, int) and value != named.get(name)
        for sizes in own
        for name, value in (sizes or {}).items()
    )


# ----------------------------------------------------------------------------- published models


@dataclass(frozen=True)
class Preset:
    """A published model.

    Attributes:
        shape: Its decoder.
        num_visual: Visual tokens of one image at the size that papers report; None where the image
            decides. LLaVA-NeXT's newline tokens, up to 48 more in transformers, are not in it.
        hub_ids: Checkpoints with these sizes.
    """

    shape: DecoderShape
    num_visual: int | None
    hub_ids: tuple[str, ...] = ()


# Vicuna and Mistral have 32 000 tokens; transformers' conversions pad them to 32 064.
_VICUNA_7B = DecoderShape(32, 4096, 11008, 32, 32, 128, 32064)
_VICUNA_13B = DecoderShape(40, 5120, 13824, 40, 40, 128, 32064)
_MISTRAL_7B = DecoderShape(32, 4096, 14336, 32, 8, 128, 32064)
_QWEN2_7B = DecoderShape(28, 3584, 18944, 28, 4, 128, 152064)

#: Published models by name; sizes from their config.json.
PRESETS: Mapping[str, Preset] = {
    "llava-1.5-7b": Preset(_VICUNA_7B, 576, ("llava-hf/llava-1.5-7b-hf",)),
    "llava-1.5-13b": Preset(_VICUNA_13B, 576, ("llava-hf/llava-1.5-13b-hf",)),
    "llava-next-7b": Preset(_VICUNA_7B, 2880, ("llava-hf/llava-v1.6-vicuna-7b-hf",)),
    "llava-next-13b": Preset(_VICUNA_13B, 2880, ("llava-hf/llava-v1.6-vicuna-13b-hf",)),
    "llava-next-mistral-7b": Preset(_MISTRAL_7B, 2880, ("llava-hf/llava-v1.6-mistral-7b-hf",)),
    "video-llava-7b": Preset(_VICUNA_7B, 2048, ("LanguageBind/Video-LLaVA-7B-hf",)),
    "qwen2-vl-2b": Preset(
        DecoderShape(28, 1536, 8960, 12, 2, 128, 151936), None, ("Qwen/Qwen2-VL-2B-Instruct",)
    ),
    "qwen2-vl-7b": Preset(_QWEN2_7B, None, ("Qwen/Qwen2-VL-7B-Instruct",)),
    "qwen2.5-vl-3b": Preset(
        DecoderShape(36, 2048, 11008, 16, 2, 128, 151936), None, ("Qwen/Qwen2.5-VL-3B-Instruct",)
    ),
    "qwen2.5-vl-7b": Preset(_QWEN2_7B, None, ("Qwen/Qwen2.5-VL-7B-Instruct",)),
    "qwen2.5-vl-72b": Preset(
        DecoderShape(80, 8192, 29568, 64, 8, 128, 152064), None, ("Qwen/Qwen2.5-VL-72B-Instruct",)
    ),
    "qwen3-vl-4b": Preset(
        DecoderShape(36, 2560, 9728, 32, 8, 128, 151936), None, ("Qwen/Qwen3-VL-4B-Instruct",)
    ),
    "qwen3-vl-8b": Preset(
        DecoderShape(36, 4096, 12288, 32, 8, 128, 151936), None, ("Qwen/Qwen3-VL-8B-Instruct",)
    ),
}


def find_preset(name: str) -> Preset:
    """A published model by its name in `PRESETS` or its Hub id.

    Raises:
        KeyError: If there is none.
    """
    for known, preset in PRESETS.items():
        if name == known or name in preset.hub_ids:
            return preset
    raise unknown_name("cost.preset", name, list(PRESETS))


def visual_tokens(config: Any) -> int | None:
    """Visual tokens of one image at the size that a Hugging Face config names.

    LLaVA: the patches of its vision tower. LLaVA-NeXT: the largest grid of tiles and the whole
    image, (2 x 2 + 1) x 576, as papers count it, without the newline token of each row. Of larger
    grids LLaVA-OneVision keeps as many tokens as N tiles have, with `anyres_max_N`.

    Returns:
        None where the image decides (Qwen-VL, Pixtral) or the config does not say.
    """
    fixed = _first(config, "mm_tokens_per_image", "num_query_tokens")
    if isinstance(fixed, int):
        return fixed
    vision = getattr(config, "vision_config", None)
    size, patch = (
        value[0] if isinstance(value, list | tuple) and value else value  # InternVL's are pairs
        for value in (_first(vision, "image_size"), _first(vision, "patch_size"))
    )
    kind = str(getattr(vision, "model_type", ""))
    if (
        kind.startswith(("qwen", "pixtral"))
        or not isinstance(size, int)
        or not isinstance(patch, int)
    ):
        return None
    ratio, factor = _first(config, "downsample_ratio"), _first(config, "scale_factor")
    per_tile = (size // patch) ** 2
    if ratio is not None:  # InternVL's pixel shuffle
        per_tile = int(per_tile * ratio**2)
    elif isinstance(factor, int):  # Idefics 3's
        per_tile //= factor**2
    if _first(config, "vision_feature_select_strategy") == "full" and "clip" in kind:
        per_tile += 1  # the class token
    grids = _first(config, "image_grid_pinpoints") or [[0, 0]]
    most = max((height // size) * (width // size) for height, width in grids)
    start, _, limit = str(getattr(config, "vision_aspect_ratio", "")).rpartition("_")
    if start == "anyres_max" and limit.isdigit():
        most = min(most, int(limit))
    return per_tile * (most + 1) if most else per_tile


# ------------------------------------------------------------------------------------------ FLOPs


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
    _check_lengths("flops", shape, lengths)
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
    rows: Iterable[AttentionRows] = (),
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
        rows: Attention that the strategy asks for at each cut, `strategy.attention_rows()`.
        num_visual: Visual tokens before any cut; needed for a cut at layer 0, else `lengths[0]`.
        captured: Cuts whose scores come from the layer's own code (see `scoring_flops`).

    Raises:
        ValueError: If `lengths` does not fit the decoder, or the formula not its layers.
    """
    _check_lengths("exact", shape, lengths)
    _check_layers(shape)
    before = [lengths[0] if num_visual is None else num_visual, *lengths]
    requests = tuple(rows)
    totals = [length + num_text for length in lengths]
    return ExactFlops(
        linear=float(2 * sum(totals) * _linear(shape)),
        attention=float(
            (2 if causal else 4) * sum(n**2 for n in totals) * shape.num_heads * shape.head_dim
        ),
        scoring=float(
            sum(
                scoring_flops(shape, before[cut] + num_text, request.queries, cut in captured)
                for cut in cuts
                for request in requests
            )
        ),
        vocabulary=float(2 * num_logits * shape.hidden_size * shape.vocab_size),
    )


def scoring_flops(
    shape: DecoderShape, num_tokens: float, queries: str = "last", captured: bool = False
) -> float:
    """What one cut's attention rows take, with n tokens before the cut and q rows that ask.

    The engine makes queries of the asked rows and keys of all tokens, one row of logits per asked
    row over all keys, and, of several rows, their mean: 2(qdHE + ndGE + qnHE + qnH), the last term
    only for q > 1. The rows are whole whether attention is causal or not. A layer unlike LLaMA's
    is "captured": its own code runs up to the attention kernel, so queries, keys and values of all
    tokens: 2(ndHE + 2ndGE + qnHE + qnH). The first time that a layer is asked, and again when a
    call is twice as long as any before, both are run, to choose.

    Args:
        shape: The decoder.
        num_tokens: Visual and text tokens before the cut.
        queries: `"last"`, one row, or `"all"`, every token.
        captured: Whether the layer's own code is run.
    """
    asking = num_tokens if queries == "all" else 1
    wide, narrow = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    if captured:
        projections = num_tokens * (wide + 2 * narrow)
    else:
        projections = asking * wide + num_tokens * narrow
    per_key = shape.num_heads * (shape.head_dim + (1 if asking > 1 else 0))
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
    _check_lengths("decode_flops", shape, lengths)
    _check_layers(shape)
    keys = sum(lengths) + (num_text + 1) * shape.num_layers
    layers = 2 * shape.num_layers * _linear(shape) + 4 * keys * shape.num_heads * shape.head_dim
    return float(layers + 2 * shape.hidden_size * shape.vocab_size)


def _linear(shape: DecoderShape) -> int:
    """Multiply-adds per token of a layer's linear maps."""
    heads = 2 * shape.num_heads + 2 * shape.num_kv_heads  # queries and output, keys and values
    mlp = shape.num_matrices * shape.intermediate_size + shape.router_size
    return shape.hidden_size * (heads * shape.head_dim + mlp)


# ------------------------------------------------------------------------------- tokens and bytes


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
    _check_lengths("kv_bytes", shape, lengths)
    if not shape.caches_alike:
        raise ValueError(
            f"cost.kv_bytes: expected layers that cache keys and values of one size, got "
            f"{shape.unlike}. Add up what the model's own cache holds."
        )
    tokens = sum(lengths) + num_text * shape.num_layers
    size = bytes_per_value if dtype is None else dtype_bytes(dtype)
    return 2 * tokens * shape.num_kv_heads * shape.head_dim * size


def _check_lengths(where: str, shape: DecoderShape, lengths: Sequence[int | float]) -> None:
    if len(lengths) != shape.num_layers or any(length < 0 for length in lengths):
        raise ValueError(
            f"{where}.lengths: expected {shape.num_layers} counts >= 0, one per layer, got "
            f"{len(lengths)}: {list(lengths)}. Use Schedule.lengths."
        )


def _check_layers(shape: DecoderShape) -> None:
    if shape.unlike:
        raise ValueError(
            f"cost.exact: expected decoder layers of one size like LLaMA's, got {shape.unlike}. "
            'Use the convention "pyramiddrop", or count with torch.utils.flop_counter.'
        )
