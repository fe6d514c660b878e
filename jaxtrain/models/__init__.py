"""Models as pure functions over nested dicts of parameters."""

import functools
from typing import Any

from jaxtrain.models.bart import BartConfig
from jaxtrain.models.bert import BertConfig
from jaxtrain.models.cache import Cache, init_cache
from jaxtrain.models.decoder import build_decoder
from jaxtrain.models.decoder_config import DecoderConfig
from jaxtrain.models.deepseek_v3 import DeepseekV3Config
from jaxtrain.models.electra import ElectraConfig
from jaxtrain.models.encoder import build_encoder
from jaxtrain.models.functional import Model
from jaxtrain.models.gemma2 import Gemma2Config
from jaxtrain.models.gemma3 import Gemma3Config
from jaxtrain.models.glm4 import Glm4Config, GlmConfig
from jaxtrain.models.gpt2 import GPT2Config
from jaxtrain.models.llama import LlamaConfig
from jaxtrain.models.mistral import MistralConfig
from jaxtrain.models.mixtral import MixtralConfig
from jaxtrain.models.olmo2 import Olmo2Config
from jaxtrain.models.phi3 import Phi3Config
from jaxtrain.models.qwen2 import Qwen2Config
from jaxtrain.models.qwen3 import Qwen3Config
from jaxtrain.models.qwen3_moe import Qwen3MoeConfig
from jaxtrain.models.roberta import RobertaConfig
from jaxtrain.models.rope import Rope
from jaxtrain.models.seq2seq import build_seq2seq
from jaxtrain.models.t5 import T5Config
from jaxtrain.sharding import DEFAULT_RULES, ShardingRules

DECODERS = (
    DecoderConfig,
    LlamaConfig,
    GPT2Config,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
    Olmo2Config,
    Gemma2Config,
    Gemma3Config,
    Glm4Config,
    GlmConfig,
    Phi3Config,
    MixtralConfig,
    Qwen3MoeConfig,
    DeepseekV3Config,
)
ENCODERS = (BertConfig, RobertaConfig, ElectraConfig)
SEQ2SEQ = (BartConfig, T5Config)
FAMILIES = {
    **dict.fromkeys(DECODERS, build_decoder),
    **dict.fromkeys(ENCODERS, build_encoder),
    **dict.fromkeys(SEQ2SEQ, build_seq2seq),
}


@functools.cache
def build_model(config: Any, rules: ShardingRules = DEFAULT_RULES) -> Model:
    """The model that ``config`` describes; its class chooses the family.

    The same model for equal arguments, so that what was compiled for one stage serves the next.
    """
    return FAMILIES[type(config)](config, rules)


__all__ = [
    "DECODERS",
    "ENCODERS",
    "FAMILIES",
    "SEQ2SEQ",
    "BartConfig",
    "BertConfig",
    "Cache",
    "DecoderConfig",
    "DeepseekV3Config",
    "ElectraConfig",
    "GPT2Config",
    "Gemma2Config",
    "Gemma3Config",
    "Glm4Config",
    "GlmConfig",
    "LlamaConfig",
    "MistralConfig",
    "MixtralConfig",
    "Model",
    "Olmo2Config",
    "Phi3Config",
    "Qwen2Config",
    "Qwen3Config",
    "Qwen3MoeConfig",
    "RobertaConfig",
    "Rope",
    "T5Config",
    "build_model",
    "init_cache",
]
