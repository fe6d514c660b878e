"""OLMo 2."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxtrain.interop.families import common
from jaxtrain.interop.family import Family
from jaxtrain.interop.weights import Weight
from jaxtrain.models import Olmo2Config

NORMS = {"post_attention_layernorm": "attention_post_norm", "post_feedforward_layernorm": "mlp_post_norm"}


def read_config(fields: Mapping[str, Any]) -> Olmo2Config:
    """config.json -> ours."""
    fields.only("hidden_act", "silu", "swish", default="silu")
    bias = fields.get("attention_bias", False)
    return Olmo2Config(**common.read_sizes(fields, eps=1e-5), attention_bias=bias)


def write_config(config: Olmo2Config) -> dict[str, Any]:
    """Ours -> config.json."""
    common.require(config, head_dim=config.d_model // config.num_heads)
    sizes = common.write_sizes(config)
    del sizes["head_dim"]  # no field of this class
    return {"hidden_act": "silu", "attention_bias": config.attention_bias, **sizes}


def weights(config: Olmo2Config) -> tuple[Weight, ...]:
    """The rules of every array."""
    bias = config.attention_bias
    return (
        *common.end_rules(config),
        *common.norm_rules(config, NORMS),
        *common.attention_rules(config, bias=bias, out_bias=bias, qk_norm=True),
        *common.mlp_rules(config),
    )


FAMILY = Family(
    name="OLMo 2",
    model_type="olmo2",
    architectures=("Olmo2ForCausalLM",),
    config=Olmo2Config,
    read_config=read_config,
    write_config=write_config,
    weights=weights,
    ignored=(common.INV_FREQ,),
    aliases=common.tied_head,
)
