"""Qwen3 (2505.09388): every head of queries and keys is normalised; no biases."""

from __future__ import annotations

import dataclasses

from jaxtrain.models.decoder_config import LayerSpec
from jaxtrain.models.layers import MLPSpec
from jaxtrain.models.qwen2 import Qwen2Config


@dataclasses.dataclass(frozen=True, kw_only=True)
class Qwen3Config(Qwen2Config):
    """attention_bias: on queries, keys, values and the output.  The rest as in ``Qwen2Config``."""

    qk_norm: bool = True
    attention_bias: bool = False

    def layer_spec(self, window: int = 0) -> LayerSpec:
        bias = self.attention_bias
        return LayerSpec(
            attention=self.attention_spec(bias=bias, out_bias=bias, window=window),
            mlp=MLPSpec(d_ff=self.d_ff),
            norm=self.norm(),
        )
