"""Mistral (2310.06825): Llama whose layers may each see only a window."""

from __future__ import annotations

import dataclasses

from jaxtrain.models.decoder_config import DecoderConfig, LayerSpec
from jaxtrain.models.layers import MLPSpec


@dataclasses.dataclass(frozen=True, kw_only=True)
class MistralConfig(DecoderConfig):
    """window: a token sees itself and the ``window - 1`` tokens before it; 0: all before it (from v0.2 on)."""

    window: int = 0

    def __post_init__(self):
        super().__post_init__()
        if self.window < 0:
            raise ValueError(f"window={self.window} must be at least 1, or 0 for none")

    def layer_spec(self) -> LayerSpec:
        return LayerSpec(
            attention=self.attention_spec(window=self.window), mlp=MLPSpec(d_ff=self.d_ff), norm=self.norm()
        )
