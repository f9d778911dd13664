"""What a strategy sees at a cut.

Shape suffixes: B batch rows, V visual tokens alive, D hidden size, H attention heads.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from tokenprune.strategy.needs import (
    Change,
    DecoderKeys,
    DecoderRows,
    Entered,
    HasPatches,
    Need,
    Normed,
    Projected,
    Question,
    RandomNumbers,
    Text,
    Tiles,
    TileShape,
    Videos,
    VisionRows,
    VisionStates,
)

if TYPE_CHECKING:  # a strategy is named, listed and priced without torch
    from torch import Tensor


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
    Where rows of the batch pack several sequences, a row here is a sequence.

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
        """Positions in the unpruned conversation, int64 (B, V), from the row's first token on.

        In a later turn as the model counts them: without `position_ids` it counts pads, too.
        """
        return self._positions()

    @property
    def hidden(self) -> Tensor:
        """Hidden states (B, V, D) that enter the layer, detached."""
        return self._hidden()

    @property
    def places(self) -> Tensor:
        """Image, grid, row and column of each token, int64 (B, V, 4), -1 where unknown.

        Grids are numbered within an image: the whole image and the mosaic of its tiles, or tiles
        one by one; of a video, frames. A newline is in the column after the last of its row.
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
    def change(self) -> Tensor:
        """How each token's hidden state has changed over the layer before; `Change` in `needs`.

        Returns:
            float32 (B, V, D), what enters this layer less what entered the one before, detached.
        """
        signal: Tensor = self._signal(Change())
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
    def of_videos(self) -> Tensor:
        """Which tokens are of videos, bool (B, V); `Videos` in `needs`.

        None, where a model has the same placeholder for images and videos, unless the call shows
        videos alone.
        """
        signal: Tensor = self._signal(Videos())
        return signal

    @property
    def text(self) -> TextView:
        """The prompt's text as it entered the decoder; `Text` in `needs`."""
        signal: TextView = self._signal(Text())
        return signal

    @property
    def question(self) -> tuple[tuple[int, ...], ...]:
        """Of each row the ids of the prompt's text after its last image; `Question` in `needs`.

        All of the prompt's text where no image is followed by any. They are on the host.
        """
        signal: tuple[tuple[int, ...], ...] = self._signal(Question())
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
