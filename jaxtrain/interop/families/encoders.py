"""What the tables of BERT, RoBERTa and ELECTRA have in common: the names of BERT's transformers class."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxtrain.interop.weights import Weight, linear, table, vector
from jaxtrain.models.encoder import EncoderConfig

# Their names and ours; "gelu_new" and "gelu_pytorch_tanh" are two spellings of one function.
ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}


# Of files as old as bert-base-uncased, which were converted from TensorFlow.
OLD_ENDINGS = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}


def read_activation(fields: Mapping[str, Any], name: str) -> str:
    """Ours for the activation in the field ``name``; raises ValueError for one that we lack."""
    return ACTIVATIONS[fields.only(name, *ACTIVATIONS, default="gelu")]


def write_activation(name: str) -> str:
    """Theirs for one of ours."""
    return next(theirs for theirs, ours in ACTIVATIONS.items() if ours == name)


def read_heads(fields: Mapping[str, Any], heads: Mapping[str, tuple[str, ...]]) -> tuple[str, ...]:
    """The heads of the architecture in a config.json; one without any is taken for the first, the bare model.

    Raises ValueError for an architecture that is not among ``heads``.
    """
    found = fields.get("architectures") or list(heads)[:1]
    if found[0] not in heads:
        raise ValueError(f"config.json has the architecture {found[0]!r}; supported are {', '.join(heads)}")
    return heads[found[0]]


def write_heads(config: Any, heads: Mapping[str, tuple[str, ...]]) -> list[str]:
    """The architecture that has the config's heads, the bare model where it has none; raises ValueError where there is
    no such class."""
    if not config.heads:
        return list(heads)[:1]
    for architecture, names in heads.items():
        if set(names) == set(config.heads):
            return [architecture]
    raise ValueError(f"no class of transformers has the heads {config.heads}; there are {sorted(set(heads.values()))}")


def read_sizes(fields: Mapping[str, Any]) -> dict[str, Any]:
    """An EncoderConfig's arguments.

    Their dropout of attention's probabilities plays no part in what weights mean, and training here has none.
    """
    fields.only("position_embedding_type", "absolute", default="absolute")
    fields.only("tie_word_embeddings", True, default=True)
    fields.only("is_decoder", False, default=False)
    for name in ("attention_probs_dropout_prob", "classifier_dropout"):
        fields.get(name)
    return {
        "vocab_size": fields["vocab_size"],
        "num_layers": fields["num_hidden_layers"],
        "d_model": fields["hidden_size"],
        "num_heads": fields["num_attention_heads"],
        "d_ff": fields["intermediate_size"],
        "max_positions": fields.get("max_position_embeddings", 512),
        "type_vocab_size": fields.get("type_vocab_size", 2),
        "activation": read_activation(fields, "hidden_act"),
        "dropout": fields.get("hidden_dropout_prob", 0.1),
        "norm_eps": fields.get("layer_norm_eps", 1e-12),
        "init_std": fields.get("initializer_range", 0.02),
    }


def write_sizes(config: EncoderConfig) -> dict[str, Any]:
    """The inverse of ``read_sizes``."""
    return {
        "vocab_size": config.vocab_size,
        "num_hidden_layers": config.num_layers,
        "hidden_size": config.d_model,
        "num_attention_heads": config.num_heads,
        "intermediate_size": config.d_ff,
        "max_position_embeddings": config.max_positions + config.first_position(),
        "type_vocab_size": config.type_vocab_size,
        "hidden_act": write_activation(config.activation),
        "hidden_dropout_prob": config.dropout,
        "attention_probs_dropout_prob": 0.0,
        "layer_norm_eps": config.norm_eps,
        "initializer_range": config.init_std,
        "tie_word_embeddings": True,
    }


def pair(theirs: str, ours: str, kind: str = "linear", **where: Any) -> list[Weight]:
    """``weight`` and ``bias`` of a Linear (our kernel and bias) or, with ``kind`` "norm", a LayerNorm (scale, bias)."""
    if kind == "norm":
        first = vector(f"{theirs}.weight", f"{ours}/scale", **where)
    else:
        first = linear(f"{theirs}.weight", f"{ours}/kernel", **where)
    where.pop("inputs", None)
    return [first, vector(f"{theirs}.bias", f"{ours}/bias", **where)]


def trunk_rules(config: EncoderConfig, prefix: str) -> list[Weight]:
    """The embeddings and the layers, whose names all begin with ``prefix`` ("bert.")."""
    embeddings, layer = f"{prefix}embeddings.", f"{prefix}encoder.layer.{{layer}}."
    where = {"layers": config.num_layers}
    rules = [
        table(embeddings + "word_embeddings.weight", "embed/embedding"),
        table(embeddings + "position_embeddings.weight", "position_embed/embedding"),
        *pair(embeddings + "LayerNorm", "embed_norm", "norm"),
    ]
    if config.type_vocab_size:
        rules.append(table(embeddings + "token_type_embeddings.weight", "type_embed/embedding"))
    for name in ("query", "key", "value"):
        rules += pair(f"{layer}attention.self.{name}", f"layers/attention/{name}", **where)
    rules += pair(f"{layer}attention.output.dense", "layers/attention/out", inputs=2, **where)
    for theirs, ours in (("attention.output", "attention_norm"), ("output", "mlp_norm")):
        rules += pair(f"{layer}{theirs}.LayerNorm", f"layers/{ours}", "norm", **where)
    for theirs, ours in (("intermediate", "up"), ("output", "down")):
        rules += pair(f"{layer}{theirs}.dense", f"layers/mlp/{ours}", **where)
    return rules
