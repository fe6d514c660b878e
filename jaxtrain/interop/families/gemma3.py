"""Gemma 3's text model: the 270M and 1B sizes, and the text part of the others where it was saved by itself."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxtrain.interop.families import common
from jaxtrain.interop.families.gemma2 import KINDS, SIZES, read_gemma, weights, write_gemma
from jaxtrain.interop.family import Family, rope_of
from jaxtrain.models import Gemma3Config, Rope


def read_config(fields: Mapping[str, Any]) -> Gemma3Config:
    """config.json -> ours.  Raises ValueError for a model of text and images."""
    if "text_config" in fields or "vision_config" in fields:
        raise ValueError(
            "config.json is that of Gemma 3 for text and images; only its text model (gemma3_text, Gemma3ForCausalLM) "
            "is supported: save it by itself"
        )
    # transformers accepts these caps but does not apply them.
    fields.only("attn_logit_softcapping", None, default=None)
    fields.get("cache_implementation")  # how transformers 4 generates
    fields.get("_sliding_window_pattern")  # what transformers 5 read layer_types from
    every = fields.get("sliding_window_pattern", 6)
    rope, local_theta = read_ropes(fields)
    return Gemma3Config(
        **common.read_sizes(fields, **SIZES, max_positions=131072, rope=rope),
        **read_gemma(fields, every=every, final_softcap=0.0),
        local_theta=local_theta,
    )


def read_ropes(fields: Mapping[str, Any]) -> tuple[Rope, float]:
    """The global layers' Rope, and the base of the local ones': a dict for each kind in ``rope_parameters``
    (transformers 5), or ``rope_theta``, ``rope_scaling`` and ``rope_local_base_freq``."""
    parameters = fields.get("rope_parameters", {})
    if set(parameters) - KINDS.keys():
        raise ValueError(
            f"config.json has rope_parameters = {parameters}; Gemma 3 has a dict for each of {list(KINDS)}"
        )
    local = {"rope_theta": fields.get("rope_local_base_freq", 10_000.0), **(parameters.get("sliding_attention") or {})}
    found = {
        "rope_theta": fields.get("rope_theta", 1_000_000.0),
        **(parameters.get("full_attention") or {}),
        **fields.get("rope_scaling", {}),
    }
    local_rope = rope_of(local)
    if local_rope.scaling != "none":
        raise ValueError(f"config.json scales the positions of local layers ({local}), which is not supported")
    return rope_of(found, original=fields.get("max_position_embeddings", 131072)), local_rope.theta


def write_config(config: Gemma3Config) -> dict[str, Any]:
    """Ours -> config.json."""
    common.require(config, qk_norm=True)
    local = {"rope_local_base_freq": config.local_theta}
    return common.write_sizes(config) | write_gemma(config) | local


FAMILY = Family(
    name="Gemma 3",
    model_type="gemma3_text",
    architectures=("Gemma3ForCausalLM",),
    config=Gemma3Config,
    read_config=read_config,
    write_config=write_config,
    weights=weights,
    ignored=(common.INV_FREQ,),
    aliases=common.tied_head,
)
