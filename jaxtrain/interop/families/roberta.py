"""RoBERTa and what has its architecture."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxtrain.interop.families.encoders import pair, read_heads, read_sizes, trunk_rules, write_heads, write_sizes
from jaxtrain.interop.family import Family
from jaxtrain.interop.weights import Weight, vector
from jaxtrain.models import RobertaConfig

HEADS = {"RobertaModel": ("pooler",), "RobertaForMaskedLM": ("mlm",)}


def read_config(fields: Mapping[str, Any]) -> RobertaConfig:
    """config.json -> ours.  Positions start after the id of padding, and their table counts the rows before."""
    offset = fields.get("pad_token_id", 1) + 1
    sizes = read_sizes(fields)
    sizes["max_positions"] -= offset
    return RobertaConfig(**sizes, position_offset=offset, heads=read_heads(fields, HEADS))


def write_config(config: RobertaConfig) -> dict[str, Any]:
    """Ours -> config.json.  Raises ValueError for positions that start at 0, where no id of padding can be."""
    if config.position_offset < 1:
        raise ValueError(
            f"RobertaConfig.position_offset is {config.position_offset}; transformers starts at 1 or later"
        )
    own = {"architectures": write_heads(config, HEADS), "pad_token_id": config.position_offset - 1}
    return own | write_sizes(config)


def weights(config: RobertaConfig) -> tuple[Weight, ...]:
    """The rules of every array."""
    rules = trunk_rules(config, "roberta.")
    if "mlm" in config.heads:
        rules += pair("lm_head.dense", "mlm/dense")
        rules += pair("lm_head.layer_norm", "mlm/norm", "norm")
        rules.append(vector("lm_head.bias", "mlm/bias"))
    if "pooler" in config.heads:
        # Files of sentence encoders lack it at times, and their hidden states are what counts.
        rules += pair("roberta.pooler.dense", "pooler/dense", optional=True)
    return tuple(rules)


def aliases(config: RobertaConfig) -> tuple[tuple[str, str], ...]:
    """Of the embeddings, and of the bias."""
    if "mlm" not in config.heads:
        return ()
    return (
        ("lm_head.decoder.weight", "roberta.embeddings.word_embeddings.weight"),
        ("lm_head.decoder.bias", "lm_head.bias"),
    )


FAMILY = Family(
    name="RoBERTa",
    model_type="roberta",
    architectures=tuple(HEADS),
    config=RobertaConfig,
    read_config=read_config,
    write_config=write_config,
    weights=weights,
    # What a file has beyond its architecture's heads.
    ignored=(r"roberta\.embeddings\.position_ids", r"roberta\.pooler\..*", r"lm_head\..*"),
    aliases=aliases,
    base_prefix="roberta.",
)
