"""What a strategy may need of a run, declared before it.

The engine computes what is declared, in time, and nothing else.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, ClassVar

SOURCES = ("next", "previous")
QUERIES = ("last", "all", "text")
#: Where survivors are mixed.
SPACES = ("decoder", "vision")
VISION_QUERIES = ("class", "all")
VISION_HEADS = ("own", "one")
VISION_STATES = ("hidden", "keys", "queries")


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
        check_choice("DecoderRows.queries", self.queries, QUERIES)
        check_choice("DecoderRows.source", self.source, SOURCES)


@dataclass(frozen=True)
class DecoderKeys(Need):
    """Keys that a decoder layer makes of the visual tokens and of the prompt's text, rotated.

    As they are rotated: by the positions that the model counts, which in a batch that is padded on
    the left, and called without `position_ids`, count the pads.

    Args:
        source: `"next"`, the layer about to run, or `"previous"`, the layer before the cut.
    """

    source: str = "next"

    def __post_init__(self) -> None:
        check_choice("DecoderKeys.source", self.source, SOURCES)


@dataclass(frozen=True)
class Change(Need):
    """How the hidden state of each visual token has changed from one layer's input to the next's.

    That is what the layer before the cut has added, and what a model adds between the two besides:
    features of its vision tower (DeepStack).
    """

    #: The layer that is heard.
    source: ClassVar[str] = "previous"


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
class Videos(Need):
    """Which visual tokens are of videos, whose grids are frames; an image's are tiles."""


@dataclass(frozen=True)
class Text(Need):
    """The prompt's text as it entered the decoder."""


@dataclass(frozen=True)
class Question(Need):
    """The ids of what the prompt says after its last image, for strategies that read its words."""


@dataclass(frozen=True)
class Words(Need):
    """That there is text in the prompt of every row that loses tokens; else the call is refused.

    Args:
        follow: Whether it must come after the row's last visual token.
    """

    follow: bool = False


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
        check_layer("VisionRows.layer", self.layer)
        check_choice("VisionRows.queries", self.queries, VISION_QUERIES)
        check_choice("VisionRows.heads", self.heads, VISION_HEADS)


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
        check_layer("VisionStates.layer", self.layer)
        check_choice("VisionStates.what", self.what, VISION_STATES)


@dataclass(frozen=True)
class BeforeProjector(Need):
    """What the projector is given of each visual token, so that survivors are mixed there.

    For `Selection(space="vision")` at a cut before the decoder; beside other needs of the tower.
    """


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


def check_fraction(name: str, value: Any, part: str) -> None:
    """Refuses a value outside [0, 1]; `name` says whose, `part` what it is a part of."""
    if not (_is_number(value) and 0 <= value <= 1):
        raise ValueError(f"{name}: expected a fraction in [0, 1], got {value!r}. Say which {part}.")


def check_number(
    name: str, value: Any, *, least: float | None = None, above: float | None = None, paper: str
) -> None:
    """Refuses what is no finite number, or too small a one; `name` says whose, `paper` has one."""
    floor = f"from {least} on" if above is None else f"above {above}"
    fits = _is_number(value) and math.isfinite(value)
    if not (fits and (least is None or value >= least) and (above is None or value > above)):
        raise ValueError(
            f"{name}: expected a number {floor}, got {value!r}. The paper has {paper}."
        )


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def check_layer(name: str, value: Any) -> None:
    """Refuses what is no layer's number; `name` says whose."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise ValueError(
            f"{name}: expected an integer, got {value!r}. Count from 0, or from -1 backwards."
        )


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Refuses a value that is none of the choices; `name` says whose."""
    if value not in choices:
        raise ValueError(
            f"{name}: expected one of {list(choices)}, got {value!r}. Choose one of them."
        )
