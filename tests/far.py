"""A device that is far away, on a machine without one: what it does, and what is asked of it.

On the host everything is at hand, and an operation that waits looks like any other. Here tensors
say that they are on torch's "meta" device, which computes nothing, and keep their numbers beside
them: an operation on them is one of the device, and what crosses between the two is seen.
"""

from __future__ import annotations

import copy
import sys
from collections import Counter
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

FAR, HOST = torch.device("meta"), torch.device("cpu")
#: Operations whose result is a number, or has a shape, that only the device knows.
READS = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "is_nonzero", "equal")


#: Operations that have one if they are given marks for indices.
INDEXING = ("index", "index_put", "index_put_", "_index_put_impl_")


class Far(Tensor):
    """A tensor of the device: `near` is what it holds."""

    near: Tensor

    @staticmethod
    def __new__(cls, near: Tensor) -> Far:
        return Tensor._make_wrapper_subclass(  # type: ignore[attr-defined,no-any-return]
            cls,
            near.shape,
            strides=near.stride(),
            storage_offset=near.storage_offset(),
            dtype=near.dtype,
            device=FAR,
        )

    def __init__(self, near: Tensor) -> None:
        self.near = near

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return run(function, args, kwargs or {})[0]

    def tolist(self):
        return self.to(HOST).tolist()

    def data_ptr(self):
        return self.near.data_ptr()

    def numpy(self, *, force=False):
        return self.to(HOST).numpy(force=force)

    @property
    def data(self):
        return self.detach()

    @data.setter
    def data(self, value):
        Tensor.data.__set__(self, value)
        self.near = value.near


def run(function: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, str]:
    """An operation's result, and what it is: "host", "view", "launch", "read" or "upload"."""
    tensors: list[Tensor] = []
    args, kwargs = swapped(args, tensors), {n: swapped(own, tensors) for n, own in kwargs.items()}
    away = [tensor.device == FAR for tensor in tensors]
    made = any(away)
    if kwargs.get("device") is not None:
        made, kwargs["device"] = torch.device(kwargs["device"]) == FAR, HOST
    result = function(*args, **kwargs)
    kind = "host"
    if any(away):
        asks = not made or function.__name__.split(".")[0] in READS
        kind = "read" if asks else "view" if is_view(function) else "launch"
        if function is torch.ops.aten.copy_.default and not all(away):
            kind = "upload" if away[0] else "read"
    elif made:
        kind = "upload" if tensors else "launch"
    if not made:
        return result, kind
    if isinstance(result, Tensor):
        written = [own for own in tensors if isinstance(own, Far) and own.near is result]
        return (written[0] if written else Far(result)), kind
    return tree_map_only(Tensor, Far, result), kind


def some(result: Any) -> bool:
    """Whether a result has any numbers."""
    tensors = result if isinstance(result, (list, tuple)) else [result]
    return any(isinstance(own, Tensor) and own.numel() for own in tensors)


def swapped(value: Any, tensors: list[Tensor]) -> Any:
    """What an operation is given, on the host; its tensors as they were are noted."""
    if isinstance(value, Tensor):
        tensors.append(value)
        return near(value)
    if isinstance(value, (list, tuple)):
        return type(value)(swapped(own, tensors) for own in value)
    return value


@cache
def is_view(function: Any) -> bool:
    """Whether an operation only looks at a tensor in another way."""
    aliases = [own.alias_info for own in function._schema.returns]
    return function is torch.ops.aten._unsafe_view.default or any(
        own is not None and not own.is_write for own in aliases
    )


def near(tensor: Tensor) -> Tensor:
    """A tensor on the host, without any notice of it."""
    if isinstance(tensor, Far):
        return tensor.near
    # What torch.tensor makes there is past every hook; the model's caches begin with nothing.
    assert tensor.device != FAR or tensor.numel() == 0, "torch.tensor(..., device=...) of numbers"
    return torch.empty(tensor.shape, dtype=tensor.dtype) if tensor.device == FAR else tensor


def far(tree: Any) -> Any:
    """Tensors on the device, wherever they stand; a module as a copy of it."""
    if not isinstance(tree, nn.Module):
        return tree_map_only(Tensor, Far, tree)
    module = copy.deepcopy(tree)
    for part in module.modules():
        for name, own in part._parameters.items():
            if own is not None:
                moved = nn.Parameter(Far(own.detach()), requires_grad=own.requires_grad)
                part._parameters[name] = moved
        for name, buffer in part._buffers.items():
            part._buffers[name] = None if buffer is None else Far(buffer)
    return module


class Device(TorchDispatchMode):
    """Notes what is asked of the device while it is entered.

    Attributes:
        launches: Operations that it runs; on nothing it runs none.
        crossings: Reads and uploads by the package, by the function of it that asks.
    """

    def __init__(self) -> None:
        super().__init__()
        self.launches = 0
        self.crossings: Counter[str] = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result, kind = run(function, args, kwargs or {})
        self.launches += kind == "launch" and some(result)
        if kind in ("read", "upload") and (where := ours()) is not None:
            self.crossings[f"{where}: {kind}"] += 1
        return result


class Tape(TorchDispatchMode):
    """Notes what the device runs while it is entered, and runs it again, as a CUDA graph does.

    Nothing may cross between device and host meanwhile. Again means: the same operations on the
    same tensors, and results where they were; the host does nothing. Of a model on the host, all
    that it computes passes for the device's, but for numbers that are read.
    """

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[tuple[Any, Any, Any, list[Tensor]]] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result, kind = run(function, args, kwargs or {})
        if kind == "host":
            reads = function.__name__.split(".")[0] in READS
            kind = "read" if reads else "view" if is_view(function) else "launch"
        if counts(function.__name__.split(".")[0], args):
            kind = "read"
        if kind in ("read", "upload"):
            raise RuntimeError(f"operation not permitted when stream is capturing: {function}")
        if kind == "launch":
            self.steps.append((function, args, kwargs or {}, tree_leaves(result)))
        return result

    def replay(self) -> None:
        with torch.autocast("cpu", enabled=False):  # what it casts was noted
            for function, args, kwargs, made in self.steps:
                found = tree_leaves(run(function, args, kwargs)[0])
                for old, new in zip(made, found, strict=True):
                    if old is not new and isinstance(old, Tensor):
                        near(old).copy_(near(new))


def counts(name: str, args: Any) -> bool:
    """Whether an operation has to count on the device how much it makes."""
    marks = (torch.bool, torch.uint8)
    of_marks = name in INDEXING and any(own is not None and own.dtype in marks for own in args[1])
    return of_marks or name == "repeat_interleave"


def capture(graphs: Any, work: Any, device: Any) -> Any:
    """In place of `Graphs._capture`, on the device that is far away."""
    tape = Tape()
    with tape:
        made = work()
    return made, tape.replay


def ours() -> str | None:
    """The function of the package that asks, if any does."""
    frame = sys._getframe()
    while frame is not None:
        if "tokenprune" in frame.f_code.co_filename and "tests" not in frame.f_code.co_filename:
            return frame.f_code.co_name
        if "transformers/models" in frame.f_code.co_filename:
            return None
        frame = frame.f_back
    return None
