"""Gemma 4: every layer is given an embedding of each token."""

from tokenprune.families.adapter import Adapter, register_adapter

register_adapter("gemma4", Adapter(token_arguments={"per_layer_input": 1}))
