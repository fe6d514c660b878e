"""Llama 1 to 3.x, and what shares its architecture: SmolLM2, Yi, TinyLlama."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxtrain.interop.families import common
from jaxtrain.interop.family import Family
from jaxtrain.interop.weights import Weight
from jaxtrain.models import LlamaConfig


def read_config(fields: Mapping[str, Any]) -> LlamaConfig:
    """config.json -> ours."""
    fields.only("hidden_act", "silu", "swish", default="silu")
    fields.only("rope_interleaved", False, default=False)
    return LlamaConfig(
        attention_bias=fields.get("attention_bias", False),
        mlp_bias=fields.get("mlp_bias", False),
        **common.read_sizes(fields),
    )


def write_config(config: LlamaConfig) -> dict[str, Any]:
    """Ours -> config.json."""
    common.require(config, qk_norm=False)
    return {
        **common.write_sizes(config),
        "hidden_act": "silu",
        "attention_bias": config.attention_bias,
        "mlp_bias": config.mlp_bias,
    }


def weights(config: LlamaConfig) -> tuple[Weight, ...]:
    """The rules of every array."""
    bias = config.attention_bias
    return (
        *common.end_rules(config),
        *common.norm_rules(config),
        *common.attention_rules(config, bias=bias, out_bias=bias),
        *common.mlp_rules(config, bias=config.mlp_bias),
    )


FAMILY = Family(
    name="Llama",
    model_type="llama",
    architectures=("LlamaForCausalLM",),
    config=LlamaConfig,
    read_config=read_config,
    write_config=write_config,
    weights=weights,
    ignored=(common.INV_FREQ,),
    aliases=common.tied_head,
)
