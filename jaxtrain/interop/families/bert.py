"""BERT and the sentence encoders with its architecture (MiniLM, BGE, E5)."""

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
from jaxtrain.models import BertConfig

HEADS = {
    "BertModel": ("pooler",),
    "BertForMaskedLM": ("mlm",),
    "BertForPreTraining": ("mlm", "nsp"),
    "BertForNextSentencePrediction": ("nsp",),
}


def read_config(fields: Mapping[str, Any]) -> BertConfig:
    """config.json -> ours."""
    return BertConfig(**read_sizes(fields), heads=read_heads(fields, HEADS))


def write_config(config: BertConfig) -> dict[str, Any]:
    """Ours -> config.json."""
    return {"architectures": write_heads(config, HEADS), **write_sizes(config)}


def weights(config: BertConfig) -> tuple[Weight, ...]:
    """The rules of every array."""
    rules = trunk_rules(config, "bert.")
    if "mlm" in config.heads:
        rules += pair("cls.predictions.transform.dense", "mlm/dense")
        rules += pair("cls.predictions.transform.LayerNorm", "mlm/norm", "norm")
        rules.append(vector("cls.predictions.bias", "mlm/bias"))
    if {"pooler", "nsp"} & set(config.heads):
        # Files of sentence encoders lack it at times, and their hidden states are what counts.
        rules += pair("bert.pooler.dense", "pooler/dense", optional=config.heads == ("pooler",))
    if "nsp" in config.heads:
        rules += pair("cls.seq_relationship", "next_sentence/dense")
    return tuple(rules)


def aliases(config: BertConfig) -> tuple[tuple[str, str], ...]:
    """Of the embeddings, and of the bias."""
    if "mlm" not in config.heads:
        return ()
    return (
        ("cls.predictions.decoder.weight", "bert.embeddings.word_embeddings.weight"),
        ("cls.predictions.decoder.bias", "cls.predictions.bias"),
    )


FAMILY = Family(
    name="BERT",
    model_type="bert",
    architectures=tuple(HEADS),
    config=BertConfig,
    read_config=read_config,
    write_config=write_config,
    weights=weights,
    # What a file has beyond its architecture's heads: bert-base-uncased, a masked language model, has all of them.
    ignored=(r"bert\.embeddings\.position_ids", r"bert\.pooler\..*", r"cls\..*"),
    aliases=aliases,
    base_prefix="bert.",
    old_endings=OLD_ENDINGS,
)
