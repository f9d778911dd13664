"""ERNIE 4.5 VL: its experts are told which tokens are visual."""

from tokenprune.families.adapter import Adapter, register_adapter

register_adapter("ernie4_5_vl_moe", Adapter(token_arguments={"moe_mm_token_type_ids": 1}))
