"""Qwen3's mixtures of experts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxtrain.interop.families import common
from jaxtrain.interop.families.experts import expert_rules, read_balance, restacked, write_balance
from jaxtrain.interop.family import Family
from jaxtrain.interop.weights import Weight
from jaxtrain.models import Qwen3MoeConfig


def read_config(fields: Mapping[str, Any]) -> Qwen3MoeConfig:
    """config.json -> ours."""
    fields.only("hidden_act", "silu", "swish", default="silu")
    fields.only("use_sliding_window", False, default=False)
    for name in ("sliding_window", "max_window_layers"):
        fields.get(name)  # without a window they say nothing
    sizes = common.read_sizes(fields, num_kv_heads=4, max_positions=32768)
    step, dense = fields.get("decoder_sparse_step", 1), fields.get("mlp_only_layers", ())
    # transformers 5 writes the second name.
    experts = fields.get("num_experts", fields.get("num_local_experts", 128))
    return Qwen3MoeConfig(
        **sizes,
        num_experts=experts,
        top_k=fields.get("num_experts_per_tok", 8),
        expert_d_ff=fields.get("moe_intermediate_size", 768),
        renormalize=fields.get("norm_topk_prob", False),
        attention_bias=fields.get("attention_bias", False),
        dense_layers=tuple(i for i in range(sizes["num_layers"]) if i in dense or (i + 1) % step),
        **read_balance(fields),
    )


def write_config(config: Qwen3MoeConfig) -> dict[str, Any]:
    """Ours -> config.json."""
    common.require(config, qk_norm=True)
    return {
        "hidden_act": "silu",
        **common.write_sizes(config),
        "use_sliding_window": False,
        "sliding_window": None,
        "attention_bias": config.attention_bias,
        "num_experts": config.num_experts,
        "num_experts_per_tok": config.top_k,
        "moe_intermediate_size": config.expert_d_ff,
        "norm_topk_prob": config.renormalize,
        "decoder_sparse_step": 1,
        "mlp_only_layers": list(config.dense_layers),
        **write_balance(config),
    }


def weights(config: Qwen3MoeConfig) -> tuple[Weight, ...]:
    """The rules of every array."""
    bias = config.attention_bias
    around = [*common.norm_rules(config), *common.attention_rules(config, bias=bias, out_bias=bias, qk_norm=True)]
    experts = expert_rules("model.layers.{layer}.mlp", "layers/mlp", config.num_experts, layers=config.num_layers)
    rules = common.end_rules(config)
    for stack, (first, count, dense) in config.runs().items():
        layer = [*around, *(common.mlp_rules(config) if dense else experts)]
        rules += restacked(layer, stack, layers=count, first_layer=first)
    return tuple(rules)


FAMILY = Family(
    name="Qwen3-MoE",
    model_type="qwen3_moe",
    architectures=("Qwen3MoeForCausalLM",),
    config=Qwen3MoeConfig,
    read_config=read_config,
    write_config=write_config,
    weights=weights,
    ignored=(common.INV_FREQ,),
    aliases=common.tied_head,
)
