"""OLMo 2 (2501.00656): norms after attention and MLP, not before, and of a token's queries (keys) at once."""

from __future__ import annotations

import dataclasses

from jaxtrain.models.decoder_config import DecoderConfig, LayerSpec
from jaxtrain.models.layers import MLPSpec


@dataclasses.dataclass(frozen=True, kw_only=True)
class Olmo2Config(DecoderConfig):
    """attention_bias: on queries, keys, values and the output.  qk_norm cannot be left out."""

    attention_bias: bool = False
    qk_norm: bool = True

    def __post_init__(self):
        super().__post_init__()
        if not self.qk_norm:
            raise ValueError("qk_norm=False, but OLMo 2 always normalises queries and keys")

    def layer_spec(self) -> LayerSpec:
        bias = self.attention_bias
        return LayerSpec(
            attention=self.attention_spec(bias=bias, out_bias=bias, qk_norm="full"),
            mlp=MLPSpec(d_ff=self.d_ff),
            norm=self.norm(),
            norms=("post",),
        )
