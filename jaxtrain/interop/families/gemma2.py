"""Gemma 2, and what its table shares with Gemma 3's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxtrain.interop.families import common
from jaxtrain.interop.family import Family
from jaxtrain.interop.weights import Weight
from jaxtrain.models import Gemma2Config
from jaxtrain.models.gemma2 import GemmaConfig

KINDS = {"sliding_attention": "local", "full_attention": "global"}
SIZES = {"num_kv_heads": 4, "head_dim": 256, "tied": True}
NORMS = {
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "attention_post_norm",
    "pre_feedforward_layernorm": "mlp_norm",
    "post_feedforward_layernorm": "mlp_post_norm",
}


def read_config(fields: Mapping[str, Any]) -> Gemma2Config:
    """config.json -> ours."""
    fields.get("cache_implementation")  # how transformers 4 generates
    return Gemma2Config(
        **common.read_sizes(fields, **SIZES, max_positions=8192),
        **read_gemma(fields, every=2, final_softcap=30.0),
        attention_softcap=nullable(fields, "attn_logit_softcapping", 50.0),
    )


def write_config(config: Gemma2Config) -> dict[str, Any]:
    """Ours -> config.json."""
    common.require(config, qk_norm=False)
    softcap = {"attn_logit_softcapping": config.attention_softcap or None}
    return common.write_sizes(config) | write_gemma(config) | softcap


def weights(config: GemmaConfig) -> tuple[Weight, ...]:
    """The rules of every array, of Gemma 2 and 3."""
    return (
        *common.end_rules(config),
        *common.norm_rules(config, NORMS),
        *common.attention_rules(config, bias=False, out_bias=False, qk_norm=config.qk_norm),
        *common.mlp_rules(config),
    )


def nullable(fields: Mapping[str, Any], name: str, default: float) -> float:
    """A soft cap or a window, where null means none (0) and only an absent field means the default."""
    return (fields[name] or 0) if name in fields else default


def read_pattern(fields: Mapping[str, Any], every: int) -> tuple[str, ...]:
    """The shortest pattern that repeats over the layers.

    every: where the file does not name the layers' types, each ``every``-th is global.
    """
    count = fields["num_hidden_layers"]
    types = fields.get("layer_types")
    if types is None:
        types = ["sliding_attention" if (i + 1) % every else "full_attention" for i in range(count)]
    if len(types) != count or set(types) - KINDS.keys():
        raise ValueError(f"config.json has layer_types = {types}; want {count} of {', '.join(KINDS)}")
    kinds = tuple(KINDS[kind] for kind in types)
    return next(kinds[:p] for p in range(1, count + 1) if all(kinds[i] == kinds[i % p] for i in range(count)))


def read_gemma(fields: Mapping[str, Any], *, every: int, final_softcap: float) -> dict[str, Any]:
    """What Gemma 2 and 3 have beyond ``common.read_sizes``."""
    fields.only("hidden_activation", "gelu_pytorch_tanh", default="gelu_pytorch_tanh")
    fields.get("hidden_act")  # of early files; transformers reads the other alone
    fields.only("attention_bias", False, default=False)
    fields.only("use_bidirectional_attention", False, default=False)
    return {
        "pattern": read_pattern(fields, every),
        "window": nullable(fields, "sliding_window", 4096),
        "query_pre_attn_scalar": fields.get("query_pre_attn_scalar", 256),
        "final_softcap": nullable(fields, "final_logit_softcapping", final_softcap),
    }


def write_gemma(config: GemmaConfig) -> dict[str, Any]:
    """The inverse of ``read_gemma``."""
    if config.d_model % config.num_heads:
        raise ValueError(
            f"Gemma's config.json cannot say d_model={config.d_model} with num_heads={config.num_heads}: not a multiple"
        )
    names = {ours: theirs for theirs, ours in KINDS.items()}
    return {
        "hidden_activation": "gelu_pytorch_tanh",
        "attention_bias": False,
        "layer_types": [names[kind] for kind in config.kinds()],
        "sliding_window": config.window or None,
        "query_pre_attn_scalar": config.query_pre_attn_scalar or config.head_dim,
        "final_logit_softcapping": config.final_softcap or None,
    }


FAMILY = Family(
    name="Gemma 2",
    model_type="gemma2",
    architectures=("Gemma2ForCausalLM",),
    config=Gemma2Config,
    read_config=read_config,
    write_config=write_config,
    weights=weights,
    ignored=(common.INV_FREQ,),
    aliases=common.tied_head,
)
