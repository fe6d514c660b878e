"""Phi-3, Phi-3.5 and Phi-4 (dense text models)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxtrain.interop.families import common
from jaxtrain.interop.family import Family, read_rope
from jaxtrain.interop.weights import Weight, fused, linear
from jaxtrain.models import DecoderConfig, Phi3Config, Rope

ORIGINAL = 4096  # transformers' default of original_max_position_embeddings


def read_config(fields: Mapping[str, Any]) -> Phi3Config:
    """config.json -> ours."""
    fields.only("hidden_act", "silu", "swish", default="silu")
    fields.only("attention_bias", False, default=False)
    common.leave_dropout(fields, "resid_pdrop", "embd_pdrop")
    return Phi3Config(
        **common.read_sizes(fields, eps=1e-5, max_positions=4096, rope=read_phi_rope(fields)),
        window=fields.get("sliding_window", 0),
    )


def read_phi_rope(fields: Mapping[str, Any]) -> Rope:
    """The Rope of a config.json."""
    rope = read_rope(fields, fraction=1.0, longrope=True)
    if rope.scaling == "none":
        return rope
    if rope.scaling != "longrope":
        raise ValueError(f"config.json scales rotary positions by {rope.scaling!r}; Phi-3 is supported with longrope")
    if "max_position_embeddings" not in fields:
        raise ValueError("config.json has longrope, but lacks max_position_embeddings, how far positions are stretched")
    original = fields.get("original_max_position_embeddings", ORIGINAL)
    if rope.original_max_positions != original:
        raise ValueError(
            f"config.json has rotary positions stretched from {rope.original_max_positions}, but "
            f"original_max_position_embeddings = {original} ({ORIGINAL} where absent), by which transformers goes"
        )
    return rope


def write_phi_rope(config: Phi3Config) -> dict[str, Any]:
    """The inverse of ``read_phi_rope``, in the form that transformers 4 reads too."""
    rope = config.rope
    values: dict[str, Any] = {"rope_theta": rope.theta}
    if rope.fraction != 1.0:
        values["partial_rotary_factor"] = rope.fraction
    if rope.scaling == "none":
        return values
    if rope.scaling != "longrope":
        raise ValueError(f"Rope.scaling = {rope.scaling!r} cannot be written for Phi-3, which has longrope alone")
    scaling = {"type": "longrope", "short_factor": list(rope.short_factor), "long_factor": list(rope.long_factor)}
    if rope.attention_factor:
        scaling["attention_factor"] = rope.attention_factor
    elif rope.factor != max(1.0, config.max_positions / rope.original_max_positions):
        scaling["factor"] = rope.factor
    return values | {"original_max_position_embeddings": rope.original_max_positions, "rope_scaling": scaling}


def write_config(config: Phi3Config) -> dict[str, Any]:
    """Ours -> config.json."""
    common.require(config, qk_norm=False)
    values = common.write_sizes(config, rope=write_phi_rope(config))
    if config.head_dim * config.num_heads == config.d_model:
        del values["head_dim"]  # which Phi-3 knows only as this ratio
    # transformers' default padding may lie beyond the vocabulary, which it refuses.
    return values | {"hidden_act": "silu", "sliding_window": config.window or None, "pad_token_id": None}


def gate_up_rules(config: DecoderConfig) -> list[Weight]:
    """``mlp`` of every layer, where gate and up are one matrix."""
    where = {"layers": config.num_layers}
    halves = ("layers/mlp/gate/kernel", "layers/mlp/up/kernel")
    return [
        fused("model.layers.{layer}.mlp.gate_up_proj.weight", halves, (config.d_ff, config.d_ff), **where),
        linear("model.layers.{layer}.mlp.down_proj.weight", "layers/mlp/down/kernel", **where),
    ]


def weights(config: Phi3Config) -> tuple[Weight, ...]:
    """The rules of every array."""
    where = {"layers": config.num_layers}
    heads = {"query": config.num_heads, "key": config.num_kv_heads, "value": config.num_kv_heads}
    return (
        *common.end_rules(config),
        *common.norm_rules(config),
        fused(
            "model.layers.{layer}.self_attn.qkv_proj.weight",
            [f"layers/attention/{name}/kernel" for name in heads],
            [count * config.head_dim for count in heads.values()],
            **where,
        ),
        linear("model.layers.{layer}.self_attn.o_proj.weight", "layers/attention/out/kernel", inputs=2, **where),
        *gate_up_rules(config),
    )


FAMILY = Family(
    name="Phi-3",
    model_type="phi3",
    architectures=("Phi3ForCausalLM",),
    config=Phi3Config,
    read_config=read_config,
    write_config=write_config,
    weights=weights,
    ignored=(common.INV_FREQ,),
    aliases=common.tied_head,
)
