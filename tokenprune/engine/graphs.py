"""Work on a GPU that is recorded once by kind, and from then on replayed as one launch.

At batch 1 a GPU runs the layers of a pruned prefill faster than the host can launch them. A CUDA
graph replays what a call has launched, on the tensors that it was launched on: what a call is given
is copied to where the graph reads it, and what it made is copied out.
"""

from __future__ import annotations

import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tokenprune.engine.trees import exchanged, tensors

#: Of work that fills given tensors: what it made, and what makes it anew in the same place.
Recording = tuple[Any, Callable[[], None]]


class NotRecorded(Exception):
    """Why a call cannot be recorded; it then runs as always."""


@dataclass(frozen=True, eq=False)
class _Graph:
    """Work that was recorded.

    Attributes:
        given: What it reads, in the order of `trees.tensors`.
        made: What it makes, a tree.
        replay: Makes it anew.
        alive: What its kind names by its address.
    """

    given: list[Tensor]
    made: Any
    replay: Callable[[], None]
    alive: Any


class Graphs:
    """CUDA graphs of prefills, kept beyond the `prune` that made them: `prune(..., graphs=graphs)`.

    The second call of a kind is recorded, and further ones replay it: of the same numbers of
    tokens, images in the same columns, on the same weights. Results are those of a call that runs;
    a call that cannot be recorded runs, and one warning says why. Threads take turns.

    Args:
        most: How many are kept; the one that was not used for longest makes room. Each keeps what
            its prefill made, keys and values above all; they share the memory of everything else.
    """

    def __init__(self, most: int = 8) -> None:
        if isinstance(most, bool) or not isinstance(most, int) or most < 1:
            raise ValueError(
                f"Graphs: expected a number of graphs, 1 or more, got {most!r}. Write Graphs(8)."
            )
        self.most = most
        self._known: OrderedDict[Hashable, _Graph] = OrderedDict()
        self._met: OrderedDict[Hashable, None] = OrderedDict()
        self._lock = threading.RLock()
        self._pool: Any = None
        self._stream: Any = None
        #: Calls that were replayed.
        self.replays = 0
        #: Why others were not recorded.
        self.told: list[str] = []

    def __len__(self) -> int:
        return len(self._known)

    def clear(self) -> None:
        """Forgets all graphs, and gives their memory back."""
        with self._lock:
            self._known.clear()
            self._met.clear()
            self._pool = None

    def replay(
        self,
        kind: Hashable,
        given: Any,
        fixed: Callable[[], Any],
        work: Callable[[Any, Any], Any],
        alive: Any,
    ) -> Any | None:
        """What some work makes, from a graph; None if it has to be run.

        Args:
            kind: All that the work depends on but the numbers in the given tensors.
            given: A tree of what it reads.
            fixed: Makes what it reads besides, the same for all calls of the kind.
            work: Of both, a tree of what it makes; without looking at any number.
            alive: What must live as long as the graph.
        """
        with self._lock:
            graph = self._known.get(kind)
            if graph is None:
                if kind not in self._met:
                    self._remember(kind)
                    return None
                graph = self._record(given, fixed, work, alive)
                if graph is None:
                    return None
                while len(self._known) >= self.most:
                    self._known.popitem(last=False)
                self._known[kind] = graph
            self._known.move_to_end(kind)
            self._follow_stream()
            _copy(graph.given, [*tensors(given)])
            graph.replay()
            self.replays += 1
            return copied(graph.made)

    def tell(self, reason: str) -> None:
        """Warns once of why calls are not recorded."""
        if reason not in self.told:
            self.told.append(reason)
            warnings.warn(
                f"prune: expected prefills that can be captured as CUDA graphs, got {reason}. "
                "Such calls run as without graphs.",
                UserWarning,
                stacklevel=2,
            )

    def _remember(self, kind: Hashable) -> None:
        self._met[kind] = None
        while len(self._met) > 16 * self.most:
            self._met.popitem(last=False)

    def _record(
        self,
        given: Any,
        fixed: Callable[[], Any],
        work: Callable[[Any, Any], Any],
        alive: Any,
    ) -> _Graph | None:
        # A kind that cannot be recorded is tried again only after it was forgotten, and met anew.
        own = {id(tensor): tensor.clone() for tensor in tensors(given)}
        try:
            made, replay = self._capture(partial(work, exchanged(given, own), fixed()), own)
        except NotRecorded as reason:
            self.tell(str(reason))
            return None
        except Exception as error:
            cause: BaseException = error
            while cause.__context__ is not None:  # that a capture could not end says nothing
                cause = cause.__context__
            first = str(cause).strip().partition("\n")[0].rstrip(".")
            self.tell(f"work that is not the device's alone ({first})")
            return None
        return _Graph([own[id(tensor)] for tensor in tensors(given)], made, replay, alive)

    def _capture(self, work: Callable[[], Any], own: dict[int, Tensor]) -> Recording:
        device = next(iter(own.values())).device
        if device.type != "cuda":
            raise NotRecorded(f"a model on {device.type}")
        with torch.cuda.device(device):
            graph = torch.cuda.CUDAGraph()
            # Other threads, such as those that load data, may go on meanwhile.
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                made = work()
            self._pool = graph.pool()
        return made, graph.replay

    def _follow_stream(self) -> None:
        """What is copied out of a graph is copied before another stream writes there."""
        if not torch.cuda.is_available():
            return
        stream = torch.cuda.current_stream()
        if self._stream is not None and self._stream != stream:
            stream.wait_stream(self._stream)
        self._stream = stream


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
