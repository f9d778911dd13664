"""What the engine must know of a family's vision tower.

Shape suffixes: N sequences that attend to themselves (tiles, frames, windows), L positions of one,
P patches, T visual tokens, K patches of a token.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from tokenprune.families.attending import Attending, Form, fused, separate


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
            and values.
        frames: Of the base model and the arguments: the image or frame of each patch, numbered from
            0, int64 (P,), in the tower's order; for towers that pack them into one sequence, whose
            runs `cu_seqlens` says, or else are the frames.
        projector: Path in the base model of what projects a patch to a token, if there is one.
        form: What its attention weights are made of; by default, of what its projections give.
        class_last: Whether a class token follows the patches instead of preceding them.
        others: Paths of further towers of the same build, which other kinds of pictures go through.
    """

    path: str
    patches: PatchMap
    attention: str = "self_attn"
    queries: str = "q_proj"
    keys: str = "k_proj"
    frames: Callable[[Any, Mapping[str, Any]], Tensor] | None = None
    projector: str | None = None
    form: Form | None = None
    class_last: bool = False
    others: tuple[str, ...] = ()

    @property
    def is_fused(self) -> bool:
        """Whether one projection gives queries, keys and values."""
        return self.queries == self.keys

    def attending(self, *heard: Any) -> Attending:
        """What an attention's weights are made of, from what a `Form` is given."""
        return (self.form or (fused if self.is_fused else separate))(*heard)


@dataclass(frozen=True, eq=False)
class VisionParts:
    """The vision tower of one model.

    Attributes:
        tower: What is known of the family's.
        base: The model that has `get_image_features`.
        layers: The tower's layers.
        others: Those of further towers.
        num_class: Class tokens beside the patches.
    """

    tower: Tower
    base: nn.Module
    layers: tuple[nn.Module, ...]
    others: tuple[tuple[nn.Module, ...], ...]
    num_class: int

    @property
    def projector(self) -> nn.Module | None:
        """What projects a patch to a token; None where several become one, or none is known."""
        path = self.tower.projector
        return None if path is None else self.base.get_submodule(path)

    def attention(self, layer: int) -> Any:
        """The attention module of a layer."""
        return getattr(self.layers[layer], self.tower.attention)

    def span(self, length: int) -> tuple[int, int]:
        """First patch, and first position after the last, of a sequence of that length."""
        if self.tower.class_last:
            return 0, length - self.num_class
        return self.num_class, length

    def class_position(self, length: int) -> int:
        """Where the class token is in a sequence of that length."""
        return length - 1 if self.tower.class_last else 0


def find_tower(tower: Tower, base: nn.Module) -> VisionParts | None:
    """The parts of a model's tower; None where they are others than the family's usual ones."""
    found = [_layers(tower, base, path) for path in (tower.path, *tower.others)]
    if not all(found):
        return None
    layers, *others = found
    names = {
        name.rpartition(".")[2] for name, _ in base.get_submodule(tower.path).named_parameters()
    }
    if "register_tokens" in names:
        return None
    return VisionParts(tower, base, layers, tuple(others), int(bool(names & _CLASS_TOKENS)))


def _layers(tower: Tower, base: nn.Module, path: str) -> tuple[nn.Module, ...]:
    """The layers of one tower; none where it is not there, or of another build."""
    module: Any = base
    for name in path.split("."):
        module = getattr(module, name, None)
    if not isinstance(module, nn.Module):
        return ()
    lists = (part for part in module.modules() if isinstance(part, nn.ModuleList) and len(part))
    layers = next((part for part in lists if hasattr(part[0], tower.attention)), None)
    if layers is None:
        return ()
    attention = getattr(layers[0], tower.attention)
    return tuple(layers) if all(hasattr(attention, n) for n in (tower.queries, tower.keys)) else ()


def num_tokens(features: Any) -> int:
    """Visual tokens in what `get_image_features` returned: one tensor, or one an image."""
    made = getattr(features, "pooler_output", None)
    if made is None:
        made = getattr(features, "last_hidden_state", features)
    parts = [made] if isinstance(made, Tensor) else made
    return sum(part.shape[:-1].numel() for part in parts)


#: Names that transformers gives the parameter of a class token.
_CLASS_TOKENS = {"class_embedding", "cls_token"}
