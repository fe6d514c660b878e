"""Mixtral (2401.04088): Mistral's attention, and a mixture of SwiGLUs in every layer."""

from __future__ import annotations

import dataclasses

from jaxtrain.models.decoder_config import LayerSpec
from jaxtrain.models.moe import MoESpec
from jaxtrain.models.sparse import MoEConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class MixtralConfig(MoEConfig):
    """d_ff: width of an expert.  window: a token sees itself and the ``window - 1`` tokens before it; 0: all."""

    window: int = 0
    tie_embeddings: bool = False

    def layer_spec(self) -> LayerSpec:
        return LayerSpec(
            attention=self.attention_spec(window=self.window),
            mlp=MoESpec(
                num_experts=self.num_experts,
                top_k=self.top_k,
                d_ff=self.d_ff,
                capacity_factor=self.capacity_factor,
                sequence_balance=self.sequence_balance_coef > 0,
            ),
            norm=self.norm(),
        )
