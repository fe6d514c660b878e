"""T5, its version 1.1, and Flan-T5."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxtrain.interop.families.encoders import ACTIVATIONS, read_heads, write_activation, write_heads
from jaxtrain.interop.family import Family
from jaxtrain.interop.weights import Weight, linear, table, vector
from jaxtrain.models import T5Config
from jaxtrain.models.seq2seq import SIDES

HEADS = {"T5Model": (), "T5ForConditionalGeneration": ("lm",)}
# Our parts of a layer by theirs, in the order of their numbers.
PARTS = {
    "encoder": (("SelfAttention", "attention"), ("DenseReluDense", "mlp")),
    "decoder": (("SelfAttention", "attention"), ("EncDecAttention", "cross"), ("DenseReluDense", "mlp")),
}
PROJECTIONS = {"q": "query", "k": "key", "v": "value", "o": "out"}


def read_config(fields: Mapping[str, Any]) -> T5Config:
    """config.json -> ours.

    ``tie_word_embeddings`` false means version 1.1: an output matrix of its own, and no scaling of what it reads.
    transformers 5 writes true for both versions, and ``scale_decoder_outputs`` for which of them it is.
    """
    activation, gated = _read_activation(fields)
    tied = fields.get("tie_word_embeddings", True)
    scale = fields.get("scale_decoder_outputs", tied)
    for name in (
        "dense_act_fn",
        "is_gated_act",
        "classifier_dropout",
        "n_positions",
        "output_past",
        "initializer_factor",
    ):
        fields.get(name)
    return T5Config(
        vocab_size=fields["vocab_size"],
        num_layers=fields["num_layers"],
        num_decoder_layers=fields.get("num_decoder_layers", 0),
        d_model=fields["d_model"],
        num_heads=fields["num_heads"],
        head_dim=fields["d_kv"],
        d_ff=fields["d_ff"],
        activation=activation,
        gated=gated,
        tie_embeddings=scale,
        scale_outputs=scale,
        relative_buckets=fields.get("relative_attention_num_buckets", 32),
        relative_max_distance=fields.get("relative_attention_max_distance", 128),
        dropout=fields.get("dropout_rate", 0.1),
        norm_eps=fields.get("layer_norm_epsilon", 1e-6),
        heads=read_heads(fields, HEADS),
    )


def _read_activation(fields: Mapping[str, Any]) -> tuple[str, bool]:
    """Ours, and whether it is gated.  Their "gated-gelu" means the approximation by tanh."""
    names = {**ACTIVATIONS, **{f"gated-{name}": ours for name, ours in ACTIVATIONS.items()}, "gated-gelu": "gelu_tanh"}
    found = fields.only("feed_forward_proj", *names, default="relu")
    return names[found], found.startswith("gated-")


def write_config(config: T5Config) -> dict[str, Any]:
    """Ours -> config.json.  Raises ValueError for a choice between versions 1.0 and 1.1."""
    if config.tie_embeddings != config.scale_outputs:
        raise ValueError(
            f"T5Config.tie_embeddings is {config.tie_embeddings} and scale_outputs {config.scale_outputs}; config.json "
            "can only say both or neither"
        )
    activation = write_activation(config.activation)
    if config.gated:
        if config.activation == "gelu":
            raise ValueError("T5Config has an exact gelu with a gate; config.json's 'gated-gelu' means 'gelu_tanh'")
        activation = "gated-gelu" if config.activation == "gelu_tanh" else f"gated-{activation}"
    return {
        "architectures": write_heads(config, HEADS),
        "is_encoder_decoder": True,
        "vocab_size": config.vocab_size,
        "num_layers": config.num_layers,
        "num_decoder_layers": config.num_decoder_layers,
        "d_model": config.d_model,
        "num_heads": config.num_heads,
        "d_kv": config.head_dim,
        "d_ff": config.d_ff,
        "feed_forward_proj": activation,
        "tie_word_embeddings": config.tie_embeddings,
        "relative_attention_num_buckets": config.relative_buckets,
        "relative_attention_max_distance": config.relative_max_distance,
        "dropout_rate": config.dropout,
        "layer_norm_epsilon": config.norm_eps,
    }


def weights(config: T5Config) -> tuple[Weight, ...]:
    """The rules of every array."""
    rules = [table("shared.weight", "embed/embedding")]
    mlp = {"wi_0": "gate", "wi_1": "up", "wo": "down"} if config.gated else {"wi": "up", "wo": "down"}
    for side, count in zip(SIDES, (config.num_layers, config.num_decoder_layers), strict=True):
        where = {"layers": count}
        first = f"{side}.block.0.layer.0.SelfAttention."
        rules.append(table(first + "relative_attention_bias.weight", f"{side}/relative_bias/embedding"))
        for number, (their_part, part) in enumerate(PARTS[side]):
            layer = f"{side}.block.{{layer}}.layer.{number}."
            for their_name, name in (mlp if part == "mlp" else PROJECTIONS).items():
                theirs, ours = f"{layer}{their_part}.{their_name}.weight", f"{side}/layers/{part}/{name}/kernel"
                rules.append(linear(theirs, ours, inputs=2 if name == "out" else 1, **where))
            rules.append(vector(layer + "layer_norm.weight", f"{side}/layers/{part}_norm/scale", **where))
        rules.append(vector(f"{side}.final_layer_norm.weight", f"{side}/final_norm/scale"))
    if "lm" in config.heads and not config.tie_embeddings:
        rules.append(linear("lm_head.weight", "lm_head/kernel"))
    return tuple(rules)


def aliases(config: T5Config) -> tuple[tuple[str, str], ...]:
    """Of the embeddings."""
    names = [f"{side}.embed_tokens.weight" for side in SIDES]
    if "lm" in config.heads and config.tie_embeddings:
        names.append("lm_head.weight")
    return tuple((name, "shared.weight") for name in names)


FAMILY = Family(
    name="T5",
    model_type="t5",
    architectures=tuple(HEADS),
    config=T5Config,
    read_config=read_config,
    write_config=write_config,
    weights=weights,
    # A table that old files have, and that nothing reads.
    ignored=(r"decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight",),
    aliases=aliases,
)
