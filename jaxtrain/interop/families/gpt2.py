"""GPT-2: fused queries, keys and values, matrices stored inputs first."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxtrain.interop.families import common
from jaxtrain.interop.family import Family
from jaxtrain.interop.weights import Weight, conv1d, fused, fused_vector, linear, table, vector
from jaxtrain.models import GPT2Config

ACTIVATIONS = {
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu": "gelu",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}
# Of the heads that a summary vector feeds, which are not read.
SUMMARY = ("type", "use_proj", "activation", "proj_to_labels", "first_dropout")


def read_config(fields: Mapping[str, Any]) -> GPT2Config:
    """config.json -> ours."""
    activation = fields.only("activation_function", *ACTIVATIONS, default="gelu_new")
    fields.only("scale_attn_weights", True, default=True)
    fields.only("scale_attn_by_inverse_layer_idx", False, default=False)
    fields.only("add_cross_attention", False, default=False)
    fields.get("reorder_and_upcast_attn")  # in which order the same is computed; softmax is float32 here
    fields.get("n_ctx")  # an old name of n_positions, beside it
    common.leave_dropout(fields, "attn_pdrop", "embd_pdrop", "resid_pdrop")
    for name in SUMMARY:
        fields.get(f"summary_{name}")
    d_model, num_heads = fields["n_embd"], fields["n_head"]
    return GPT2Config(
        vocab_size=fields["vocab_size"],
        num_layers=fields["n_layer"],
        d_model=d_model,
        num_heads=num_heads,
        num_kv_heads=num_heads,
        d_ff=fields.get("n_inner", 4 * d_model),
        max_positions=fields.get("n_positions", 1024),
        tie_embeddings=fields.get("tie_word_embeddings", True),
        norm_eps=fields.get("layer_norm_epsilon", 1e-5),
        activation=ACTIVATIONS[activation],
    )


def write_config(config: GPT2Config) -> dict[str, Any]:
    """Ours -> config.json."""
    common.require(config, head_dim=config.d_model // config.num_heads)
    return {
        "vocab_size": config.vocab_size,
        "n_layer": config.num_layers,
        "n_embd": config.d_model,
        "n_head": config.num_heads,
        "n_inner": config.d_ff,
        "n_positions": config.max_positions,
        "activation_function": next(theirs for theirs, ours in ACTIVATIONS.items() if ours == config.activation),
        "layer_norm_epsilon": config.norm_eps,
        "initializer_range": config.init_std,
        "tie_word_embeddings": config.tie_embeddings,
        **dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), 0.0),
    }


def weights(config: GPT2Config) -> tuple[Weight, ...]:
    """The rules of every array."""
    where = {"layers": config.num_layers}
    layer = "transformer.h.{layer}."
    qkv = [f"layers/attention/{name}" for name in ("query", "key", "value")]
    sizes = [config.num_heads * config.head_dim] * 3
    rules = [
        table("transformer.wte.weight", "embed/embedding"),
        table("transformer.wpe.weight", "position_embed/embedding"),
        fused(layer + "attn.c_attn.weight", [f"{name}/kernel" for name in qkv], sizes, transposed=False, **where),
        fused_vector(layer + "attn.c_attn.bias", [f"{name}/bias" for name in qkv], sizes, **where),
        conv1d(layer + "attn.c_proj.weight", "layers/attention/out/kernel", inputs=2, **where),
        vector(layer + "attn.c_proj.bias", "layers/attention/out/bias", **where),
    ]
    for theirs, ours in (("c_fc", "up"), ("c_proj", "down")):
        rules.append(conv1d(f"{layer}mlp.{theirs}.weight", f"layers/mlp/{ours}/kernel", **where))
        rules.append(vector(f"{layer}mlp.{theirs}.bias", f"layers/mlp/{ours}/bias", **where))
    for their_part, our_part in (("weight", "scale"), ("bias", "bias")):
        rules += [
            vector(f"{layer}ln_1.{their_part}", f"layers/attention_norm/{our_part}", **where),
            vector(f"{layer}ln_2.{their_part}", f"layers/mlp_norm/{our_part}", **where),
            vector(f"transformer.ln_f.{their_part}", f"final_norm/{our_part}"),
        ]
    if not config.tie_embeddings:
        rules.append(linear("lm_head.weight", "lm_head/kernel"))
    return tuple(rules)


def aliases(config: GPT2Config) -> tuple[tuple[str, str], ...]:
    """The output matrix, where it is the embedding."""
    return (("lm_head.weight", "transformer.wte.weight"),) if config.tie_embeddings else ()


FAMILY = Family(
    name="GPT-2",
    model_type="gpt2",
    architectures=("GPT2LMHeadModel",),
    config=GPT2Config,
    read_config=read_config,
    write_config=write_config,
    weights=weights,
    ignored=(r"(transformer\.)?h\.\d+\.attn\.(bias|masked_bias)",),
    aliases=aliases,
    base_prefix="transformer.",
)
