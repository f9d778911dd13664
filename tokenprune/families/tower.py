"""What the engine must know of a family's vision tower, and the forms of a tower's attention.

Shape suffixes: N sequences that attend to themselves (tiles, frames, windows), L positions of one,
P patches, H heads, E head dimension, C channels, T visual tokens, K patches of a token.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True, eq=False)
class Patches:
    """Which patches of the tower make up each visual token.

    Attributes:
        index: int64 (T, K), numbers of patches; -1 for none.
        shares: float32 (T, K), of each patch in its token; None for equal ones.
    """

    index: Tensor
    shares: Tensor | None = None


#: (base model, arguments of the call that made features, numbers of the patches (N, L) as the tower
#: ran them, -1 for class tokens) -> the patches of each visual token, in the order of the features.
PatchMap = Callable[[Any, Mapping[str, Any], Tensor], Patches]


@dataclass(frozen=True)
class Tower:
    """Where a family's vision tower is, the form of its attention, and what its patches become.

    Attributes:
        path: Of the tower in the base model, the one that has `get_image_features`.
        patches: Says which patches make up each visual token.
        attention: Name of a layer's attention.
        queries: Name of what gives an attention's queries.
        keys: Name of what gives its keys; the same name where one projection gives queries, keys
            and values, (P, 3 * C), of a packed sequence, whose runs `cu_seqlens` says.
        frames: Of the arguments: the image or frame of each patch, numbered from 0, int64 (P,), in
            the tower's order; for towers that pack them into one sequence.
        projector: Path in the base model of what projects a patch to a token, if there is one.
    """

    path: str
    patches: PatchMap
    attention: str = "self_attn"
    queries: str = "q_proj"
    keys: str = "k_proj"
    frames: Callable[[Mapping[str, Any]], Tensor] | None = None
    projector: str | None = None

    @property
    def is_fused(self) -> bool:
        """Whether one projection gives queries, keys and values of packed sequences."""
        return self.queries == self.keys


@dataclass(frozen=True, eq=False)
class VisionParts:
    """The vision tower of one model.

    Attributes:
        tower: What is known of the family's.
        base: The model that has `get_image_features`.
        layers: The tower's layers.
        num_class: Class tokens in front of the patches.
    """

    tower: Tower
    base: nn.Module
    layers: tuple[nn.Module, ...]
    num_class: int

    @property
    def projector(self) -> nn.Module | None:
        """What projects a patch to a token; None where several become one, or none is known."""
        path = self.tower.projector
        return None if path is None else self.base.get_submodule(path)

    def attention(self, layer: int) -> Any:
        """The attention module of a layer."""
        return getattr(self.layers[layer], self.tower.attention)


def find_tower(tower: Tower, base: nn.Module) -> VisionParts | None:
    """The parts of a model's tower; None where they are others than the family's usual ones."""
    module: Any = base
    for name in tower.path.split("."):
        module = getattr(module, name, None)
    if not isinstance(module, nn.Module):
        return None
    lists = (part for part in module.modules() if isinstance(part, nn.ModuleList) and len(part))
    layers = next((part for part in lists if hasattr(part[0], tower.attention)), None)
    if layers is None:
        return None
    attention = getattr(layers[0], tower.attention)
    if not all(hasattr(attention, name) for name in (tower.queries, tower.keys, "num_heads")):
        return None
    names = {name.rpartition(".")[2] for name, _ in module.named_parameters()}
    if "register_tokens" in names:
        return None
    return VisionParts(tower, base, tuple(layers), int(bool(names & _CLASS_TOKENS)))


def num_tokens(features: Any) -> int:
    """Visual tokens in what `get_image_features` returned: one tensor, or one an image."""
    made = features.pooler_output if hasattr(features, "pooler_output") else features
    parts = [made] if isinstance(made, Tensor) else made
    return sum(part.shape[:-1].numel() for part in parts)


#: Names that transformers gives the parameter of a class token.
_CLASS_TOKENS = {"class_embedding", "cls_token"}


@dataclass(frozen=True, eq=False)
class Attending:
    """What a tower's attention weights are made of.

    Attributes:
        queries: (N, H, L, E).
        keys: (N, H, L, E).
        valid: Bool (N, L), which positions are no padding; None for all.
        scaling: Factor on the logits.
        packed: Whether the tower itself has no padding, so that what is one is no patch.
    """

    queries: Tensor
    keys: Tensor
    valid: Tensor | None
    scaling: float
    packed: bool = False

    def as_one_head(self) -> Attending:
        """The same with all heads side by side as one."""
        queries, keys = (
            heads.transpose(1, 2).flatten(2)[:, None] for heads in (self.queries, self.keys)
        )
        return replace(self, queries=queries, keys=keys, scaling=keys.shape[-1] ** -0.5)


def separate(attention: Any, queries: Tensor, keys: Tensor, valid: Tensor | None) -> Attending:
    """Of projections (N, L, C): each sequence attends to all of its own positions.

    Args:
        attention: The module.
        queries: What its projection gave.
        keys: What its projection gave.
        valid: Bool (N, L), positions that are no padding; None for all.
    """

    def heads(values: Tensor) -> Tensor:  # (N, L, H * E) -> (N, H, L, E)
        return values.view(*values.shape[:2], attention.num_heads, -1).transpose(1, 2)

    return Attending(heads(queries), heads(keys), valid, attention.scale)


def fused(attention: Any, projected: Tensor, named: Mapping[str, Any]) -> Attending:
    """Of one projection (P, 3 * C) of packed sequences: each run attends to itself, rotated.

    Args:
        attention: The module.
        projected: What its projection gave.
        named: Its other arguments.
    """
    split = projected.view(len(projected), 3, attention.num_heads, -1)  # (P, 3, H, E)
    queries, keys = split[:, 0], split[:, 1]
    rotate = sys.modules[type(attention).__module__].apply_rotary_pos_emb_vision
    queries, keys = rotate(queries, keys, *named["position_embeddings"])
    lengths = named["cu_seqlens"].diff().cpu()
    starts = lengths.cumsum(0) - lengths
    order_L = torch.arange(int(lengths.max()))
    index_NL = (starts[:, None] + order_L).clamp_max(len(queries) - 1).to(queries.device)

    def runs(values: Tensor) -> Tensor:  # (P, H, E) -> (N, H, L, E)
        return values[index_NL].transpose(1, 2)

    valid = None
    if bool((lengths != lengths[0]).any()):
        valid = (order_L < lengths[:, None]).to(queries.device)
    return Attending(runs(queries), runs(keys), valid, attention.scaling, packed=True)
