"""Families whose vision tower cannot be read, each with its reason."""

from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

from tokenprune.families.adapter import Adapter, Places, Run, register_adapter
from tokenprune.families.llava_next import NEWLINES, bases_and_mosaics
from tokenprune.families.places import by_squares, in_order, patches_across, raster, told


def _of_codes(
    config: Any, inputs: Mapping[str, Any], runs: Sequence[Sequence[Run]]
) -> list[Places] | None:
    """A code a square of pixels, and a token after each row of them."""
    edge, sizes = _edge_of_codes(config), told(inputs, "image_sizes")
    images = [raster(0, rows // edge, 1 + columns // edge) for rows, columns in sizes]
    return in_order(images, [], runs)


def _of_windows(
    config: Any, inputs: Mapping[str, Any], runs: Sequence[Sequence[Run]]
) -> list[Places] | None:
    """As LLaVA-NeXT's. A token's query begins as the patches at its place, and reads its window."""
    side = int(patches_across(config) * Fraction(config.downsample_rate))
    return in_order(bases_and_mosaics(config, inputs, side), [], runs)


def _edge_of_codes(config: Any) -> int:
    """Pixels that a code is high and wide."""
    edge: int = 2 ** (len(config.vq_config.channel_multiplier) - 1)
    return edge


_QUERIES = "learned queries, each of which reads all patches, so that no token is of any patch"
_CONVOLUTIONS = "convolutions whose windows overlap, so that a patch has no share of a token"
_CODES = "it codes an image by convolutions, and has no vision transformer"
_REASONS = {
    "idefics2": f"its tokens are {_QUERIES}",
    "aria": f"its tokens are {_QUERIES}",
    "blip-2": f"its tokens are {_QUERIES}",
    "instructblip": f"its tokens are {_QUERIES}",
    "instructblipvideo": f"its tokens are {_QUERIES}",
    "deepseek_ocr2": f"its tokens are {_QUERIES}",
    "granite4_vision": "its tokens are learned queries, each of which reads all patches of a "
    "window, and features of several layers are added to them in the decoder",
    "got_ocr2": f"its tokens are made by {_CONVOLUTIONS}",
    "pp_chart2table": f"its tokens are made by {_CONVOLUTIONS}",
    "step3p7": f"its tokens are made by {_CONVOLUTIONS}",
    "fuyu": "it projects pixels to tokens, and has no vision transformer",
    "emu3": _CODES,
    "chameleon": _CODES,
}
#: Of two convolutions, each halves rows and columns.
_CONVOLVED = by_squares(lambda config: patches_across(config) // 4)
_LAYOUTS = {
    "got_ocr2": _CONVOLVED,
    "pp_chart2table": _CONVOLVED,
    "emu3": _of_codes,
    "granite4_vision": _of_windows,
    "chameleon": by_squares(lambda config: config.vq_config.resolution // _edge_of_codes(config)),
}
#: Of those whose grids lie on the whole image, or on a square of it.
_FRAMINGS = {
    "pp_chart2table": "whole",
    "emu3": "whole",
    "granite4_vision": "whole",
    "chameleon": "centre",
}
_NEWLINES = {"emu3": (0,), "granite4_vision": NEWLINES}
for _model_type, _reason in _REASONS.items():
    register_adapter(
        _model_type,
        Adapter(
            layout=_LAYOUTS.get(_model_type),
            framing=_FRAMINGS.get(_model_type),
            newlines=_NEWLINES.get(_model_type, ()),
            unread=_reason,
        ),
    )
