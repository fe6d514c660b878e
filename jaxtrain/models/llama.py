"""Llama 2, 3 and 3.x (2307.09288, 2407.21783); SmolLM2 and many others have the same architecture."""

from __future__ import annotations

import dataclasses

from jaxtrain.models.decoder_config import DecoderConfig, LayerSpec
from jaxtrain.models.layers import MLPSpec


@dataclasses.dataclass(frozen=True, kw_only=True)
class LlamaConfig(DecoderConfig):
    """attention_bias: on queries, keys, values and the output.  mlp_bias: on the three matrices of the MLP."""

    attention_bias: bool = False
    mlp_bias: bool = False

    def layer_spec(self) -> LayerSpec:
        return LayerSpec(
            attention=self.attention_spec(bias=self.attention_bias, out_bias=self.attention_bias),
            mlp=MLPSpec(d_ff=self.d_ff, bias=self.mlp_bias),
            norm=self.norm(),
        )
