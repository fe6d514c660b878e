"""DeepSeek-V3, R1, and what shares their architecture."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxtrain.interop.families import common
from jaxtrain.interop.families.experts import expert_rules, restacked
from jaxtrain.interop.family import Family, rope_of, write_rope
from jaxtrain.interop.weights import Weight, fused, fused_vector, linear, rotary, vector
from jaxtrain.models import DeepseekV3Config, Rope

# Their names of what stands around the layer of a step of multi-token prediction, and ours.
MTP_NORMS = {"enorm": "embed_norm", "hnorm": "hidden_norm", "shared_head.norm": "norm"}


def read_config(fields: Mapping[str, Any]) -> DeepseekV3Config:
    """config.json -> ours.

    ``aux_loss_alpha``, which files from the hub have and transformers does not know, is the coefficient of the
    balance within sequences.
    """
    fields.only("hidden_act", "silu", "swish", default="silu")
    fields.only("rope_interleave", True, default=True)
    fields.only("scoring_func", "sigmoid", default="sigmoid")
    fields.only("topk_method", "noaux_tc", default="noaux_tc")
    fields.only("moe_layer_freq", 1, default=1)
    fields.get("ep_size")  # how they spread it over devices
    sizes = common.read_sizes(fields, max_positions=4096, rope=_read_rope(fields))
    del sizes["head_dim"]  # of the rotated part, in files of transformers 5
    fields.get("qk_head_dim")
    within = fields.get("seq_aux", True)
    return DeepseekV3Config(
        **sizes,
        num_experts=fields.get("n_routed_experts", fields.get("num_local_experts", 256)),
        top_k=fields.get("num_experts_per_tok", 8),
        expert_d_ff=fields.get("moe_intermediate_size", 2048),
        query_rank=(fields["q_lora_rank"] or 0) if "q_lora_rank" in fields else 1536,
        latent_size=fields.get("kv_lora_rank", 512),
        plain_dim=fields.get("qk_nope_head_dim", 128),
        rope_dim=fields.get("qk_rope_head_dim", 64),
        value_dim=fields.get("v_head_dim", 128),
        attention_bias=fields.get("attention_bias", False),
        num_dense_layers=min(fields.get("first_k_dense_replace", 3), sizes["num_layers"]),
        shared_experts=fields.get("n_shared_experts", 1),
        groups=fields.get("n_group", 8),
        top_groups=fields.get("topk_group", 4),
        renormalize=fields.get("norm_topk_prob", True),
        routed_scale=float(fields.get("routed_scaling_factor", 2.5)),
        sequence_balance_coef=float(fields.get("aux_loss_alpha", 0.0)) * bool(within),
        mtp_layers=fields.get("num_nextn_predict_layers", 0),
    )


def _read_rope(fields: Mapping[str, Any]) -> Rope:
    found = {"rope_theta": fields.get("rope_theta", 10000.0)}
    found |= (fields.get("rope_scaling") or {}) | (fields.get("rope_parameters") or {})
    scales = {name: float(found.pop(name, None) or 0.0) for name in ("mscale", "mscale_all_dim")}
    rope = rope_of(found, original=fields.get("max_position_embeddings", 4096))
    # Only yarn has a use for them.
    return dataclasses.replace(rope, **scales) if rope.scaling == "yarn" else rope


def write_config(config: DeepseekV3Config) -> dict[str, Any]:
    """Ours -> config.json."""
    rope = write_rope(config.rope, "mscale", "mscale_all_dim")
    if config.rope.scaling == "yarn":
        rope["rope_scaling"] |= {"mscale": config.rope.mscale, "mscale_all_dim": config.rope.mscale_all_dim}
    elif config.rope.scaling != "none":
        # Their class changes the scale of logits for every kind of stretched positions, and reads this to do so.
        rope["rope_scaling"]["mscale_all_dim"] = 0.0
    sizes = common.write_sizes(config, rope=rope)
    del sizes["head_dim"]
    written = {
        "hidden_act": "silu",
        **sizes,
        "n_routed_experts": config.num_experts,
        "num_experts_per_tok": config.top_k,
        "moe_intermediate_size": config.expert_d_ff,
        "q_lora_rank": config.query_rank or None,
        "kv_lora_rank": config.latent_size,
        "qk_nope_head_dim": config.plain_dim,
        "qk_rope_head_dim": config.rope_dim,
        "v_head_dim": config.value_dim,
        "attention_bias": config.attention_bias,
        "first_k_dense_replace": config.num_dense_layers,
        "n_shared_experts": config.shared_experts,
        "n_group": config.groups,
        "topk_group": config.top_groups,
        "norm_topk_prob": config.renormalize,
        "routed_scaling_factor": config.routed_scale,
        "num_nextn_predict_layers": config.mtp_layers,
    }
    if config.sequence_balance_coef:
        written |= {"aux_loss_alpha": config.sequence_balance_coef, "seq_aux": True}
    return written


def weights(config: DeepseekV3Config) -> tuple[Weight, ...]:
    """The rules of every array."""
    where = {"layers": config.num_layers}
    theirs, ours = "model.layers.{layer}.", "layers/mlp"
    around = [*common.norm_rules(config), *_attention_rules(config)]
    sparse = [
        *around,
        *expert_rules(f"{theirs}mlp", ours, config.num_experts, **where),
        vector(f"{theirs}mlp.gate.e_score_correction_bias", f"{ours}/router/bias", **where),
    ]
    if config.shared_experts:
        sparse += [
            linear(f"{theirs}mlp.shared_experts.{name}_proj.weight", f"{ours}/shared/{name}/kernel", **where)
            for name in ("gate", "up", "down")
        ]
    dense, steps = config.num_dense_layers, config.mtp_layers
    rules = common.end_rules(config)
    if dense:
        rules += restacked([*around, *common.mlp_rules(config)], "dense_layers", layers=dense, first_layer=0)
    rules += restacked(sparse, "layers", layers=config.num_layers - dense, first_layer=dense)
    if steps:
        rules += restacked(sparse, "mtp/block", layers=steps, first_layer=config.num_layers)
        own = [vector(f"{theirs}{name}.weight", f"layers/{norm}/scale", **where) for name, norm in MTP_NORMS.items()]
        own.append(linear(f"{theirs}eh_proj.weight", "layers/proj/kernel", **where))
        rules += restacked(own, "mtp", layers=steps, first_layer=config.num_layers)
    return tuple(rules)


def _attention_rules(config: DeepseekV3Config) -> list[Weight]:
    where = {"layers": config.num_layers}
    theirs, ours = "model.layers.{layer}.self_attn.", "layers/attention/"
    turned = {"rotary_dim": config.rope_dim, "start": config.plain_dim}
    halves, sizes = (f"{ours}latent", f"{ours}rope_key"), (config.latent_size, config.rope_dim)
    kernels, biases = ([f"{half}/{name}" for half in halves] for name in ("kernel", "bias"))
    rules = [
        rotary(fused(f"{theirs}kv_a_proj_with_mqa.weight", kernels, sizes, **where), which=(1,)),
        vector(f"{theirs}kv_a_layernorm.weight", f"{ours}latent_norm/scale", **where),
        linear(f"{theirs}kv_b_proj.weight", f"{ours}expand/kernel", **where),
        linear(f"{theirs}o_proj.weight", f"{ours}out/kernel", inputs=2, **where),
    ]
    if config.attention_bias:
        rules.append(rotary(fused_vector(f"{theirs}kv_a_proj_with_mqa.bias", biases, sizes, **where), which=(1,)))
        rules.append(vector(f"{theirs}o_proj.bias", f"{ours}out/bias", **where))
    if not config.query_rank:
        return [*rules, rotary(linear(f"{theirs}q_proj.weight", f"{ours}query/kernel", **where), **turned)]
    rules += [
        linear(f"{theirs}q_a_proj.weight", f"{ours}query_down/kernel", **where),
        vector(f"{theirs}q_a_layernorm.weight", f"{ours}query_norm/scale", **where),
        rotary(linear(f"{theirs}q_b_proj.weight", f"{ours}query_up/kernel", **where), **turned),
    ]
    if config.attention_bias:
        rules.append(vector(f"{theirs}q_a_proj.bias", f"{ours}query_down/bias", **where))
    return rules


def as_stored(config: DeepseekV3Config, names: set[str]) -> DeepseekV3Config:
    """Without multi-token prediction where the file has none: transformers promises it in every config.json, and
    leaves it out of the tensors that it writes."""
    first = f"model.layers.{config.num_layers}."
    there = any(name.startswith(first) for name in names)
    return config if there else dataclasses.replace(config, mtp_layers=0)


def aliases(config: DeepseekV3Config) -> tuple[tuple[str, str], ...]:
    """Copies of embedding and output matrix in every step of multi-token prediction."""
    table = "model.embed_tokens.weight"
    head = table if config.tie_embeddings else "lm_head.weight"
    steps = range(config.num_layers, config.num_layers + config.mtp_layers)
    shared = (("embed_tokens", table), ("shared_head.head", head))
    copies = [(f"model.layers.{i}.{name}.weight", of) for i in steps for name, of in shared]
    return (*common.tied_head(config), *copies)


FAMILY = Family(
    name="DeepSeek-V3",
    model_type="deepseek_v3",
    architectures=("DeepseekV3ForCausalLM",),
    config=DeepseekV3Config,
    read_config=read_config,
    write_config=write_config,
    weights=weights,
    ignored=(common.INV_FREQ,),
    aliases=aliases,
    as_stored=as_stored,
)
