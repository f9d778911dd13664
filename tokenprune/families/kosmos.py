"""Kosmos 2: the decoder's head hides it."""

from tokenprune.families.adapter import Adapter, register_adapter

_REASON = "its tokens are learned queries, each of which reads all patches of the image"
for _model_type in ("kosmos-2", "kosmos-2.5"):
    register_adapter(_model_type, Adapter(decoder="text_model.model", unread=_REASON))
