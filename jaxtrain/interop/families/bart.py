"""BART, and what has its architecture (distilled ones with fewer decoder layers too)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxtrain.interop.families.encoders import pair, read_activation, read_heads, write_activation, write_heads
from jaxtrain.interop.family import Family
from jaxtrain.interop.weights import Weight, table, vector
from jaxtrain.models import BartConfig
from jaxtrain.models.seq2seq import SIDES

HEADS = {"BartModel": (), "BartForConditionalGeneration": ("lm",)}
# nn.LayerNorm's own.
NORM_EPS = 1e-5
# Our projections by theirs.
PROJECTIONS = {"q_proj": "query", "k_proj": "key", "v_proj": "value", "out_proj": "out"}


def read_config(fields: Mapping[str, Any]) -> BartConfig:
    """config.json -> ours.

    Their dropout of attention's probabilities, of activations and of whole layers plays no part in what weights mean,
    and training here has none.
    """
    fields.only("tie_word_embeddings", True, default=True)
    for name in ("attention_dropout", "activation_dropout", "encoder_layerdrop", "decoder_layerdrop"):
        fields.get(name)
    for name in ("classifier_dropout", "classif_dropout", "num_hidden_layers", "num_labels"):
        fields.get(name)
    for name in ("normalize_before", "add_final_layer_norm", "static_position_embeddings", "add_bias_logits"):
        fields.only(name, False, default=False)
    fields.only("normalize_embedding", True, default=True)
    for name in ("attention_heads", "ffn_dim"):
        encoder, decoder = fields[f"encoder_{name}"], fields[f"decoder_{name}"]
        if encoder != decoder:
            raise ValueError(
                f"config.json has {encoder} encoder_{name}, but {decoder} decoder_{name}; supported if equal"
            )
    return BartConfig(
        vocab_size=fields["vocab_size"],
        num_layers=fields["encoder_layers"],
        num_decoder_layers=fields["decoder_layers"],
        d_model=fields["d_model"],
        num_heads=fields["encoder_attention_heads"],
        d_ff=fields["encoder_ffn_dim"],
        max_positions=fields.get("max_position_embeddings", 1024),
        activation=read_activation(fields, "activation_function"),
        scale_embedding=fields.get("scale_embedding", False),
        dropout=fields.get("dropout", 0.1),
        norm_eps=NORM_EPS,
        init_std=fields.get("init_std", 0.02),
        heads=read_heads(fields, HEADS),
    )


def write_config(config: BartConfig) -> dict[str, Any]:
    """Ours -> config.json.  Raises ValueError for what BART's class has no field for."""
    if config.norm_eps != NORM_EPS:
        raise ValueError(f"BartConfig.norm_eps is {config.norm_eps}; transformers has {NORM_EPS} and nothing else")
    if config.head_dim * config.num_heads != config.d_model:
        raise ValueError(f"BartConfig.head_dim is {config.head_dim}; transformers has d_model / num_heads")
    return {
        "architectures": write_heads(config, HEADS),
        "is_encoder_decoder": True,
        "vocab_size": config.vocab_size,
        "encoder_layers": config.num_layers,
        "decoder_layers": config.num_decoder_layers,
        "d_model": config.d_model,
        "encoder_attention_heads": config.num_heads,
        "decoder_attention_heads": config.num_heads,
        "encoder_ffn_dim": config.d_ff,
        "decoder_ffn_dim": config.d_ff,
        "max_position_embeddings": config.max_positions,
        "activation_function": write_activation(config.activation),
        "scale_embedding": config.scale_embedding,
        "dropout": config.dropout,
        "attention_dropout": 0.0,
        "activation_dropout": 0.0,
        "init_std": config.init_std,
        "tie_word_embeddings": True,
    }


def weights(config: BartConfig) -> tuple[Weight, ...]:
    """The rules of every array."""
    rules = [table("model.shared.weight", "embed/embedding")]
    for side, count in zip(SIDES, (config.num_layers, config.num_decoder_layers), strict=True):
        theirs, layer, where = f"model.{side}.", f"model.{side}.layers.{{layer}}.", {"layers": count}
        rules.append(table(theirs + "embed_positions.weight", f"{side}/position_embed/embedding"))
        rules += pair(theirs + "layernorm_embedding", f"{side}/embed_norm", "norm")
        parts = {"self_attn": "attention"} | ({"encoder_attn": "cross"} if side == "decoder" else {})
        for their_part, part in parts.items():
            for their_name, name in PROJECTIONS.items():
                inputs = 2 if name == "out" else 1
                rules += pair(
                    f"{layer}{their_part}.{their_name}", f"{side}/layers/{part}/{name}", inputs=inputs, **where
                )
            rules += pair(f"{layer}{their_part}_layer_norm", f"{side}/layers/{part}_norm", "norm", **where)
        for their_name, name in (("fc1", "up"), ("fc2", "down")):
            rules += pair(layer + their_name, f"{side}/layers/mlp/{name}", **where)
        rules += pair(layer + "final_layer_norm", f"{side}/layers/mlp_norm", "norm", **where)
    if "lm" in config.heads:
        rules.append(_row("final_logits_bias", "logits_bias/bias"))
    return tuple(rules)


def _row(theirs: str, ours: str) -> Weight:
    """Their ``[1, n]`` is our ``[n]``."""
    rule = vector(theirs, ours, optional=True)
    return Weight(
        theirs=rule.theirs,
        ours=rule.ours,
        to_ours=rule.to_ours,
        to_theirs=lambda mine: [mine[0][None]],
        optional=True,
    )


def aliases(config: BartConfig) -> tuple[tuple[str, str], ...]:
    """Of the embeddings."""
    names = [f"model.{side}.embed_tokens.weight" for side in SIDES]
    if "lm" in config.heads:
        names.append("lm_head.weight")
    return tuple((name, "model.shared.weight") for name in names)


FAMILY = Family(
    name="BART",
    model_type="bart",
    architectures=tuple(HEADS),
    config=BartConfig,
    read_config=read_config,
    write_config=write_config,
    weights=weights,
    aliases=aliases,
    base_prefix="model.",
)
