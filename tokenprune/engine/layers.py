"""What happens at a decoder layer: tokens are cut, and its other arguments follow the survivors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import nn

from tokenprune.engine import late, side
from tokenprune.engine.cuts import cut, listen
from tokenprune.engine.passes import Pass
from tokenprune.engine.settings import Settings
from tokenprune.families.anatomy import device_of, has_device
from tokenprune.tensors import to_device


@dataclass(frozen=True, eq=False)
class Site:
    """A layer, and what there is to do at it.

    Attributes:
        settings: What `attach` was asked for.
        layer: Its number.
        names: Of its positional arguments.
    """

    settings: Settings
    layer: int
    names: Sequence[str]

    @cached_property
    def number(self) -> int:
        """Level that the layer runs on."""
        return self.settings.level_of[self.layer]

    @cached_property
    def cuts(self) -> bool:
        """Whether tokens are cut before it."""
        return self.layer in self.settings.cuts

    @cached_property
    def ahead(self) -> list[Any]:
        """What the cut after the layer asks of it."""
        if self.layer + 1 not in self.settings.cuts:
            return []
        asked = self.settings.requests[self.settings.cuts.index(self.layer + 1)]
        return [request for request in asked if request.source == "previous"]

    @cached_property
    def opens(self) -> bool:
        """Whether a strategy asks for what enters it, the first."""
        return self.layer == 0 and self.settings.reads_embeddings

    @cached_property
    def plain(self) -> bool:
        """Whether arguments that follow are all there is to do."""
        return not (self.cuts or self.ahead or self.opens)


def enter(
    run: Pass, site: Site, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What a layer is given, in place of what it was handed.

    Args:
        run: The pass.
        site: The layer's.
        module: The layer.
        args: What it was handed by place.
        kwargs: What it was handed by name.
    """
    number, spread = site.number, has_device(module)
    alone = len(args) == 1
    if site.plain and alone and number in run.made and run.late is None and not spread:
        return args, side.follow(run, number, module, args[0], kwargs)
    rest, named = (args, kwargs) if alone else by_name(site.names, args, kwargs)
    hidden = rest[0] if rest else named.pop("hidden_states")
    device = device_of(module, hidden)
    hidden = to_device(hidden, device)
    if run.positions is None and not run.idle:
        side.check_packed(run, named)
        side.note_positions(run, named, device, site.layer)
    if run.late is not None:
        hidden = late.add(run, run.late, number - int(site.cuts), site.layer, hidden)
    if site.opens and run.prunes and run.open:
        run.embeddings = run.apart(hidden.detach(), 0)
    if site.cuts:
        if len(run.levels) == number:
            cut(run, number, module, hidden, named)
        here = run.at(number, device)
        if here.index is not None or here.weights is not None:
            own, before = run.apart(hidden, number - 1), run.at(number - 1, device)
            hidden = run.together(here.enter(own, before, run.plan_on(device)), number)
    made = side.follow(run, number, module, hidden, named)
    if site.ahead and run.prunes and len(run.levels) == number + 1:
        listen(run, number, module, hidden, named, site.ahead, site.layer, site.layer + 1)
    # By place as they came: a reentrant checkpoint takes only those for inputs.
    places = () if rest else site.names[1 : len(args)]
    return (hidden, *rest[1:], *(made.pop(name) for name in places)), made


def by_name(
    names: Sequence[str], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional arguments that have no name, and all others by name."""
    if not args:
        return (), dict(kwargs)
    if len(args) > len(names):  # forward(*args): they stay as they are
        return args, dict(kwargs)
    return (), dict(zip(names, args, strict=False)) | dict(kwargs)
