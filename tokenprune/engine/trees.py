"""Tensors wherever they stand: in lists, dicts, dataclasses and the arguments of a `partial`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

_PLAIN = (bool, int, float, str, bytes, type(None), torch.dtype, torch.device)


def tensors(tree: Any) -> Iterator[Tensor]:
    """The tensors of a tree, those that stand in several places several times."""
    if isinstance(tree, Tensor):
        yield tree
        return
    for part in _parts(tree):
        yield from tensors(part)


def exchanged(tree: Any, others: Mapping[int, Tensor]) -> Any:
    """A tree with other tensors in place of its own; what stood twice in it is twice the same.

    Args:
        tree: Not changed.
        others: By the `id` of what they stand for; tensors that are not named stay.
    """
    made: dict[int, Any] = {}

    def of(tree: Any) -> Any:
        if isinstance(tree, Tensor):
            return others.get(id(tree), tree)
        if isinstance(tree, (list, tuple)):
            parts = map(of, tree)
            return type(tree)(*parts) if hasattr(tree, "_fields") else type(tree)(parts)
        if isinstance(tree, dict):
            return {key: of(own) for key, own in tree.items()}
        if isinstance(tree, partial):
            return partial(tree.func, *of(tree.args), **of(tree.keywords))
        if not _is_table(tree):
            return tree
        if id(tree) not in made:
            given = {f.name: of(getattr(tree, f.name)) for f in fields(tree) if f.init}
            made[id(tree)] = replace(tree, **given)
        return made[id(tree)]

    return of(tree)


def form(tree: Any) -> Any:
    """All of a tree but the numbers in its tensors, to be compared and hashed.

    Raises:
        TypeError: If there is something in it whose content cannot be told.
    """
    numbers: dict[int, int] = {}

    def of(tree: Any) -> Any:
        if isinstance(tree, Tensor):  # which of several are one and the same is part of the form
            number = numbers.setdefault(id(tree), len(numbers))
            return number, tuple(tree.shape), tree.dtype, tree.device
        if isinstance(tree, np.ndarray):
            return tree.shape, tree.dtype.str, tree.tobytes()
        if isinstance(tree, _PLAIN):
            return type(tree), tree
        if isinstance(tree, dict):
            return type(tree), *((key, of(own)) for key, own in tree.items())
        if isinstance(tree, (list, tuple)) or _is_table(tree):
            return type(tree), *map(of, _parts(tree))
        raise TypeError(f"a {type(tree).__name__}")

    return of(tree)


def _parts(tree: Any) -> Iterator[Any]:
    """What stands in a tree at its first level; nothing in a leaf."""
    if isinstance(tree, (list, tuple)):
        yield from tree
    elif isinstance(tree, dict):
        yield from tree.values()
    elif isinstance(tree, partial):
        yield from (*tree.args, *tree.keywords.values())
    elif _is_table(tree):
        yield from (getattr(tree, f.name) for f in fields(tree) if f.init)


def _is_table(value: Any) -> bool:
    return is_dataclass(value) and not isinstance(value, type)
