"""What the modules of a decoder compute with, apart from what a call brings: in one walk over them.

Two calls on which it is the same launch the same on the same weights, as far as modules decide.
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as torch_module

#: What each module has; the rest is its own.
_ANY = frozenset(vars(nn.Module()))
_PLAIN = (bool, int, float, str, type(None), torch.dtype)
_TABLES = ("_parameters", "_buffers")
#: Where transformers has hooks by which it collects hidden states and attention weights.
_OUTPUTS = "transformers.utils.output_capturing"
_HOOKS = ("_forward_pre_hooks", "_forward_hooks")


@dataclass(frozen=True)
class Modules:
    """What was found.

    Attributes:
        state: Weights by address, shape and kind, settings, adapters; to be compared and hashed.
        devices: Of the weights.
        addressed: Whether all weights have an address of their own.
        heard: Whether others have hooks inside the decoder.
    """

    state: tuple[Any, ...]
    devices: frozenset[torch.device]
    addressed: bool
    heard: bool


def walk(decoder: nn.Module, hooks: Collection[int]) -> Modules:
    """Looks at a decoder and its parts.

    Args:
        decoder: The decoder.
        hooks: Those that do not count, by their numbers.
    """
    found: list[Any] = [*_plain(vars(getattr(decoder, "config", object)))]
    devices, addressed = set(), True
    heard = bool(torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks)
    for module in decoder.modules():
        own = vars(module)
        found += [id(module), own["training"]]
        for table in _TABLES:
            for tensor in own[table].values():
                if tensor is None:
                    continue
                address = tensor.data_ptr()
                addressed &= address != 0 or tensor.numel() == 0
                devices.add(tensor.device)
                found += [address, tensor.shape, tensor.dtype]
        for name, value in own.items():
            if name not in _ANY and (name != "forward" or module is not decoder):
                found += _plain(value) if name != "forward" else [value]
        if module is not decoder:
            numbers = [number for table in _HOOKS for number in own[table] if number not in hooks]
            heard = heard or any(map(_is_others, _hooks(own, numbers)))
    return Modules(tuple(found), frozenset(devices), addressed, heard)


def _plain(values: Any) -> Iterator[Any]:
    """Plain values wherever they stand, as the settings of an adapter do."""
    if isinstance(values, _PLAIN):
        yield values
    elif isinstance(values, (list, tuple)):
        for own in values:
            yield from _plain(own)
    elif isinstance(values, dict):
        for name, own in values.items():
            yield name
            yield from _plain(own)


def _hooks(own: dict[str, Any], numbers: Collection[int]) -> Iterator[Any]:
    for table in _HOOKS:
        yield from (hook for number, hook in own[table].items() if number in numbers)


def _is_others(hook: Any) -> bool:
    """Whether a hook is not one that transformers leaves for outputs, deaf until it is asked."""
    known = sys.modules.get(_OUTPUTS)
    if known is None or getattr(hook, "__module__", None) != _OUTPUTS:
        return True
    collector: Any = vars(known).get("_active_collector")
    return collector is None or bool(collector.get())
