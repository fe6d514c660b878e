"""Models as pure functions over nested dicts of parameters."""

from jaxtrain.models.cache import Cache, init_cache
from jaxtrain.models.decoder import DecoderConfig, build_decoder
from jaxtrain.models.functional import Model
from jaxtrain.models.rope import Rope
from jaxtrain.sharding import DEFAULT_RULES, ShardingRules

FAMILIES = {DecoderConfig: build_decoder}


def build_model(config: DecoderConfig, rules: ShardingRules = DEFAULT_RULES) -> Model:
    """The model that ``config`` describes; its class chooses the family."""
    return FAMILIES[type(config)](config, rules)


__all__ = ["Cache", "DecoderConfig", "Model", "Rope", "build_model", "init_cache"]
