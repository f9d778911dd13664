"""What makes published implementations slow, done on purpose: for the benchmark only.

Each way keeps the tokens that the product keeps, and does on top what released code does to find
them or beside it. `tokenprune bench prefill ways=[...]` times it in turn with the product. Every
way is at its best: maps are freed as soon as their last row is read, masks are made once per stage.

Shape suffixes: B batch rows, T positions alive, V visual tokens alive, H query heads.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from tokenprune.families.projection import QueriesAndKeys, project
from tokenprune.strategy import DecoderRows, PruningStrategy, Selection, TokenView

#: Per cut, what the last token of each row pays all others: (B, H, T), or (B, 1, T) over heads.
Rows = dict[int, Tensor]
#: Hooks on a decoder's layers around the cuts; those of `SCORES` leave rows for the strategy.
Way = Callable[[Sequence[nn.Module], Sequence[int], Rows], AbstractContextManager[None]]


@contextmanager
def eager_layer(layers: Sequence[nn.Module], cuts: Sequence[int], rows: Rows) -> Iterator[None]:
    """The layer before each cut runs eager attention, for its map; the strategy reads that.

    FastV's released code asks that layer for `output_attentions`.
    """
    handles: list[Any] = []
    configs: list[tuple[Any, Any]] = []
    try:
        for cut in cuts:
            attention: Any = layers[cut - 1].self_attn
            configs.append((attention, attention.config))
            attention.config = copy.copy(attention.config)
            # Not by its setter, which reaches into configs that the copy shares.
            attention.config._attn_implementation_internal = "eager"

            def before(module: nn.Module, args: Any, kwargs: Any) -> Any:
                hidden = kwargs["hidden_states"]
                return args, kwargs | {"attention_mask": causal_mask(hidden)}

            def after(module: nn.Module, args: Any, output: Any, cut: int = cut) -> None:
                rows[cut] = output[1][:, :, -1].float().clone()

            handles.append(attention.register_forward_pre_hook(before, with_kwargs=True))
            handles.append(attention.register_forward_hook(after))
        yield
    finally:
        for attention, config in configs:
            attention.config = config
        for handle in handles:
            handle.remove()


@contextmanager
def full_maps(layers: Sequence[nn.Module], cuts: Sequence[int], rows: Rows) -> Iterator[None]:
    """Queries and keys of all tokens, projected once more, and their whole map, mean over heads.

    What code does that recomputes attention as if all rows were asked for.
    """

    def before(module: nn.Module, args: Any, kwargs: Any, cut: int) -> None:
        hidden = args[0]
        made = _project_all(module, hidden, kwargs)
        logits = made.queries @ made.keys.transpose(2, 3) * made.scaling + causal_mask(hidden)
        rows[cut] = logits.float().softmax(-1).mean(1, keepdim=True)[:, :, -1].clone()

    with _hooked([(layers[cut - 1], _with(before, cut)) for cut in cuts]):
        yield


@contextmanager
def all_projections(layers: Sequence[nn.Module], cuts: Sequence[int], rows: Rows) -> Iterator[None]:
    """Queries, keys and values of all tokens and a mask (B, 1, T, T), of which one row is read.

    PyramidDrop's released code, in `pdrop_rank_drop`.
    """

    def before(module: nn.Module, args: Any, kwargs: Any, cut: int) -> None:
        hidden = args[0].clone()
        made = _project_all(module, hidden, kwargs)
        module.self_attn.v_proj(hidden)  # type: ignore[operator, union-attr]
        logits = made.queries[:, :, -1:] @ made.keys.transpose(2, 3) * made.scaling
        rows[cut] = (logits + causal_mask(hidden)[:, :, -1:]).float().softmax(-1)[:, :, 0]

    with _hooked([(layers[cut - 1], _with(before, cut)) for cut in cuts]):
        yield


@contextmanager
def dense_masks(layers: Sequence[nn.Module], cuts: Sequence[int], rows: Rows) -> Iterator[None]:
    """Every stage gets a float mask (B, 1, T, T), so that sdpa leaves its causal kernel.

    FastV's released code for transformers makes it for the layers before its cut and anew for those
    after it, whatever the attention implementation.
    """
    masks: list[Tensor] = []

    def before(module: nn.Module, args: Any, kwargs: Any, index: int) -> Any:
        if index == 0 or index in cuts:
            masks[:] = [causal_mask(args[0])]
        return args, kwargs | {"attention_mask": masks[0]}

    with _hooked([(layer, _with(before, index)) for index, layer in enumerate(layers)]):
        yield


@contextmanager
def cached_twice(layers: Sequence[nn.Module], cuts: Sequence[int], rows: Rows) -> Iterator[None]:
    """The layer before each cut runs a second time with the same cache, which keeps both.

    FastV's released file for lmms-eval, and collections of methods after it, whose first run is
    eager, for its map. Here both run sdpa, and what the second returns is dropped.
    """

    def after(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        type(module).forward(module, *args, **kwargs)

    handles = [layers[cut - 1].register_forward_hook(after, with_kwargs=True) for cut in cuts]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


WAYS: dict[str, Way] = {
    way.__name__: way
    for way in (eager_layer, full_maps, all_projections, dense_masks, cached_twice)
}
#: Ways that find the scores themselves, in the layer before the cut.
SCORES = ("eager_layer", "full_maps", "all_projections")


def check(names: Sequence[str], strategy: PruningStrategy, attention: str) -> None:
    """Whether a strategy can be run in these ways.

    Raises:
        ValueError: If not, or if a name is unknown.
    """
    if isinstance(names, str) or not isinstance(names, Sequence):
        raise ValueError(f"ways: expected a list, got {names!r}. Set ways=[{names or ''}].")
    for name in names:
        if name not in WAYS:
            raise ValueError(
                f"ways: expected some of {list(WAYS)}, got {name!r}. Set ways=[{next(iter(WAYS))}]."
            )
    if len(set(names)) < len(names):
        raise ValueError(f"ways: expected each once, got {list(names)}. Name each once.")
    if names and attention != "sdpa":
        raise ValueError(
            f"ways: expected attention=sdpa, whose fast path they leave, got {attention!r}. "
            "Set attention=sdpa."
        )
    asked = DecoderRows("last", "previous")
    if any(name in SCORES for name in names) and strategy.needs() != (asked,):
        raise ValueError(
            f"ways: expected a strategy that reads the last row of the layer before the cut, for "
            f"{' and '.join(SCORES)}, got {strategy}. Set strategy=pyramiddrop "
            "strategy.source=previous."
        )


@dataclass(frozen=True)
class FromRows(PruningStrategy):
    """A strategy's own choice, its attention read from rows that a way has left.

    Attributes:
        own: The strategy.
        first: Column of the first visual token; the others follow it.
        rows: What the way leaves, by cut.
    """

    own: PruningStrategy
    first: int
    rows: Rows = field(default_factory=dict, compare=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "keeps_exactly", self.own.keeps_exactly)

    def select(self, view: TokenView, keep: Tensor) -> Selection:
        num_visual = view.valid.shape[1]
        row = self.rows.pop(view.layer)[:, :, self.first : self.first + num_visual]
        return self.own.select(replace(view, _signal=lambda _: row), keep)


def causal_mask(hidden: Tensor) -> Tensor:
    """An additive mask (B, 1, T, T) for hidden states (B, T, D)."""
    num_rows, length = hidden.shape[:2]
    low = torch.finfo(hidden.dtype).min
    mask = torch.full((length, length), low, dtype=hidden.dtype, device=hidden.device).triu_(1)
    # As many copies as rows: that is what is handed to each layer.
    return mask.repeat(num_rows, 1, 1, 1)


def _project_all(layer: nn.Module, hidden: Tensor, named: Any) -> QueriesAndKeys:
    """Queries and keys of all tokens, (B, H, T, E) each, as `repeat_kv` makes them."""
    every = torch.arange(hidden.shape[1], device=hidden.device).expand(len(hidden), -1)
    with torch.no_grad():
        made = project(layer, hidden, every, named)
        groups = made.queries.shape[1] // made.keys.shape[1]
        return replace(made, keys=made.keys.repeat_interleave(groups, 1))


def _with(hook: Callable[..., Any], number: int) -> Callable[..., Any]:
    return lambda module, args, kwargs: hook(module, args, kwargs, number)


@contextmanager
def _hooked(hooks: Sequence[tuple[nn.Module, Callable[..., Any]]]) -> Iterator[None]:
    handles = [module.register_forward_pre_hook(hook, with_kwargs=True) for module, hook in hooks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
