"""Llama 4: its `get_decoder()` is a head around the decoder."""

from tokenprune.families.adapter import Adapter, register_adapter

register_adapter("llama4", Adapter(decoder="language_model.model"))
