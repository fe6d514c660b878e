"""Mistral 7B of every version, and what shares its architecture."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxtrain.interop.families import common
from jaxtrain.interop.family import Family
from jaxtrain.interop.weights import Weight
from jaxtrain.models import MistralConfig


def read_config(fields: Mapping[str, Any]) -> MistralConfig:
    """config.json -> ours.  A file without ``sliding_window`` means 4096, one with null means none."""
    fields.only("hidden_act", "silu", "swish", default="silu")
    # Null is an answer of its own.
    window = fields["sliding_window"] if "sliding_window" in fields else 4096  # noqa: SIM401
    return MistralConfig(**common.read_sizes(fields, num_kv_heads=8, max_positions=2**17), window=window or 0)


def write_config(config: MistralConfig) -> dict[str, Any]:
    """Ours -> config.json."""
    common.require(config, qk_norm=False)
    return {"hidden_act": "silu", "sliding_window": config.window or None, **common.write_sizes(config)}


def weights(config: MistralConfig) -> tuple[Weight, ...]:
    """The rules of every array."""
    return (
        *common.end_rules(config),
        *common.norm_rules(config),
        *common.attention_rules(config),
        *common.mlp_rules(config),
    )


FAMILY = Family(
    name="Mistral",
    model_type="mistral",
    architectures=("MistralForCausalLM",),
    config=MistralConfig,
    read_config=read_config,
    write_config=write_config,
    weights=weights,
    ignored=(common.INV_FREQ,),
    aliases=common.tied_head,
)
