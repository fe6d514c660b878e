"""Qwen3, dense."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxtrain.interop.families import common
from jaxtrain.interop.families.qwen2 import read_window, write_window
from jaxtrain.interop.family import Family
from jaxtrain.interop.weights import Weight
from jaxtrain.models import Qwen3Config


def read_config(fields: Mapping[str, Any]) -> Qwen3Config:
    """config.json -> ours."""
    fields.only("hidden_act", "silu", "swish", default="silu")
    sizes = common.read_sizes(fields, num_kv_heads=32, max_positions=32768, head_dim=128)
    bias = fields.get("attention_bias", False)
    return Qwen3Config(**sizes, **read_window(fields, sizes["num_layers"]), attention_bias=bias)


def write_config(config: Qwen3Config) -> dict[str, Any]:
    """Ours -> config.json."""
    common.require(config, qk_norm=True)
    bias = {"attention_bias": config.attention_bias}
    return {"hidden_act": "silu", **bias, **common.write_sizes(config), **write_window(config)}


def weights(config: Qwen3Config) -> tuple[Weight, ...]:
    """The rules of every array."""
    bias = config.attention_bias
    return (
        *common.end_rules(config),
        *common.norm_rules(config),
        *common.attention_rules(config, bias=bias, out_bias=bias, qk_norm=True),
        *common.mlp_rules(config),
    )


FAMILY = Family(
    name="Qwen3",
    model_type="qwen3",
    architectures=("Qwen3ForCausalLM",),
    config=Qwen3Config,
    read_config=read_config,
    write_config=write_config,
    weights=weights,
    ignored=(common.INV_FREQ,),
    aliases=common.tied_head,
)
