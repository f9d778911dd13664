"""How a model family departs from the ordinary layout, and the table of those that do.

A family needs an entry only where it departs: `model.get_decoder()` has `layers`, a layer attends
in `self_attn`, and the config names the placeholder ids of visual tokens.

Shape suffixes: B batch rows, T sequence positions, Q query rows, D hidden size, V visual tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor, nn

from tokenprune.families.projection import Positions, QueriesAndKeys, project
from tokenprune.families.tower import Tower

#: Places of one row's visual tokens: int64 (V, 4) of image, grid, row, column.
Places = Tensor


class Run(NamedTuple):
    """Visual tokens of one kind without text between them.

    Attributes:
        length: How many.
        is_video: Whether their placeholders are those of videos; None where the call has no ids.
    """

    length: int
    is_video: bool | None = None


#: (model config, what the call says of its images, the runs of visual tokens of each row) -> places
#: per row, or None if unknown.
Layout = Callable[[Any, Mapping[str, Any], Sequence[Sequence[Run]]], "list[Places] | None"]
#: (layer, hidden (B, T, D), asked rows, the layer's other arguments) -> queries and keys.
Project = Callable[[nn.Module, Tensor, Positions, Mapping[str, Any]], QueriesAndKeys]


@dataclass(frozen=True)
class Adapter:
    """How one model family departs from the ordinary layout.

    Attributes:
        placeholder_ids: Names of the config entries that hold the ids of visual placeholders.
        layout: Where each visual token sits in its image, if that is known.
        framing: How an image's grids lie on it, for pictures: each on all of it (`"whole"`), or a
            lone square one on its central square (`"centre"`) or on the square around it, filled up
            on both sides (`"padded"`); None if they are parts of it.
        newlines: Numbers of the grids of an image whose last column are tokens of no patch.
        project: Queries and keys of a decoder layer, for attention rows.
        decoder: Path of the module that runs the layers, where `get_decoder()` finds another.
        token_arguments: Arguments of a layer with an entry per token, and the dimension it is in.
        first_layer: First decoder layer before which tokens can be pruned.
        tower: Its vision tower, for strategies that read it.
        unread: Why that cannot be read, if so.
        refusal: Why the family cannot be pruned at all, if so.
    """

    placeholder_ids: tuple[str, ...] = (
        "image_token_id",
        "image_token_index",
        "video_token_id",
        "video_token_index",
    )
    layout: Layout | None = None
    framing: str | None = None
    newlines: tuple[int, ...] = ()
    project: Project = project
    decoder: str | None = None
    token_arguments: Mapping[str, int] = field(default_factory=dict)
    first_layer: int = 0
    tower: Tower | None = None
    unread: str | None = None
    refusal: str | None = None


ORDINARY = Adapter()
_ADAPTERS: dict[str, Adapter] = {}


def register_adapter(model_type: str, adapter: Adapter) -> None:
    """Teaches the engine a family, by its config's `model_type`.

    Raises:
        ValueError: If the family has an entry already.
    """
    if model_type in _ADAPTERS:
        raise ValueError(
            f"register_adapter: expected a new model type, got {model_type!r}. "
            "Subclass the config with a model_type of your own."
        )
    _ADAPTERS[model_type] = adapter


def adapter_of(model_type: str) -> Adapter:
    """What is known of a family, by its config's `model_type`."""
    return _ADAPTERS.get(model_type, ORDINARY)
