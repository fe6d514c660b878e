"""Every family that can be imported and exported, one table a file."""

from jaxtrain.interop.families import (
    bart,
    bert,
    deepseek_v3,
    electra,
    gemma2,
    gemma3,
    glm4,
    gpt2,
    llama,
    mistral,
    mixtral,
    olmo2,
    phi3,
    qwen2,
    qwen3,
    qwen3_moe,
    roberta,
    t5,
)
from jaxtrain.interop.family import Family

TABLES = (
    llama.FAMILY,
    gpt2.FAMILY,
    mistral.FAMILY,
    qwen2.FAMILY,
    qwen3.FAMILY,
    olmo2.FAMILY,
    gemma2.FAMILY,
    gemma3.FAMILY,
    glm4.GLM,
    glm4.FAMILY,
    phi3.FAMILY,
    mixtral.FAMILY,
    qwen3_moe.FAMILY,
    deepseek_v3.FAMILY,
    bert.FAMILY,
    roberta.FAMILY,
    electra.FAMILY,
    bart.FAMILY,
    t5.FAMILY,
)
FAMILIES: dict[str, Family] = {family.model_type: family for family in TABLES}
