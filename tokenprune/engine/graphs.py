"""Work on a GPU that is recorded once by kind, and from then on replayed as one launch.

At batch 1 a GPU runs the layers of a pruned prefill faster than the host can launch them. A CUDA
graph replays what a call has launched, on the tensors that it was launched on: what a call is given
is copied to where the graph reads it, and what it made is copied out.
"""

from __future__ import annotations

import threading
import warnings
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tokenprune.engine.trees import exchanged, tensors

#: Operations whose result is a number, or as large as one, that only the device knows.
_READS = {
    *("_local_scalar_dense", "item", "is_nonzero", "equal", "nonzero", "masked_select"),
    *("_unique2", "unique_dim", "unique_consecutive", "bincount", "repeat_interleave"),
}
_INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_"}
_COPIES = {"_to_copy", "copy_"}
#: Of work that fills given tensors: what it made, and what makes it anew in the same place.
Recording = tuple[Any, Callable[[], None]]


class NotRecorded(Exception):
    """Why a call cannot be recorded; it then runs as always."""


@dataclass(frozen=True, eq=False)
class _Graph:
    """Work that was recorded.

    Attributes:
        given: What it reads, in the order of `trees.tensors`.
        fixed: What it reads besides.
        made: What it makes, a tree.
        replay: Makes it anew.
        owner: Whose work it is, by its `id`.
    """

    given: list[Tensor]
    fixed: Any
    made: Any
    replay: Callable[[], None]
    owner: int


class Graphs:
    """CUDA graphs of prefills, kept beyond the `prune` that made them: `prune(..., graphs=graphs)`.

    The second call of a kind is recorded, and further ones replay it: of the same numbers of
    tokens, images in the same columns, on the same weights. Results are those of a call that runs;
    a call that cannot be recorded runs, and one warning says why. Threads take turns. Strategies
    are told apart by `==`: one that is changed in place is taken for what it was.

    Args:
        most: How many are kept; the one that was not used for longest makes room. Each has what
            its prefill is given and what it makes, keys and values above all; what it needs on
            the way they share. A model that is gone takes its graphs along.
    """

    def __init__(self, most: int = 8) -> None:
        if isinstance(most, bool) or not isinstance(most, int) or most < 1:
            raise ValueError(
                f"Graphs: expected a number of graphs, 1 or more, got {most!r}. Write Graphs(8)."
            )
        self.most = most
        self._known: OrderedDict[Hashable, _Graph] = OrderedDict()
        #: Kinds that were met: whether the next call of one may be recorded; not if one failed.
        self._met: OrderedDict[Hashable, bool] = OrderedDict()
        self._owners: dict[int, weakref.finalize[Any, Any]] = {}
        self._lock = threading.RLock()
        self._memory: dict[torch.device, Any] = {}
        self._streams: dict[torch.device, Any] = {}
        self._latest: dict[torch.device, Any] = {}
        #: Calls that were replayed.
        self.replays = 0
        #: Why others were not recorded.
        self.told: list[str] = []

    def __len__(self) -> int:
        return len(self._known)

    def clear(self) -> None:
        """Forgets all graphs; their memory is torch's again."""
        with self._lock:
            self._known.clear()
            self._met.clear()
            self._memory.clear()

    def replay(
        self,
        kind: Hashable,
        given: Any,
        fixed: Callable[[], Any],
        work: Callable[[Any, Any], Any],
        owner: Any,
    ) -> Any | None:
        """What some work makes, from a graph; None if it has to be run.

        Args:
            kind: All that the work depends on but the numbers in the given tensors.
            given: A tree of what it reads, on one device.
            fixed: Makes what it reads besides, the same for all calls of the kind.
            work: Of both, a tree of what it makes; without looking at any number.
            owner: Whose work it is: while it lives, `kind` may name its parts by their addresses.
        """
        with self._lock:
            graph = self._known.get(kind)
            if graph is None:
                if not self._is_due(kind):
                    return None
                graph = self._record(given, fixed, work, owner)
                if graph is None:
                    return None
                while len(self._known) >= self.most:
                    self._met.pop(self._known.popitem(last=False)[0], None)
                self._known[kind], self._met[kind] = graph, True
            self._known.move_to_end(kind)
            self._follow_stream(graph.given[0].device)
            _copy(graph.given, [*tensors(given)])
            graph.replay()
            self.replays += 1
            return copied(graph.made)

    def tell(self, reason: str) -> None:
        """Warns once of why calls are not recorded."""
        if reason in self.told:
            return
        self.told.append(reason)
        warnings.warn(
            f"prune: expected prefills that can be captured as CUDA graphs, got {reason}. "
            "Such calls run as without graphs.",
            UserWarning,
            stacklevel=2,
        )

    def _is_due(self, kind: Hashable) -> bool:
        """Whether a kind was met before, and is to be recorded now; that once, if it fails."""
        due = kind in self._met and self._met[kind]
        self._met[kind] = kind not in self._met
        self._met.move_to_end(kind)
        while len(self._met) > 16 * self.most:
            self._met.popitem(last=False)
        return due

    def _record(
        self, given: Any, fixed: Callable[[], Any], work: Callable[[Any, Any], Any], owner: Any
    ) -> _Graph | None:
        own = {id(tensor): tensor.clone() for tensor in tensors(given)}
        if len(devices := {tensor.device for tensor in own.values()}) != 1:
            self.tell("inputs on several devices")
            return None
        failed: list[Exception] = []

        def noting() -> Any:
            try:
                with _OnDevice():  # type: ignore[no-untyped-call]
                    return work(exchanged(given, own), reads)
            except Exception as error:  # what ends a capture too early says less
                failed.append(error)
                raise

        try:
            reads = fixed()
            made, replay = self._capture(noting, devices.pop())
        except Exception as error:
            self.tell(_reason(failed[0] if failed else error))
            return None
        self._watch(owner)
        return _Graph([own[id(each)] for each in tensors(given)], reads, made, replay, id(owner))

    def _capture(self, work: Callable[[], Any], device: torch.device) -> Recording:
        if device.type != "cuda":
            raise NotRecorded(f"a model on {device.type}")
        with torch.cuda.device(device):
            stream = self._streams.get(device) or torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            self._streams[device] = stream
            torch.cuda.synchronize(device)
            torch.cuda.empty_cache()
            graph = torch.cuda.CUDAGraph()
            # Of graphs that are all gone the memory is, too.
            alive = any(known.given[0].device == device for known in self._known.values())
            memory = self._memory.get(device) if alive else None
            with torch.cuda.stream(stream):
                # Other threads, such as those that load data, may go on meanwhile.
                graph.capture_begin(pool=memory, capture_error_mode="thread_local")
                try:
                    made = work()
                finally:
                    graph.capture_end()
            self._memory[device] = graph.pool()
        return made, graph.replay

    def _follow_stream(self, device: torch.device) -> None:
        """What is copied out of a graph is copied before another stream writes there."""
        if device.type != "cuda":
            return
        stream = torch.cuda.current_stream(device)
        latest = self._latest.setdefault(device, stream)
        if latest != stream:
            stream.wait_stream(latest)
        self._latest[device] = stream

    def _watch(self, owner: Any) -> None:
        """Forgets the graphs of an owner with it: another may come to its address."""
        if id(owner) not in self._owners:
            forget = partial(_forget, weakref.ref(self), id(owner))
            self._owners[id(owner)] = weakref.finalize(owner, forget)


