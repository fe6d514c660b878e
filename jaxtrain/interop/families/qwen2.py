"""Qwen2 and Qwen2.5."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxtrain.interop.families import common
from jaxtrain.interop.family import Family
from jaxtrain.interop.weights import Weight
from jaxtrain.models import Qwen2Config


def read_config(fields: Mapping[str, Any]) -> Qwen2Config:
    """config.json -> ours."""
    fields.only("hidden_act", "silu", "swish", default="silu")
    sizes = common.read_sizes(fields, num_kv_heads=32, max_positions=32768)
    return Qwen2Config(**sizes, **read_window(fields, sizes["num_layers"]))


def read_window(fields: Mapping[str, Any], num_layers: int) -> dict[str, int]:
    """``window`` and ``full_layers``, from ``layer_types`` where it is given and ``max_window_layers`` where not.

    Raises ValueError where a layer without a window stands above one with a window.
    """
    on = fields.get("use_sliding_window", False)
    # Null is an answer of its own.
    window = fields["sliding_window"] if "sliding_window" in fields else 4096  # noqa: SIM401
    full_layers = fields.get("max_window_layers", 28)
    kinds = fields.get("layer_types")
    if kinds is None:
        kinds = ["full_attention" if i < full_layers else "sliding_attention" for i in range(num_layers)]
        kinds = kinds if on and window else ["full_attention"] * num_layers
    full = sum(kind == "full_attention" for kind in kinds)
    if list(kinds) != ["full_attention"] * full + ["sliding_attention"] * (num_layers - full):
        raise ValueError(
            f"config.json has layer_types = {kinds}; here {num_layers} layers are 'full_attention' up to some layer "
            "and 'sliding_attention' from there on"
        )
    if full == num_layers:
        return {"window": 0, "full_layers": 0}
    if not on or not window:
        raise ValueError(
            f"config.json has 'sliding_attention' in layer_types, but use_sliding_window = {on} and "
            f"sliding_window = {window}"
        )
    return {"window": window, "full_layers": full}


def write_config(config: Qwen2Config) -> dict[str, Any]:
    """Ours -> config.json."""
    common.require(config, qk_norm=False, attention_bias=True, head_dim=config.d_model // config.num_heads)
    sizes = common.write_sizes(config)
    del sizes["head_dim"]  # no field of this class
    return {"hidden_act": "silu", **sizes, **write_window(config)}


def write_window(config: Qwen2Config) -> dict[str, Any]:
    """The inverse of ``read_window``."""
    return {
        "use_sliding_window": config.window > 0,
        "sliding_window": config.window or None,
        "max_window_layers": config.full_layers if config.window else config.num_layers,
    }


def weights(config: Qwen2Config) -> tuple[Weight, ...]:
    """The rules of every array."""
    return (
        *common.end_rules(config),
        *common.norm_rules(config),
        *common.attention_rules(config, bias=True),
        *common.mlp_rules(config),
    )


FAMILY = Family(
    name="Qwen2",
    model_type="qwen2",
    architectures=("Qwen2ForCausalLM",),
    config=Qwen2Config,
    read_config=read_config,
    write_config=write_config,
    weights=weights,
    ignored=(common.INV_FREQ,),
    aliases=common.tied_head,
)
