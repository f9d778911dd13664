"""What a strategy is, and what it answers.

Most methods score tokens and subclass `ScoreStrategy`; a joint choice (diversity, clustering)
subclasses `PruningStrategy`.

Shape suffixes: B batch rows, V visual tokens alive, K survivors.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from tokenprune.strategy.needs import (
    QUERIES,
    SPACES,
    DecoderRows,
    Need,
    VisionNeed,
    VisionRows,
    VisionStates,
    check_choice,
)
from tokenprune.strategy.view import TokenView

if TYPE_CHECKING:
    from torch import Tensor

POSITIONS = ("original", "renumbered")
#: Of which positions a pruned call makes logits, see `tokenprune.attach`.
LOGITS = ("all", "supervised", "full")


@dataclass(frozen=True, eq=False)
class Selection:
    """Which tokens survive a cut.

    Attributes:
        kept: Bool (B, V).
        scores: float32 (B, V) for the trace, or None for joint choices.
        weights: float (B, K, V), how each survivor, in ascending order, is mixed from the tokens
            alive, or None where survivors stay as they are. K is the most that a row keeps, or
            more; what stands beyond a row's own survivors is not read. Gradients flow through the
            mixture, not through the weights.
        space: Where they are mixed: `"decoder"`, its hidden states, or `"vision"`, what the
            projector is given, which projects the mixture (`BeforeProjector` in `needs`). There
            survivors that are nothing but themselves, and those without patches, stay as they are.
    """

    kept: Tensor
    scores: Tensor | None = None
    weights: Tensor | None = None
    space: str = "decoder"

    def __post_init__(self) -> None:
        check_choice("Selection.space", self.space, SPACES)


@dataclass(frozen=True)
class Published:
    """How a method's released code runs it, as plain data.

    Attributes:
        schedule: Name of a `Schedule` constructor, `"pyramid"`, `"one_shot"` or `"explicit"`.
        options: Its keyword arguments.
        positions: `"original"` or `"renumbered"`; what `positions: auto` of configs stands for.
        strategies: Where a strategy of its own acts at each cut: their names and fields.
    """

    schedule: str
    options: Mapping[str, Any]
    positions: str
    strategies: tuple[tuple[str, Mapping[str, Any]], ...] = ()


class PruningStrategy(ABC):
    """Chooses the survivors of a cut. Subclasses are frozen dataclasses and pure functions."""

    name: ClassVar[str]
    #: True if `select` always keeps exactly min(keep, alive) tokens; spares the engine a count.
    keeps_exactly: ClassVar[bool] = False
    #: True if `select` looks at no content: of its view at nothing but places, random numbers and
    #: which tokens exist. It is asked on the host then, before the first layer runs unless a cut
    #: before it looks at content.
    blind: ClassVar[bool] = False

    def needs(self) -> tuple[Need, ...]:
        """What `select` will ask of its view besides hidden states, positions and places.

        The engine computes it in time, and nothing else.
        """
        return ()

    def at(self, cut: int) -> PruningStrategy:
        """The strategy of a cut, numbered from 0: itself, unless it is one of several."""
        return self

    @abstractmethod
    def select(self, view: TokenView, keep: Tensor) -> Selection:
        """Chooses at most `keep` (int64, (B,)) of the valid tokens of each row."""

    @classmethod
    def published(cls, num_layers: int) -> Published:
        """How the paper's released code runs the method on a decoder of `num_layers` layers."""
        raise ValueError(
            f"published: expected a strategy with a published run, got {cls.__name__}. "
            "Give it a classmethod `published`, or build strategy and schedule yourself."
        )


