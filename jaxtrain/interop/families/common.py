"""What the tables of most decoder families have in common: names that Llama's transformers class began with."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from jaxtrain.interop.family import read_rope, write_rope
from jaxtrain.interop.weights import Weight, linear, table, vector
from jaxtrain.models import DecoderConfig, Rope

log = logging.getLogger("jaxtrain")

# Their names of a layer's norms, and ours.
PRE_NORMS = {"input_layernorm": "attention_norm", "post_attention_layernorm": "mlp_norm"}
INV_FREQ = r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq"


def leave_dropout(fields: Mapping[str, Any], *names: str) -> None:
    """Reads rates of dropout, and does without them: they are a choice of training, not of the weights."""
    found = {name: fields.get(name) for name in names if fields.get(name)}
    if found:
        log.info("config.json has %s; the imported model has no dropout unless its config is given one", found)


def require(config: DecoderConfig, **only: Any) -> None:
    """Raises ValueError where a field of ours that their class lacks is not what their class does."""
    for name, value in only.items():
        if getattr(config, name) != value:
            raise ValueError(
                f"{type(config).__name__}.{name} = {getattr(config, name)!r} has no counterpart in config.json, where "
                f"it is always {value!r}"
            )


def read_sizes(
    fields: Mapping[str, Any],
    *,
    num_kv_heads: int = 0,
    head_dim: int = 0,
    eps: float = 1e-6,
    max_positions: int = 2048,
    theta: float = 10000.0,
    tied: bool = False,
    rope: Rope | None = None,
) -> dict[str, Any]:
    """A DecoderConfig's arguments from a config.json whose fields have Llama's names.

    rope: where the family reads its own.  The rest are what transformers assumes where the file is silent;
    num_kv_heads 0: as many as there are heads, head_dim 0: ``hidden_size / num_attention_heads``.
    """
    leave_dropout(fields, "attention_dropout")
    num_heads = fields["num_attention_heads"]
    return {
        "vocab_size": fields["vocab_size"],
        "num_layers": fields["num_hidden_layers"],
        "d_model": fields["hidden_size"],
        "num_heads": num_heads,
        "num_kv_heads": fields.get("num_key_value_heads", num_kv_heads or num_heads),
        "head_dim": fields.get("head_dim", head_dim),
        "d_ff": fields["intermediate_size"],
        "max_positions": fields.get("max_position_embeddings", max_positions),
        "rope": read_rope(fields, theta=theta) if rope is None else rope,
        "tie_embeddings": fields.get("tie_word_embeddings", tied),
        "norm_eps": fields.get("rms_norm_eps", eps),
    }


def write_sizes(config: DecoderConfig, *, rope: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The inverse of ``read_sizes``."""
    return {
        "vocab_size": config.vocab_size,
        "num_hidden_layers": config.num_layers,
        "hidden_size": config.d_model,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.d_ff,
        "max_position_embeddings": config.max_positions,
        "tie_word_embeddings": config.tie_embeddings,
        "rms_norm_eps": config.norm_eps,
        "initializer_range": config.init_std,
        **(write_rope(config.rope) if rope is None else rope),
    }


def attention_rules(
    config: DecoderConfig, *, bias: bool = False, out_bias: bool = False, qk_norm: bool = False
) -> list[Weight]:
    """``self_attn`` of every layer: four matrices, their biases, and norms of queries and keys."""
    where = {"layers": config.num_layers}
    theirs, ours = "model.layers.{layer}.self_attn.", "layers/attention/"
    rules = []
    for short, name in (("q", "query"), ("k", "key"), ("v", "value")):
        rules.append(linear(f"{theirs}{short}_proj.weight", f"{ours}{name}/kernel", **where))
        if bias:
            rules.append(vector(f"{theirs}{short}_proj.bias", f"{ours}{name}/bias", **where))
        if qk_norm and short != "v":
            rules.append(vector(f"{theirs}{short}_norm.weight", f"{ours}{name}_norm/scale", **where))
    rules.append(linear(f"{theirs}o_proj.weight", f"{ours}out/kernel", inputs=2, **where))
    if out_bias:
        rules.append(vector(f"{theirs}o_proj.bias", f"{ours}out/bias", **where))
    return rules


def mlp_rules(config: DecoderConfig, *, bias: bool = False) -> list[Weight]:
    """``mlp`` of every layer: gate, up and down."""
    where = {"layers": config.num_layers}
    rules = []
    for name in ("gate", "up", "down"):
        theirs, ours = f"model.layers.{{layer}}.mlp.{name}_proj", f"layers/mlp/{name}"
        rules.append(linear(f"{theirs}.weight", f"{ours}/kernel", **where))
        if bias:
            rules.append(vector(f"{theirs}.bias", f"{ours}/bias", **where))
    return rules


def norm_rules(config: DecoderConfig, names: Mapping[str, str] = PRE_NORMS) -> list[Weight]:
    """The norms of every layer; ``names`` are theirs by ours."""
    return [
        vector(f"model.layers.{{layer}}.{theirs}.weight", f"layers/{ours}/scale", layers=config.num_layers)
        for theirs, ours in names.items()
    ]


def end_rules(config: DecoderConfig) -> list[Weight]:
    """What stands before and after the layers."""
    rules = [
        table("model.embed_tokens.weight", "embed/embedding"),
        vector("model.norm.weight", "final_norm/scale"),
    ]
    if not config.tie_embeddings:
        rules.append(linear("lm_head.weight", "lm_head/kernel"))
    return rules


def tied_head(config: DecoderConfig) -> tuple[tuple[str, str], ...]:
    """The output matrix, where it is the embedding."""
    return (("lm_head.weight", "model.embed_tokens.weight"),) if config.tie_embeddings else ()
