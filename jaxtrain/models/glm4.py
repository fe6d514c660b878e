"""GLM-4 (2406.12793): only part of each head is turned; GLM-4-0414 also normalises what its layers add."""

from __future__ import annotations

import dataclasses

from jaxtrain.models.decoder_config import DecoderConfig, LayerSpec
from jaxtrain.models.layers import MLPSpec
from jaxtrain.models.rope import Rope


@dataclasses.dataclass(frozen=True, kw_only=True)
class GlmConfig(DecoderConfig):
    """GLM-4 of 2024.  attention_bias: on queries, keys and values."""

    rope: Rope = Rope(fraction=0.5)
    attention_bias: bool = True
    tie_embeddings: bool = False

    def __post_init__(self):
        super().__post_init__()
        self.rope.rotary_dim(self.head_dim)

    def layer_spec(self) -> LayerSpec:
        return LayerSpec(
            attention=self.attention_spec(bias=self.attention_bias),
            mlp=MLPSpec(d_ff=self.d_ff),
            norm=self.norm(),
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Glm4Config(GlmConfig):
    """GLM-4-0414, whose layers have norms before and after attention and the MLP."""

    def layer_spec(self) -> LayerSpec:
        return dataclasses.replace(super().layer_spec(), norms=("pre", "post"))
