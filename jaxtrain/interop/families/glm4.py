"""GLM-4: of 2024 (model_type "glm") and GLM-4-0414 ("glm4"), which has more norms."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from jaxtrain.interop.families import common
from jaxtrain.interop.families.phi3 import gate_up_rules
from jaxtrain.interop.family import Family, read_rope, write_rope
from jaxtrain.interop.weights import Weight, rotary
from jaxtrain.models import Glm4Config, GlmConfig

NORMS = {
    "input_layernorm": "attention_norm",
    "post_self_attn_layernorm": "attention_post_norm",
    "post_attention_layernorm": "mlp_norm",
    "post_mlp_layernorm": "mlp_post_norm",
}


def reader(config: type) -> Callable[[Mapping[str, Any]], Any]:
    """config.json -> ours, of this class."""

    def read_config(fields: Mapping[str, Any]) -> Any:
        fields.only("hidden_act", "silu", "swish", default="silu")
        rope = read_rope(fields, fraction=0.5)
        sizes = common.read_sizes(fields, num_kv_heads=2, head_dim=128, eps=1.5625e-07, max_positions=131072, rope=rope)
        return config(**sizes, attention_bias=fields.get("attention_bias", True))

    return read_config


def write_config(config: GlmConfig) -> dict[str, Any]:
    """Ours -> config.json."""
    common.require(config, qk_norm=False)
    rope = write_rope(config.rope, "fraction")
    # Always said: transformers' default is a half.
    own = {"partial_rotary_factor": config.rope.fraction, "attention_bias": config.attention_bias}
    # transformers' default padding may lie beyond the vocabulary, which it refuses.
    return {"hidden_act": "silu", "pad_token_id": None, **common.write_sizes(config, rope=rope), **own}


def weights(config: GlmConfig) -> tuple[Weight, ...]:
    """The rules of every array.  Heads are turned in neighbouring pairs there."""
    size = config.rope.rotary_dim(config.head_dim)
    attention = common.attention_rules(config, bias=config.attention_bias, out_bias=False, qk_norm=False)
    norms = {theirs: ours for theirs, ours in NORMS.items() if isinstance(config, Glm4Config) or "post" not in ours}
    return (
        *common.end_rules(config),
        *common.norm_rules(config, norms),
        *(
            rotary(rule, rotary_dim=size) if "/query/" in rule.ours[0] or "/key/" in rule.ours[0] else rule
            for rule in attention
        ),
        *gate_up_rules(config),
    )


FAMILY = Family(
    name="GLM-4-0414",
    model_type="glm4",
    architectures=("Glm4ForCausalLM",),
    config=Glm4Config,
    read_config=reader(Glm4Config),
    write_config=write_config,
    weights=weights,
    ignored=(common.INV_FREQ,),
    aliases=common.tied_head,
)
GLM = Family(
    name="GLM-4",
    model_type="glm",
    architectures=("GlmForCausalLM",),
    config=GlmConfig,
    read_config=reader(GlmConfig),
    write_config=write_config,
    weights=weights,
    ignored=(common.INV_FREQ,),
    aliases=common.tied_head,
)