def _forget(graphs: weakref.ref[Graphs], owner: int) -> None:
    """Drops the graphs of an owner that is gone."""
    if (own := graphs()) is None:
        return
    with own._lock:
        own._owners.pop(owner, None)
        gone = [kind for kind, graph in own._known.items() if graph.owner == owner]
        for kind in gone:
            del own._known[kind]
        own._met.clear()


class _OnDevice(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Refuses what would wait for the device, before it spoils a capture; in this thread alone."""

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        name = function._schema.name.removeprefix("aten::")
        if name in _READS or (name in _INDEXING and any(map(_marks, args[1]))):
            raise RuntimeError(f"{name} waits for the device")
        result = function(*args, **(kwargs or {}))
        if name in _COPIES:
            pair = (args[0], args[1] if name == "copy_" else result)
            if pair[0].device != pair[1].device and pair[0].numel():
                raise RuntimeError(f"{name} from {pair[0].device} to {pair[1].device} waits for it")
        return result


def _marks(index: Any) -> bool:
    """Whether an index says of each entry whether it is meant: how many are, the device knows."""
    return isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8)


def _reason(error: Exception) -> str:
    """Why something was not recorded, in a line."""
    said = str(error).strip().partition("\n")[0].rstrip(".")
    if isinstance(error, NotRecorded):
        return said
    if isinstance(error, torch.OutOfMemoryError):
        return f"too little memory for a graph ({said})"
    return f"work that is not the device's alone ({said})"


def copied(tree: Any) -> Any:
    """A tree with copies of its tensors."""
    found = {id(tensor): tensor for tensor in tensors(tree)}
    copies = {key: torch.empty_like(tensor) for key, tensor in found.items()}
    _copy([*copies.values()], [*found.values()])
    return exchanged(tree, copies)


def _copy(to: Sequence[Tensor], given: Sequence[Tensor]) -> None:
    """Copies numbers, those of one kind in one launch."""
    by_kind: dict[torch.dtype, tuple[list[Tensor], list[Tensor]]] = {}
    for own, other in zip(to, given, strict=True):
        mine, others = by_kind.setdefault(own.dtype, ([], []))
        mine.append(own)
        others.append(other)
    for mine, others in by_kind.values():
        torch._foreach_copy_(mine, others)
