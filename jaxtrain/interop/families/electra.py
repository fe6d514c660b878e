"""ELECTRA: generators and discriminators."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxtrain.interop.families.encoders import (
    OLD_ENDINGS,
    pair,
    read_heads,
    read_sizes,
    trunk_rules,
    write_heads,
    write_sizes,
)
from jaxtrain.interop.family import Family
from jaxtrain.interop.weights import Weight, vector
from jaxtrain.models import ElectraConfig

HEADS = {"ElectraModel": (), "ElectraForPreTraining": ("discriminator",), "ElectraForMaskedLM": ("mlm",)}
# Of heads that no architecture here has.
SUMMARY = ("summary_type", "summary_use_proj", "summary_activation", "summary_last_dropout")


def read_config(fields: Mapping[str, Any]) -> ElectraConfig:
    """config.json -> ours."""
    for name in SUMMARY:
        fields.get(name)
    return ElectraConfig(
        **read_sizes(fields), embedding_size=fields.get("embedding_size", 128), heads=read_heads(fields, HEADS)
    )


def write_config(config: ElectraConfig) -> dict[str, Any]:
    """Ours -> config.json."""
    own = {"architectures": write_heads(config, HEADS), "embedding_size": config.embedding_width()}
    return own | write_sizes(config)


def weights(config: ElectraConfig) -> tuple[Weight, ...]:
    """The rules of every array."""
    rules = trunk_rules(config, "electra.")
    if config.embedding_width() != config.d_model:
        rules += pair("electra.embeddings_project", "embed_projection/dense")
    if "mlm" in config.heads:
        rules += pair("generator_predictions.dense", "mlm/dense")
        rules += pair("generator_predictions.LayerNorm", "mlm/norm", "norm")
        rules.append(vector("generator_lm_head.bias", "mlm/bias"))
    if "discriminator" in config.heads:
        rules += pair("discriminator_predictions.dense", "discriminator/dense")
        rules += pair("discriminator_predictions.dense_prediction", "discriminator/out/dense")
    return tuple(rules)


def aliases(config: ElectraConfig) -> tuple[tuple[str, str], ...]:
    """Of the embeddings."""
    if "mlm" not in config.heads:
        return ()
    return (("generator_lm_head.weight", "electra.embeddings.word_embeddings.weight"),)


FAMILY = Family(
    name="ELECTRA",
    model_type="electra",
    architectures=tuple(HEADS),
    config=ElectraConfig,
    read_config=read_config,
    write_config=write_config,
    weights=weights,
    # What a file has beyond its architecture's heads.
    ignored=(
        r"electra\.embeddings\.position_ids",
        r"(generator|discriminator)_predictions\..*",
        r"generator_lm_head\..*",
    ),
    aliases=aliases,
    base_prefix="electra.",
    old_endings=OLD_ENDINGS,
)
