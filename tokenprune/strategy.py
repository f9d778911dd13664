"""What a pruning strategy is: a rule that says which visual tokens survive a cut.

A strategy sees a `TokenView`, never the model and never the schedule. Most methods score tokens and
subclass `ScoreStrategy`; a joint choice (diversity, clustering) subclasses `PruningStrategy`.

Shape suffixes: B batch rows, V visual tokens alive, D hidden size, H attention heads.
"""

from __future__ import annotations

import difflib
import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from tokenprune.imports import locate

if TYPE_CHECKING:  # a strategy is named, listed and priced without torch
    from importlib.metadata import EntryPoint

    from torch import Tensor

SOURCES = ("next", "previous")
QUERIES = ("last", "all", "text")
VISION_QUERIES = ("class", "all")
VISION_HEADS = ("own", "one")
VISION_STATES = ("hidden", "keys", "queries")
POSITIONS = ("original", "renumbered")
#: Of which positions a pruned call makes logits, see `tokenprune.attach`.
LOGITS = ("all", "supervised", "full")


class Need:
    """Something that a strategy reads of a run, declared before it in `PruningStrategy.needs`."""


@dataclass(frozen=True)
class DecoderRows(Need):
    """Attention that a decoder layer pays the visual tokens.

    Args:
        queries: `"last"`, the last prompt token (with labels: the tokens that predict an answer's
            first token); `"all"`, every real position; or `"text"`, the prompt's text tokens, each
            by itself.
        source: `"next"`, the layer about to run, or `"previous"`, the layer before the cut.
    """

    queries: str = "last"
    source: str = "next"

    def __post_init__(self) -> None:
        _check_choice("DecoderRows.queries", self.queries, QUERIES)
        _check_choice("DecoderRows.source", self.source, SOURCES)


@dataclass(frozen=True)
class DecoderKeys(Need):
    """Keys that a decoder layer makes of the visual tokens and of the prompt's text, rotated.

    Args:
        source: `"next"`, the layer about to run, or `"previous"`, the layer before the cut.
    """

    source: str = "next"

    def __post_init__(self) -> None:
        _check_choice("DecoderKeys.source", self.source, SOURCES)


@dataclass(frozen=True)
class Projected(Need):
    """The visual tokens as they entered the decoder."""


@dataclass(frozen=True)
class Entered(Need):
    """All visual tokens of the call as they entered the decoder, those dropped since included."""


@dataclass(frozen=True)
class Normed(Need):
    """Hidden states of visual tokens and prompt's text at the cut, after the model's last norm."""


@dataclass(frozen=True)
class Text(Need):
    """The prompt's text as it entered the decoder."""


@dataclass(frozen=True)
class RandomNumbers(Need):
    """Numbers by chance, which a row gets alone and in a batch alike.

    Args:
        seed: Another one gives other numbers.
    """

    seed: int = 0


@dataclass(frozen=True)
class VisionNeed(Need):
    """Something of the vision tower's own.

    Args:
        layer: Layer of the tower, from 0, or from -1 backwards. Layer -2 is the one whose output
            LLaVA projects.
    """

    layer: int = -2


@dataclass(frozen=True)
class VisionRows(VisionNeed):
    """Attention that a layer of the vision tower pays each visual token's patches.

    Args:
        layer: Layer of the tower.
        queries: `"class"`, the class token, or `"all"`, every patch of the image or frame.
        heads: `"own"`, the tower's, or `"one"`, a single head of all channels.
    """

    queries: str = "class"
    heads: str = "own"

    def __post_init__(self) -> None:
        _check_choice("VisionRows.queries", self.queries, VISION_QUERIES)
        _check_choice("VisionRows.heads", self.heads, VISION_HEADS)


@dataclass(frozen=True)
class VisionStates(VisionNeed):
    """What a layer of the vision tower makes of each visual token's patches.

    Args:
        layer: Layer of the tower.
        what: `"hidden"`, the layer's output; `"keys"` or `"queries"` of its attention, all heads
            side by side, normed where the tower norms them, before any rotation.
    """

    what: str = "hidden"

    def __post_init__(self) -> None:
        _check_choice("VisionStates.what", self.what, VISION_STATES)


@dataclass(frozen=True)
class HasPatches(VisionNeed):
    """Which visual tokens have patches; there with every other need of the vision tower."""


@dataclass(frozen=True)
class Tiles(VisionNeed):
    """In which tile each visual token's patches are; there with every other need, too."""


@dataclass(frozen=True)
class TileShape(VisionNeed):
    """How many tiles, and of how many tokens, there are; there with every other need, too."""


