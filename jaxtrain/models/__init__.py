"""Models as pure functions over nested dicts of parameters."""

import functools

from jaxtrain.models.cache import Cache, init_cache
from jaxtrain.models.decoder import DecoderConfig, build_decoder
from jaxtrain.models.functional import Model
from jaxtrain.models.rope import Rope
from jaxtrain.sharding import DEFAULT_RULES, ShardingRules

FAMILIES = {DecoderConfig: build_decoder}


@functools.cache
def build_model(config: DecoderConfig, rules: ShardingRules = DEFAULT_RULES) -> Model:
    """The model that ``config`` describes; its class chooses the family.

    The same model for equal arguments, so that what was compiled for one stage serves the next.
    """
    return FAMILIES[type(config)](config, rules)


__all__ = ["Cache", "DecoderConfig", "Model", "Rope", "build_model", "init_cache"]
