"""Families whose vision tower cannot be read, each with its reason."""

from tokenprune.families.adapter import Adapter, register_adapter

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
    "gemma4_unified": "it projects pixels to tokens, and has no vision transformer",
    "emu3": _CODES,
    "chameleon": _CODES,
}
for _model_type, _reason in _REASONS.items():
    register_adapter(_model_type, Adapter(unread=_reason))