#: What every strategy that asks anything of the vision tower gets.
BESIDE = (HasPatches(), Tiles(), TileShape())


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(
            f"{name}: expected one of {list(choices)}, got {value!r}. Say what the strategy reads."
        )


@dataclass(frozen=True, eq=False)
class TextView:
    """The text of a prompt: what is no visual token, no pad and no answer.

    Attributes:
        embeddings: (B, S, D), what entered the decoder, detached.
        valid: Bool (B, S), which entries exist.
        follows: Bool (B, S), which of them come after the row's last visual token.
        positions: int64 (B, S), as the visual tokens' in `TokenView.positions`.
    """

    embeddings: Tensor
    valid: Tensor
    follows: Tensor
    positions: Tensor


@dataclass(frozen=True, eq=False)
class TokensAndText:
    """What is known of the visual tokens alive at a cut, and of the prompt's text.

    Attributes:
        visual: (B, V, ...), entries as in `TokenView.valid`.
        text: (B, S, ...), entries as in `TextView.valid`.
    """

    visual: Tensor
    text: Tensor


@dataclass(frozen=True, eq=False)
class TokenView:
    """What a strategy may know of the visual tokens alive at a cut. Read-only.

    Rows of a batch may have different numbers of visual tokens: `valid` says which entries exist.

    Attributes:
        layer: Layer before which the cut happens.
        num_layers: Decoder layers of the model.
        num_original: int64 (B,), visual tokens of each row before any cut.
        max_keep: Most tokens that a row will keep, so that no device need be asked for it.
        ragged: Whether some entries do not exist; if not, `valid` need not be asked.
    """

    layer: int
    num_layers: int
    num_original: Tensor
    max_keep: int
    ragged: bool
    _valid: Callable[[], Tensor] = field(repr=False)
    _positions: Callable[[], Tensor] = field(repr=False)
    _hidden: Callable[[], Tensor] = field(repr=False)
    _places: Callable[[], Tensor] = field(repr=False)
    _signal: Callable[[Need], Any] = field(repr=False)

    @property
    def valid(self) -> Tensor:
        """Which entries exist, bool (B, V)."""
        return self._valid()

    @property
    def positions(self) -> Tensor:
        """Positions in the unpruned conversation, int64 (B, V)."""
        return self._positions()

    @property
    def hidden(self) -> Tensor:
        """Hidden states (B, V, D) that enter the layer, detached."""
        return self._hidden()

    @property
    def places(self) -> Tensor:
        """Image, grid, row and column of each token, int64 (B, V, 4), -1 where unknown.

        An image cut into tiles has two grids: the whole image, and the mosaic of its tiles.
        """
        return self._places()

    def attend(self, queries: str = "last", source: str = "next") -> Tensor:
        """Attention that the asked query rows pay each visual token, as `DecoderRows` names them.

        The softmax runs over all keys, text included, in float32.

        Returns:
            float32 (B, H, V), averaged over the rows; of `"text"` (B, H, S, V), each row of
            `text` by itself, zero where it does not exist.

        Raises:
            ValueError: If the strategy did not declare these rows in `needs`.
        """
        signal: Tensor = self._signal(DecoderRows(queries, source))
        return signal

    @property
    def projected(self) -> Tensor:
        """The tokens as they entered the decoder (B, V, D), detached; `Projected` in `needs`.

        A token that was mixed at an earlier cut is mixed alike.
        """
        signal: Tensor = self._signal(Projected())
        return signal

    @property
    def entered(self) -> Tensor:
        """All tokens as they entered the decoder (B, U, D), detached; `Entered` in `needs`.

        Of each row the first `num_original` exist.
        """
        signal: Tensor = self._signal(Entered())
        return signal

    def keys(self, source: str = "next") -> TokensAndText:
        """Keys (B, ..., G, E) of the tokens and the text, as `DecoderKeys` in `needs` names them.

        G key heads of width E, rotated by the tokens' positions.
        """
        signal: TokensAndText = self._signal(DecoderKeys(source))
        return signal

    @property
    def normed(self) -> TokensAndText:
        """Hidden states (B, ..., D) after the model's last norm, detached; `Normed` in `needs`."""
        signal: TokensAndText = self._signal(Normed())
        return signal

    @property
    def text(self) -> TextView:
        """The prompt's text as it entered the decoder; `Text` in `needs`."""
        signal: TextView = self._signal(Text())
        return signal

    def vision_rows(self, layer: int = -2, queries: str = "class", heads: str = "own") -> Tensor:
        """Attention in the vision tower, as `VisionRows` in `needs` names it.

        The softmax is the tower's own: over the keys of an image, tile, frame or window. `"all"` is
        the sum over the patches that ask, divided by those of the image, tile or frame, so that
        windows of different sizes compare.

        Returns:
            float32 (B, H, V), H the tower's heads, or 1: the mean over the token's patches, zero
            for a token without any. A token that was mixed at an earlier cut is mixed alike.
        """
        signal: Tensor = self._signal(VisionRows(layer, queries, heads))
        return signal

    def vision_states(self, layer: int = -2, what: str = "hidden") -> Tensor:
        """States of the vision tower, as `VisionStates` in `needs` names them.

        Returns:
            float32 (B, V, C): the mean over the token's patches, zero for a token without any. A
            token that was mixed at an earlier cut is mixed alike.
        """
        signal: Tensor = self._signal(VisionStates(layer, what))
        return signal

    @property
    def has_patches(self) -> Tensor:
        """Which tokens have patches of the vision tower, bool (B, V); a newline has none.

        There for strategies that ask for anything else of the tower.
        """
        signal: Tensor = self._signal(HasPatches())
        return signal

    @property
    def tiles(self) -> Tensor:
        """What the vision tower looked at by itself, int64 (B, V): a tile, an image, a frame.

        Numbered within the row from 0; -1 for tokens without patches. A token that was mixed at an
        earlier cut counts where its seat is. There for strategies that ask for anything else of the
        tower.
        """
        signal: Tensor = self._signal(Tiles())
        return signal

    @property
    def tile_shape(self) -> tuple[int, int]:
        """Tiles that a row has at most, and tokens that one of them has at most before any cut.

        Known without waiting for the device; there for strategies that have `tiles`.
        """
        shape: tuple[int, int] = self._signal(TileShape())
        return shape

    def random(self, seed: int) -> Tensor:
        """Numbers in [0, 1), float32 (B, V), fixed by (seed, layer, the row's own tokens).

        A row gets the same numbers alone and in a batch; no global generator is touched.
        `RandomNumbers` in `needs`.
        """
        signal: Tensor = self._signal(RandomNumbers(seed))
        return signal