class ScoreStrategy(PruningStrategy):
    """Keeps the tokens with the highest scores; ties go to the lower index."""

    keeps_exactly: ClassVar[bool] = True

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        owner = next(base for base in cls.__mro__ if "select" in vars(base))
        said = "keeps_exactly" in vars(cls) or "keeps_exactly" in vars(owner)
        if owner is not ScoreStrategy and not said:
            cls.keeps_exactly = False  # what an override keeps must be counted

    @abstractmethod
    def score(self, view: TokenView) -> Tensor:
        """Scores (B, V): the higher, the longer a token lives; those that are NaN come last."""

    def select(self, view: TokenView, keep: Tensor) -> Selection:
        from tokenprune.tensors import top_k

        scores = self.score(view)
        valid = view.valid if view.ragged else None
        # Without `valid` the engine, which knows V, refuses a wrong one.
        alike = getattr(scores, "ndim", 0) == 2 and (valid is None or scores.shape == valid.shape)
        if not alike:
            check_scores(self, scores, tuple(view.valid.shape))
        scores = scores.float()
        return Selection(kept=top_k(scores, valid, keep), scores=scores)


@dataclass(frozen=True)
class AttentionStrategy(ScoreStrategy):
    """A score that reads the decoder's own attention.

    Args:
        queries: Rows that ask: `"last"`, the last prompt token, or `"all"`, every real position.
        source: Layer that answers: `"next"`, about to run, or `"previous"`, before the cut.
    """

    queries: str = "last"
    source: str = "next"

    def __post_init__(self) -> None:
        # Refuses bad values here, not at the first cut; rows of text are not one score.
        check_choice("DecoderRows.queries", self.queries, QUERIES[:2])
        DecoderRows(self.queries, self.source)

    def needs(self) -> tuple[Need, ...]:
        return (DecoderRows(self.queries, self.source),)


@dataclass(frozen=True)
class PerStage(PruningStrategy):
    """One strategy a cut.

    Args:
        strategies: As many as the schedule has cuts, in their order.
    """

    strategies: tuple[PruningStrategy, ...]

    def __post_init__(self) -> None:
        given = self.strategies
        if isinstance(given, PruningStrategy) or not all(
            isinstance(own, PruningStrategy) and not isinstance(own, PerStage) for own in given
        ):
            raise ValueError(
                f"PerStage: expected a strategy for each cut, got {given!r}. "
                "Write PerStage((first, second))."
            )
        object.__setattr__(self, "strategies", tuple(given))
        object.__setattr__(self, "keeps_exactly", all(own.keeps_exactly for own in given))

    def needs(self) -> tuple[Need, ...]:
        return tuple(dict.fromkeys(need for own in self.strategies for need in own.needs()))

    def at(self, cut: int) -> PruningStrategy:
        return self.strategies[cut]

    def check(self, cuts: Sequence[int]) -> None:
        """Refuses a schedule with more or fewer cuts.

        Args:
            cuts: Their layers.

        Raises:
            ValueError: If there is not one strategy for each.
        """
        if len(self.strategies) != len(cuts):
            raise ValueError(
                f"PerStage: expected a strategy for each of the cuts at {list(cuts)}, got "
                f"{len(self.strategies)}. Name as many strategies as stages."
            )

    @property
    def title(self) -> str:
        """The names of its strategies, as one."""
        return "+".join(getattr(own, "name", type(own).__name__) for own in self.strategies)

    def select(self, view: TokenView, keep: Tensor) -> Selection:
        raise ValueError(
            "PerStage: expected a cut's own strategy to be asked, at(cut), got them all."
        )


def check_scores(strategy: PruningStrategy, scores: Any, expected: tuple[int, ...]) -> None:
    """Refuses scores that are not one a token.

    Args:
        strategy: Whose they are.
        scores: A tensor, if it is right.
        expected: (B, V).

    Raises:
        ValueError: Names the class.
    """
    shape = getattr(scores, "shape", None)
    if shape is None or tuple(shape) != expected:
        got = f"a {type(scores).__name__}" if shape is None else tuple(shape)
        raise ValueError(
            f"{type(strategy).__name__}.score: expected scores of shape {expected}, got {got}. "
            "Give each visual token of each row one number."
        )


def vision_needs(strategy: PruningStrategy) -> tuple[VisionNeed, ...]:
    """What a strategy needs of the vision tower."""
    kinds = (VisionRows, VisionStates)
    return tuple(need for need in strategy.needs() if isinstance(need, kinds))


def decoder_rows(strategy: PruningStrategy) -> tuple[DecoderRows, ...]:
    """The decoder's attention among a strategy's needs."""
    return tuple(need for need in strategy.needs() if isinstance(need, DecoderRows))
