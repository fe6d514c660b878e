"""Mixtral."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxtrain.interop.families import common
from jaxtrain.interop.families.experts import expert_rules, read_balance, write_balance
from jaxtrain.interop.family import Family
from jaxtrain.interop.weights import Weight
from jaxtrain.models import MixtralConfig

NAMES = {"w1": "gate", "w3": "up", "w2": "down"}


def read_config(fields: Mapping[str, Any]) -> MixtralConfig:
    """config.json -> ours."""
    fields.only("hidden_act", "silu", "swish", default="silu")
    common.leave_dropout(fields, "router_jitter_noise")
    return MixtralConfig(
        **common.read_sizes(fields, num_kv_heads=8, eps=1e-5, max_positions=2**17, theta=1e6),
        window=fields.get("sliding_window", 0),
        num_experts=fields.get("num_local_experts", 8),
        top_k=fields.get("num_experts_per_tok", 2),
        **read_balance(fields),
    )


def write_config(config: MixtralConfig) -> dict[str, Any]:
    """Ours -> config.json."""
    common.require(config, qk_norm=False)
    return {
        "hidden_act": "silu",
        **common.write_sizes(config),
        "sliding_window": config.window or None,
        "num_local_experts": config.num_experts,
        "num_experts_per_tok": config.top_k,
        **write_balance(config),
    }


def weights(config: MixtralConfig) -> tuple[Weight, ...]:
    """The rules of every array."""
    experts = ("model.layers.{layer}.block_sparse_moe", "layers/mlp", config.num_experts, NAMES)
    return (
        *common.end_rules(config),
        *common.norm_rules(config),
        *common.attention_rules(config),
        *expert_rules(*experts, layers=config.num_layers),
    )


FAMILY = Family(
    name="Mixtral",
    model_type="mixtral",
    architectures=("MixtralForCausalLM",),
    config=MixtralConfig,
    read_config=read_config,
    write_config=write_config,
    weights=weights,
    ignored=(common.INV_FREQ,),
    aliases=common.tied_head,
)