@dataclass(frozen=True, eq=False)
class Selection:
    """Which tokens survive a cut.

    Attributes:
        kept: Bool (B, V).
        scores: float32 (B, V) for the trace, or None for joint choices.
        weights: float (B, K, V), how each survivor, in ascending order, is mixed from the tokens
            alive, or None where survivors stay as they are. K is the most that a row keeps; what
            stands beyond a row's own survivors is not read. Gradients flow through the mixture,
            not through the weights.
    """

    kept: Tensor
    scores: Tensor | None = None
    weights: Tensor | None = None


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
        """Scores (B, V): the higher, the longer a token lives."""

    def select(self, view: TokenView, keep: Tensor) -> Selection:
        from tokenprune.tensors import top_k

        scores = self.score(view).float()
        valid = view.valid if view.ragged else None
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
        _check_choice("DecoderRows.queries", self.queries, QUERIES[:2])
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


def vision_needs(strategy: PruningStrategy) -> tuple[VisionNeed, ...]:
    """What a strategy needs of the vision tower."""
    return tuple(need for need in strategy.needs() if isinstance(need, VisionNeed))


def decoder_rows(strategy: PruningStrategy) -> tuple[DecoderRows, ...]:
    """The decoder's attention among a strategy's needs."""
    return tuple(need for need in strategy.needs() if isinstance(need, DecoderRows))


_REGISTRY: dict[str, type[PruningStrategy]] = {}
#: Has the strategies that come with the package, each in the file of its name.
_SHIPPED = "tokenprune.strategies"
#: Entry points by which installed packages offer strategies: `norm = "my_package.norm:Norm"`.
ENTRY_POINTS = "tokenprune.strategies"
StrategyClass = TypeVar("StrategyClass", bound=type[PruningStrategy])


