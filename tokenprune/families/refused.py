"""Families that cannot be pruned, each with its reason."""

from tokenprune.families.adapter import Adapter, register_adapter

_CROSS = (
    "its decoder reads the image through cross-attention, so no visual tokens sit in the decoder's "
    "stream"
)
_ENCODER = (
    "its visual tokens sit in an encoder, whose output every decoder layer reads, so none sit in "
    "the decoder's stream"
)
_REASONS = {
    "mllama": _CROSS,
    "blip": _CROSS,
    "florence2": _CROSS,
    "pix2struct": _CROSS,
    "vision-encoder-decoder": _CROSS,
    "idefics": _CROSS,
    "pp_formulanet": _CROSS,
    "t5gemma2": _ENCODER,
    "udop": _ENCODER,
    "evolla": "its decoder reads a protein through cross-attention, and sees no images",
    "gemma3n": "its layers hand on several streams side by side, and the last ones read the keys "
    "of earlier ones",
    "git": "it puts them before the prompt itself, where no placeholder shows them",
    "pi0": "its action expert reads the keys of every layer of the language model, under one "
    "mask for all layers",
    "diffusion_gemma": "its decoder writes blocks of text by diffusion, and reads the keys of "
    "every layer of an encoder, under one mask for all layers",
}

for _model_type, _reason in _REASONS.items():
    register_adapter(_model_type, Adapter(refusal=_reason))
