"""What the modules of a decoder compute with, apart from what a call brings: in one walk over them.

Two calls on which it is the same launch the same on the same weights, as far as modules decide.
"""

from __future__ import annotations

import sys
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as torch_module

#: What each module has; the rest is its own.
_ANY = frozenset(vars(nn.Module()))
_PLAIN = frozenset((bool, int, float, str, type(None), torch.dtype))
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
    found: list[Any] = []
    _note(found, vars(getattr(decoder, "config", object())))
    devices: set[torch.device] = set()
    addressed = True
    heard = bool(torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks)
    met, ahead = set(), [decoder]
    while ahead:  # by hand: `modules()` takes as long again, and a GPU waits meanwhile
        module = ahead.pop()
        if module is None or id(module) in met:
            continue
        met.add(id(module))
        own = vars(module)
        found += (id(module), own["training"])
        for table in _TABLES:
            for tensor in own[table].values():
                if tensor is None:
                    continue
                address = tensor.data_ptr()
                addressed = addressed and (address != 0 or tensor.numel() == 0)
                devices.add(tensor.device)
                found += (address, tensor.shape, tensor.dtype)
        if "forward" in own and module is not decoder:  # the decoder's leads here
            found.append(own["forward"])
        if type(module) is not nn.Linear:  # whose weights say all, and which are most
            for name, value in own.items():
                if name not in _ANY:
                    _note(found, value)
        for table in _HOOKS:
            if own[table] and module is not decoder and not heard:
                numbered = own[table].items()
                heard = any(number not in hooks and _is_others(h) for number, h in numbered)
        ahead += own["_modules"].values()
    return Modules(tuple(found), frozenset(devices), addressed, heard)


def _note(found: list[Any], values: Any) -> None:
    """Notes plain values wherever they stand, as the settings of an adapter do."""
    kind = type(values)  # to ask a config of transformers for its class takes long
    if kind in _PLAIN:
        found.append(values)
    elif kind is list or kind is tuple:
        for own in values:
            _note(found, own)
    elif kind is dict:
        for name, own in values.items():
            found.append(name)
            _note(found, own)


def _is_others(hook: Any) -> bool:
    """Whether a hook is not one that transformers leaves for outputs, deaf until it is asked."""
    known = sys.modules.get(_OUTPUTS)
    if known is None or getattr(hook, "__module__", None) != _OUTPUTS:
        return True
    collector: Any = vars(known).get("_active_collector")
    return collector is None or bool(collector.get())