def register(name: str) -> Callable[[StrategyClass], StrategyClass]:
    """Class decorator: makes a strategy buildable by `name`, in Python and in configs.

    Raises:
        ValueError: If the name is taken or malformed, or the class is no frozen dataclass of a
            `PruningStrategy`.
    """

    def add(cls: StrategyClass) -> StrategyClass:
        if not name.isidentifier() or name != name.lower() or name == "none":
            raise ValueError(
                f"register: expected a lower-case identifier other than 'none', got {name!r}. "
                "The name is used in configs and file names."
            )
        own_file = getattr(cls, "__module__", "") == f"{_SHIPPED}.{name}"
        if name in _REGISTRY or (name in _shipped() and not own_file):
            raise ValueError(
                f"register: expected a new name, got {name!r}, which is "
                f"{strategy_class(name).__qualname__}. Choose another name."
            )
        candidate: Any = cls  # what users decorate is not always what the annotation asks for
        if not (isinstance(candidate, type) and issubclass(candidate, PruningStrategy)):
            raise ValueError(
                f"register: expected a subclass of PruningStrategy, got {cls!r}. "
                "Subclass ScoreStrategy, or PruningStrategy for a joint choice."
            )
        parameters: Any = getattr(cls, "__dataclass_params__", None)
        if "__dataclass_params__" not in vars(cls) or not parameters.frozen:
            raise ValueError(
                f"register: expected a frozen dataclass, got {cls.__qualname__}. "
                "Put @dataclass(frozen=True) below @register."
            )
        cls.name = name
        _REGISTRY[name] = cls
        return cls

    return add


def available() -> list[str]:
    """Names of all strategies, sorted: of the package, of installed ones, and registered since.

    Installed packages offer them by entry points of the group `tokenprune.strategies`; none is
    imported before it is built.
    """
    return sorted({*_shipped(), *_REGISTRY, *_offered()})


def strategy_class(name: str) -> type[PruningStrategy]:
    """The class of that name; one of a package is loaded when it is first asked for.

    Raises:
        KeyError: If there is none; names the choices and the nearest.
        ValueError: If a file of the package registers no strategy of its name, or an installed
            package cannot give the one that it offers.
    """
    if name not in _REGISTRY:
        if name in _shipped():
            _load_shipped(name)
        elif name in (offered := _offered()):
            _load_offered(name, offered[name])
        else:
            raise unknown_name("strategy", name, available())
    return _REGISTRY[name]


def _shipped() -> list[str]:
    names: list[str] = importlib.import_module(_SHIPPED).names()
    return names


def _load_shipped(name: str) -> None:
    importlib.import_module(f"{_SHIPPED}.{name}")
    if name not in _REGISTRY:
        raise ValueError(
            f"strategies/{name}.py: expected @register({name!r}), got no strategy of that "
            "name. Name a file as its strategy."
        )


def _offered() -> dict[str, list[EntryPoint]]:
    """What installed packages offer, by name; nothing of theirs is imported."""
    from importlib import metadata  # takes a moment, and most commands ask for no strategy

    found: dict[str, list[EntryPoint]] = {}
    for entry in metadata.entry_points(group=ENTRY_POINTS):
        if all(entry.value != other.value for other in found.setdefault(entry.name, [])):
            found[entry.name].append(entry)
    return found


def _load_offered(name: str, entries: list[EntryPoint]) -> None:
    """Registers what a package offers, unless that does so itself when it is imported."""
    packages = [entry.dist.name if entry.dist else entry.module for entry in entries]
    if len(entries) > 1:
        raise ValueError(
            f"strategy {name!r}: expected one package that offers it, got {packages}. "
            "Uninstall all others."
        )
    (entry,), (package,) = entries, packages
    broken = f"strategy {name!r}: expected the package {package!r} to give it, got {entry.value!r}"
    try:
        found = locate(".".join(filter(None, (entry.module, entry.attr))))
    except ImportError as error:
        raise ValueError(f"{broken}: {error}. Repair or uninstall it.") from error
    if name not in _REGISTRY:
        try:
            register(name)(found)
        except ValueError as error:
            raise ValueError(f"{broken}: {error}") from error


def build_strategy(name: str, **fields: Any) -> PruningStrategy:
    """Builds a registered strategy; keyword arguments are the strategy's own fields.

    Raises:
        KeyError: If the name is unknown.
        ValueError: If a field is unknown or its value is refused by the strategy.
    """
    cls = strategy_class(name)
    known = list(getattr(cls, "__dataclass_fields__", {}))
    for key in fields:
        if key not in known:
            raise ValueError(
                f"build_strategy({name!r}): expected fields among {known}, got {key!r}. "
                "See the strategy's docstring."
            )
    return cls(**fields)


def unknown_name(what: str, name: object, choices: list[str]) -> KeyError:
    """The error for a name that is not among `choices`: lists them and names the nearest."""
    near = difflib.get_close_matches(str(name), choices, n=1, cutoff=0.0)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return KeyError(f"{what}: expected one of {choices}, got {name!r}.{hint}")
