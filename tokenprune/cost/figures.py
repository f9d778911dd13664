"""What a schedule gives on one sample: tokens, FLOPs, bytes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache

from tokenprune.cost import compute, memory
from tokenprune.cost.shape import DecoderShape
from tokenprune.schedule import Schedule
from tokenprune.strategy import PruningStrategy


@dataclass(frozen=True)
class Figures:
    """What a schedule gives on one sample.

    Attributes:
        lengths: Visual tokens of each layer.
        avg_tokens: Their mean: what FastV, PyramidDrop and VScan report.
        avg_tokens_outputs: Mean over what the layers leave: what SparseVLM's code reports.
        final_tokens: Visual tokens of the last layer.
        tflops: Prefill of the decoder layers by convention; `"exact"` includes the scoring, not the
            vocabulary projection, and is absent where its formula does not know the layers.
        flops_ratio: The same as fractions of the unpruned.
        kv_mb: Keys and values cached, in 10⁶ bytes; None where layers cache different sizes.
        kv_ratio: The same as a fraction of the unpruned.
    """

    lengths: tuple[int, ...]
    avg_tokens: float
    avg_tokens_outputs: float
    final_tokens: int
    tflops: Mapping[str, float]
    flops_ratio: Mapping[str, float]
    kv_mb: float | None
    kv_ratio: float | None


@dataclass(frozen=True)
class Workload:
    """One sample on one decoder.

    Attributes:
        shape: The decoder.
        num_visual: Visual tokens before any cut.
        num_text: Text tokens beside them; 0, as in most papers' tables, counts the visual ones
            alone.
        dtype: Type of the cached keys and values.
        strategy: Whose attention rows count, by layers like LLaMA's (others cost more to ask, see
            `cost.scoring_flops`), or None.
    """

    shape: DecoderShape
    num_visual: int
    num_text: int = 0
    dtype: str = "float16"
    strategy: PruningStrategy | None = None

    def __post_init__(self) -> None:
        for name, value, least in (
            ("num_visual", self.num_visual, 1),
            ("num_text", self.num_text, 0),
        ):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(
                    f"budget.{name}: expected an integer >= {least}, got {value!r}. "
                    "Give the tokens of one sample."
                )
        memory.dtype_bytes(self.dtype)

    @property
    def conventions(self) -> tuple[str, ...]:
        """Those that know the decoder's layers."""
        return tuple(c for c in compute.CONVENTIONS if c != "exact" or not self.shape.unlike)

    def lengths(self, schedule: Schedule) -> tuple[int, ...]:
        """Visual tokens of each layer."""
        return tuple(schedule.lengths(self.shape.num_layers, self.num_visual))

    def flops(self, schedule: Schedule, convention: str) -> float:
        """Prefill of the decoder layers, and of the scoring by the convention `"exact"`."""
        lengths = self.lengths(schedule)
        total = sum(self._layer(convention)(length) for length in lengths)
        if convention == "exact" and self.strategy is not None:
            before = (self.num_visual, *lengths)
            total += sum(
                compute.rows_flops(
                    self.shape, self.strategy.at(cut), before[stage.layer], self.num_text
                )
                for cut, stage in enumerate(schedule.stages)
            )
        return total

    def figure(self, schedule: Schedule, target: str, convention: str) -> float:
        """One figure of a schedule, in the target's unit."""
        if target == "tflops":
            return self.flops(schedule, convention) / 1e12
        if target == "flops_ratio":
            return self.flops(schedule, convention) / self.flops(Schedule(), convention)
        lengths = self.lengths(schedule)
        if target == "final_tokens":
            return lengths[-1]
        if target == "kv_mb":
            return memory.kv_bytes(self.shape, lengths, self.num_text, dtype=self.dtype) / 1e6
        return memory.average_tokens(
            lengths, "outputs" if target == "avg_tokens_outputs" else "inputs"
        )

    def figures(self, schedule: Schedule) -> Figures:
        """All figures of a schedule.

        Raises:
            ValueError: If the schedule does not fit the decoder.
        """
        lengths = self.lengths(schedule)
        tera = {c: self.flops(schedule, c) / 1e12 for c in self.conventions}
        whole = {c: self.flops(Schedule(), c) / 1e12 for c in self.conventions}
        kv, whole_kv = (
            self.figure(own, "kv_mb", "") if self.shape.caches_alike else None
            for own in (schedule, Schedule())
        )
        return Figures(
            lengths=lengths,
            avg_tokens=memory.average_tokens(lengths),
            avg_tokens_outputs=memory.average_tokens(lengths, "outputs"),
            final_tokens=lengths[-1],
            tflops=tera,
            flops_ratio={c: tera[c] / whole[c] for c in tera},
            kv_mb=kv,
            kv_ratio=kv / whole_kv if kv is not None and whole_kv is not None else None,
        )

    def _layer(self, convention: str) -> Callable[[int], float]:
        """Cost of one layer by its number of visual tokens, remembered."""
        return _layer_cost(self.shape, self.num_text, convention)


@cache
def _layer_cost(shape: DecoderShape, num_text: int, convention: str) -> Callable[[int], float]:
    @cache
    def one(length: int) -> float:
        layers = [length] * shape.num_layers
        return compute.flops(shape, layers, num_text, convention) / shape.num_layers

    return one
